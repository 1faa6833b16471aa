"""The size and the knobs of a Moshi language model, read from Kyutai's ``config.json`` as it is.

Names and defaults are the reference's, so that what it left out means here what it means there.
The keys ``ttt_*`` are ours: they turn the top layers of the temporal transformer into TTT layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import (
    given,
    quoted,
    require_counts,
    require_fractions,
    require_known,
    require_numbers,
)
from moshi_fl.models.speech.layers import NormName, PositionName
from moshi_fl.models.speech.transformer import TransformerConfig
from moshi_fl.models.speech.ttt_config import TttConfig

Gating = Literal["none", "silu"]
TttMode = Literal["replace", "gated", "parallel"]

NOT_OF_THE_MODEL = frozenset(
    {
        *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name"),
        *("model_type", "lm_gen_config", "tts_config", "stt_config", "model_id"),
        *("lora", "lora_rank", "lora_scaling"),
    }
)
# What released files say about parts that this model does not have; null or false says nothing.
_ABSENT_PARTS = frozenset(
    {
        *("conditioners", "fuser", "cross_attention"),
        *("demux_second_text_stream", "demux_second_stream"),
    }
)
_WITHOUT_EFFECT = frozenset({"depformer_context", "depformer_causal"})


@dataclass(frozen=True)
class LMConfig:
    """The ``config.json`` of a release, or the ``[model]`` table of a hub.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    num_layers: int
    depformer_num_heads: int
    dim: int = 128
    num_heads: int = 8
    delays: tuple[int, ...] = (0,)  # frames by which a stream is late: text, ours, the user's
    n_q: int = 8  # audio streams that are read
    dep_q: int = 8  # audio streams that are predicted, the first ones
    card: int = 1024  # audio tokens of a codebook
    text_card: int = 32000
    hidden_scale: float = 4  # feed-forward width over dim
    norm: NormName = "layer_norm"
    norm_emb: bool = False
    bias_proj: bool = False  # of the output heads
    gating: Gating = "none"
    layer_scale: float | None = None  # where the gains of the branches start; None: no gains
    kv_repeat: int = 1  # query heads per key head
    causal: bool = True
    context: int | None = None  # frames that attention sees, its own among them; None: all
    positional_embedding: PositionName = "sin"
    positional_scale: float = 1.0
    max_period: float = 10000.0
    existing_text_padding_id: int = 3
    existing_text_end_padding_id: int = 0
    depformer_dim: int = 256
    depformer_dim_feedforward: int | None = None  # None: hidden_scale * depformer_dim
    depformer_num_layers: int | None = None  # None: num_layers
    depformer_gating: Gating | None = None  # None: gating
    depformer_kv_repeat: int | None = None  # None: kv_repeat
    depformer_layer_scale: float | None = None
    depformer_norm: NormName | None = None  # before each head
    depformer_pos_emb: PositionName = "sin"
    depformer_positional_scale: float | None = None  # None: positional_scale
    depformer_max_period: float | None = None  # None: max_period
    depformer_multi_linear: bool = False  # an input projection for each step
    depformer_weights_per_step: bool = False
    depformer_weights_per_step_schedule: tuple[int, ...] | None = None  # the weights of each step
    depformer_low_rank_embeddings: int | None = None
    extra_heads_num_heads: int = 0
    extra_heads_dim: int = 6
    ttt_layers: int = 0  # the top layers that have TTT
    ttt_mode: TttMode = "gated"  # in place of attention, the same times a gate, or beside it
    ttt_kind: Literal["linear", "mlp"] = "linear"
    ttt_mini_batch: int = 16
    ttt_alpha: float = 0.1  # where the gate starts; its output is times tanh of it
    ttt_forget: float = 0.0  # share of the way back to the first weights, after each mini-batch

    def __post_init__(self) -> None:
        counts = ["num_layers", "depformer_num_heads", "dim", "num_heads", "n_q", "dep_q", "card"]
        counts += ["text_card", "kv_repeat", "depformer_dim", "extra_heads_dim", "ttt_mini_batch"]
        require_counts(self, [*counts, *given(self, *_OPTIONAL_COUNTS)], name="[model]")
        require_fractions(self, ("ttt_forget",), name="[model]")
        numbers = ["positional_scale", "ttt_alpha", *given(self, *_OPTIONAL_NUMBERS)]
        require_numbers(self, numbers, name="[model]")
        positive = ["hidden_scale", "max_period", *given(self, "depformer_max_period")]
        require_numbers(self, positive, name="[model]", above_zero=True)
        for key in _FLAGS:
            value = getattr(self, key)
            _require(isinstance(value, bool), key, value, "must be true or false")
        for key, kind in _CHOICES.items():
            value, names = getattr(self, key), get_args(kind)
            unset = value is None and key in {"depformer_gating", "depformer_norm"}
            _require(value in names or unset, key, value, f"must be one of {', '.join(names)}")
        for key in ("existing_text_padding_id", "existing_text_end_padding_id"):
            value, rule = getattr(self, key), f"must be a whole number from 0 to {self.text_card}"
            _require(type(value) is int and 0 <= value <= self.text_card, key, value, rule)
        for key in ("extra_heads_num_heads", "ttt_layers"):
            value = getattr(self, key)
            _require(type(value) is int and value >= 0, key, value, "must be 0 or more")
        self._require_that_parts_fit()
        self._require_that_streams_fit()
        _ = self.temporal, self.depth, self.ttt  # each checks itself

    def _require_that_parts_fit(self) -> None:
        for prefix in ("", "depformer_"):
            width, heads = getattr(self, f"{prefix}dim"), getattr(self, f"{prefix}num_heads")
            rule = f"must divide {prefix}dim = {width}"
            _require(width % heads == 0, f"{prefix}num_heads", heads, rule)
        repeat = self.kv_repeat
        _require(
            self.num_heads % repeat == 0,
            "kv_repeat",
            repeat,
            f"must divide num_heads = {self.num_heads}",
        )
        _require(self.causal, "causal", self.causal, "must be true: a stream knows no future")
        most = self.num_layers
        _require(self.ttt_layers <= most, "ttt_layers", self.ttt_layers, f"must be at most {most}")

    def _require_that_streams_fit(self) -> None:
        delays, schedule = self.delays, self.depformer_weights_per_step_schedule
        rule = f"must hold n_q + 1 = {self.n_q + 1} whole numbers of 0 or more"
        _require(_whole(delays, self.n_q + 1), "delays", _shown(delays), rule)
        _require(self.dep_q <= self.n_q, "dep_q", self.dep_q, f"must be at most n_q = {self.n_q}")
        if schedule is not None:
            key = "depformer_weights_per_step_schedule"
            rule = f"must hold dep_q = {self.dep_q} whole numbers of 0 or more"
            _require(_whole(schedule, self.dep_q), key, _shown(schedule), rule)

    @property
    def weight_of_step(self) -> list[int]:
        """For each codebook that is predicted, the number of its weights."""
        return list(self.depformer_weights_per_step_schedule or range(self.dep_q))

    @property
    def initial_tokens(self) -> list[int]:
        """What each stream holds before its first token: text, then audio."""
        return [self.text_card] + [self.card] * self.n_q

    @property
    def max_delay(self) -> int:
        """Frames from the first token of a frame to its last."""
        return max(self.delays)

    @property
    def temporal(self) -> TransformerConfig:
        """The transformer over frames."""
        return TransformerConfig(
            d_model=self.dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            dim_feedforward=int(self.hidden_scale * self.dim),
            context=self.context,
            max_period=self.max_period,
            positional_embedding=self.positional_embedding,
            positional_scale=self.positional_scale,
            norm=self.norm,
            gating=self.gating,
            layer_scale=self.layer_scale,
            kv_repeat=self.kv_repeat,
        )

    @property
    def depth(self) -> TransformerConfig:
        """The transformer over the codebooks of a frame; it sees all of them."""
        width, wide = self.depformer_dim, self.depformer_dim_feedforward
        per_step, scale = self.depformer_weights_per_step, self.depformer_positional_scale
        return TransformerConfig(
            d_model=width,
            num_heads=self.depformer_num_heads,
            num_layers=self.depformer_num_layers or self.num_layers,
            dim_feedforward=int(self.hidden_scale * width) if wide is None else wide,
            context=None if per_step else self.dep_q,
            max_period=self.depformer_max_period or self.max_period,
            positional_embedding=self.depformer_pos_emb,
            positional_scale=self.positional_scale if scale is None else scale,
            norm=self.norm,
            gating=self.depformer_gating or self.gating,
            layer_scale=self.depformer_layer_scale,
            kv_repeat=self.depformer_kv_repeat or self.kv_repeat,
            weights_per_step=self.dep_q if per_step else 0,
            weights_per_step_schedule=(
                self.depformer_weights_per_step_schedule if per_step else None
            ),
        )

    @property
    def ttt(self) -> TttConfig:
        """Of each TTT layer."""
        return TttConfig(
            self.dim,
            self.num_heads,
            kind=self.ttt_kind,
            mini_batch=self.ttt_mini_batch,
            alpha=None if self.ttt_mode == "replace" else self.ttt_alpha,
            forget=self.ttt_forget,
        )

    @classmethod
    def from_kyutai(cls, table: Mapping[str, Any]) -> LMConfig:
        """The model that a released ``config.json`` describes; keys about other things are left.

        Raises:
            ConfigError: An unknown or missing key, a value out of range, or a part that is not
                there (conditioners, cross-attention, a second text stream).
        """
        settings = {k: v for k, v in table.items() if k not in NOT_OF_THE_MODEL}
        for key in _ABSENT_PARTS & set(settings):
            _require(not settings.pop(key), key, table[key], "is not supported; leave it out")
        for key in _WITHOUT_EFFECT:
            settings.pop(key, None)
        for key in ("delays", "depformer_weights_per_step_schedule"):
            if isinstance(settings.get(key), list):
                settings[key] = tuple(settings[key])
        if "depformer_layer_scale" not in settings:
            settings["depformer_layer_scale"] = settings.get("layer_scale")
        known = {field.name for field in fields(cls)}
        require_known(settings, known, name="configuration")
        for key in ("num_layers", "depformer_num_heads"):
            if key not in settings:
                raise ConfigError(f"configuration: {key!r} is missing.")
        return cls(**settings)


