"""The ``[model]`` table of a hub of the ``speech`` family: strict, with Kyutai's names.

The language model's keys are those of a released ``config.json``; what is beside it has keys of its
own, and ``mimi`` is a table of what differs from the codec that Kyutai released.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import require_counts, require_known, settings_from
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mimi_config import MimiConfig

T = TypeVar("T")

MAX_TEXT_CARD = (1 << 15) - 1  # tokens are kept as int16
_LISTS = ("delays", "depformer_weights_per_step_schedule", "ratios")  # tuples in Python


@dataclass(frozen=True)
class SpeechConfig:
    """A codec, a language model over its codes, and how the latter learns.

    Raises:
        ConfigError: A value out of range, or parts that do not fit together.
    """

    lm: LMConfig
    mimi: MimiConfig = field(default_factory=MimiConfig)
    lora_rank: int = 0  # of an adapter on each linear layer; 0: none
    lora_scaling: float = 2.0  # what adapters are multiplied by
    lora_embeddings: bool = False  # embeddings learn along with the adapters
    segment_frames: int = 125  # of a training window
    first_codebook_weight: float = 1.0  # of the semantic codebook in the loss; others: 1
    text_padding_weight: float = 0.5  # of text padding in the loss; other text: 1

    def __post_init__(self) -> None:
        require_counts(self, ("segment_frames",), name="[model]")
        if type(self.lora_rank) is not int or self.lora_rank < 0:
            raise ConfigError(f"[model]: lora_rank = {self.lora_rank!r} must be 0 or more.")
        if not isinstance(self.lora_embeddings, bool):
            raise ConfigError("[model]: lora_embeddings must be true or false.")
        for key in ("lora_scaling", "first_codebook_weight", "text_padding_weight"):
            value = getattr(self, key)
            if type(value) not in {int, float} or not 0 <= value < 1e6:
                raise ConfigError(f"[model]: {key} = {value!r} must be a number of 0 or more.")
        self._require_that_parts_fit()

    def _require_that_parts_fit(self) -> None:
        lm, codec = self.lm, self.mimi.quantizer
        if not 1 <= lm.dep_q <= codec.n_q:
            raise ConfigError(
                f"[model]: dep_q = {lm.dep_q} must be from 1 to the codec's {codec.n_q} codebooks."
            )
        if lm.n_q != 2 * lm.dep_q:
            raise ConfigError(
                f"[model]: n_q = {lm.n_q} must be twice dep_q = {lm.dep_q}: "
                "two speakers, of which one is predicted."
            )
        if lm.card != codec.bins:
            raise ConfigError(f"[model]: card = {lm.card} must be the codec's {codec.bins} bins.")
        if lm.text_card > MAX_TEXT_CARD:
            raise ConfigError(
                f"[model]: text_card = {lm.text_card} must be at most {MAX_TEXT_CARD}."
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SpeechConfig:
        """Settings from a ``[model]`` table.

        Raises:
            ConfigError: A key is unknown, missing or out of range; names it.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"lm", "mimi"}
        mine = {key: value for key, value in table.items() if key in own}
        rest = {key: value for key, value in table.items() if key not in {*own, "mimi"}}
        known = {f.name for f in dataclasses.fields(LMConfig)} | own | {"mimi"}
        require_known(rest, known, name="[model]")
        lm = settings_from(LMConfig, _with_tuples(rest), name="[model]")
        return cls(lm, _codec(table.get("mimi", {})), **mine)

    def to_table(self) -> dict[str, Any]:
        """A ``[model]`` table that gives these settings; what is as by default is left out."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        table = _differing(self.lm) | {k: v for k, v in own.items() if v != defaults[k]}
        codec = codec_table(self.mimi)
        return table | ({"mimi": codec} if codec else {})


def codec_table(config: MimiConfig) -> dict[str, Any]:
    """What ``mimi`` in a ``[model]`` table says of a codec."""
    return _differences(config, MimiConfig())


def _codec(table: Any) -> MimiConfig:
    """The released codec, but for what a table says."""
    if not isinstance(table, Mapping):
        raise ConfigError("[model]: mimi must be a table, such as { sample_rate = 24000 }.")
    found: MimiConfig = _replaced(MimiConfig(), table, "[model] mimi")
    return found


def _replaced(default: T, table: Mapping[str, Any], name: str) -> T:
    values = dict(_with_tuples(table))
    for key, value in values.items():
        part = getattr(default, key, None)
        if dataclasses.is_dataclass(part) and isinstance(value, Mapping):
            values[key] = _replaced(part, value, f"{name}.{key}")
        elif dataclasses.is_dataclass(part):
            raise ConfigError(f"{name}: {key} must be a table.")
    return settings_from(type(default), {**vars(default), **values}, name=name)


def _with_tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if key in _LISTS and isinstance(value, list) else value
        for key, value in table.items()
    }


def _differing(config: LMConfig) -> dict[str, Any]:
    return {
        f.name: _plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if f.default is dataclasses.MISSING or getattr(config, f.name) != f.default
    }


def _differences(config: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, usual = getattr(config, f.name), getattr(default, f.name)
        if value == usual:
            continue
        found[f.name] = (
            _differences(value, usual) if dataclasses.is_dataclass(value) else _plain(value)
        )
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