_OPTIONAL_COUNTS = (
    *("context", "depformer_dim_feedforward", "depformer_num_layers"),
    *("depformer_kv_repeat", "depformer_low_rank_embeddings"),
)
_OPTIONAL_NUMBERS = ("layer_scale", "depformer_layer_scale", "depformer_positional_scale")
_FLAGS = (
    *("norm_emb", "bias_proj", "causal"),
    *("depformer_multi_linear", "depformer_weights_per_step"),
)
_CHOICES = {
    "norm": NormName,
    "gating": Gating,
    "positional_embedding": PositionName,
    "depformer_gating": Gating,
    "depformer_norm": NormName,
    "depformer_pos_emb": PositionName,
    "ttt_mode": TttMode,
    "ttt_kind": Literal["linear", "mlp"],
}


def _whole(values: object, count: int) -> bool:
    """Whether it is so many whole numbers of zero or more."""
    if not isinstance(values, tuple) or len(values) != count:
        return False
    return all(type(value) is int and value >= 0 for value in values)


def _shown(values: object) -> object:
    """A tuple as files spell it."""
    return list(values) if isinstance(values, tuple) else values


def _require(truth: bool, key: str, value: object, rule: str) -> None:
    if not truth:
        raise ConfigError(f"[model]: {key} = {quoted(value)} {rule}.")
