"""The size and the knobs of a Lunaris MoC model; strict, and able to read the reference's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import require_counts, require_fractions, require_known

Collaboration = Literal["none", "simple", "moc"]
CheckpointPolicy = Literal["none", "ffn", "block"]
CapacityRounding = Literal["pow2", "none"]
MOST_REFERENCE_HEADS = 8  # the reference takes no more in its collaboration, whatever was asked


@dataclass(frozen=True)
class MocConfig:
    """The ``[model]`` table of a hub, or the ``model:`` table of a training file.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12  # query heads; d_model / n_heads must be even, for the rotation
    n_kv_heads: int = 12  # key and value heads; each serves n_heads / n_kv_heads query heads
    vocab_size: int = 50257
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_hidden_multiplier: float = 4.0
    max_seq_len: int = 2048  # tokens
    rope_theta: float = 10000.0
    dropout: float = 0.0  # embedding, attention, and output of attention and feed-forward
    n_experts: int = 8  # 0: one dense feed-forward
    top_k: int = 2  # experts that read a token
    aux_loss_weight: float = 1e-2  # of the balance of the experts' load
    capacity_factor: float = 1.25  # pairs an expert takes in training, over its even share
    capacity_rounding: CapacityRounding = "pow2"  # "none" makes capacity_factor mean what it says
    router_z_loss_weight: float = 1e-3
    router_noise_std: float = 0.0  # added to the router's logits in training
    drop_penalty_weight: float = 1e-3  # a constant in the loss: it has no gradient
    grad_ckpt_policy: CheckpointPolicy = "ffn"  # what is computed again instead of kept
    save_attn_weights: bool = False  # keep what the collaborating experts looked at
    collab: Collaboration = "moc"
    moc_collab_steps: int = 2  # rounds
    moc_collab_heads: int = 4
    moc_collab_dropout: float = 0.0
    moc_use_mediator: bool = True
    n_reasoning_steps: int = 1  # times an expert reads its own answer
    route_ignored: bool = True  # tokens whose target is ignored take room in experts, too

    def __post_init__(self) -> None:
        name = "[model]"
        counts = ("d_model", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
        more = ("max_seq_len", "moc_collab_heads", "n_reasoning_steps", "top_k")
        require_counts(self, (*counts, *more), name=name)
        require_fractions(self, ("dropout", "moc_collab_dropout"), name=name)
        for key in ("n_experts", "moc_collab_steps"):
            value = getattr(self, key)
            _require(type(value) is int and value >= 0, key, value, "must be 0 or more")
        for key in ("ffn_hidden_multiplier", "rope_theta"):
            _require(_number(getattr(self, key)) > 0, key, getattr(self, key), "must be above 0")
        for key in _WEIGHTS:
            _require(_number(getattr(self, key)) >= 0, key, getattr(self, key), "must be 0 or more")
        for key in ("save_attn_weights", "moc_use_mediator", "route_ignored"):
            value = getattr(self, key)
            _require(isinstance(value, bool), key, value, "must be true or false")
        for key, kind in _CHOICES.items():
            names = get_args(kind)
            _require(
                getattr(self, key) in names, key, getattr(self, key), f"must be one of {names}"
            )
        self._require_that_heads_divide()
        if self.n_experts:
            rule = f"must be at most n_experts = {self.n_experts}"
            _require(self.top_k <= self.n_experts, "top_k", self.top_k, rule)

    def _require_that_heads_divide(self) -> None:
        d_model = f"d_model = {self.d_model}"
        _divides("n_heads", self.n_heads, self.d_model, d_model)
        _divides("n_kv_heads", self.n_kv_heads, self.n_heads, f"n_heads = {self.n_heads}")
        _divides("moc_collab_heads", self.moc_collab_heads, self.d_model, d_model)
        rule = f"must leave {d_model} an even number of columns for each head"
        _require(self.head_dim % 2 == 0, "n_heads", self.n_heads, rule)

    @property
    def head_dim(self) -> int:
        """Columns of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_hidden(self) -> int:
        """Width of a feed-forward or of an expert: two thirds, as it has a gate (Shazeer 2020)."""
        wanted = int(2 * int(self.ffn_hidden_multiplier * self.d_model) / 3)
        return self.multiple_of * -(-wanted // self.multiple_of)

    def capacity(self, tokens: int) -> int:
        """How many (token, expert) pairs one expert takes of a training batch of so many tokens."""
        share = tokens * self.top_k / self.n_experts * self.capacity_factor
        target = -int(-share // 1)
        if target <= 0:
            return 0
        return target if self.capacity_rounding == "none" else 1 << (target - 1).bit_length()

    @classmethod
    def from_reference(cls, table: Mapping[str, Any]) -> MocConfig:
        """Read the reference's settings (MoC v4.5: its constructor's, or YAML's ``model:``).

        The result computes what the reference computes, where it is defined: it takes at most
        eight collaboration heads, fewer until they divide the width, and at least one round.
        Numbers that YAML 1.1 leaves as text (``1e6``) are numbers. The keys of this class work,
        too.

        Raises:
            ConfigError: An unknown key, a value of the wrong kind, or flags that contradict each
                other and on which the reference does not do what they say.
        """
        values = {key: value for key, value in table.items() if key not in _REFERENCE_ONLY}
        kinds = {field.name: str(field.type) for field in fields(cls)}
        require_known(values, [*kinds, *_REFERENCE_ONLY], name="model")
        for key, value in values.items():
            values[key] = _as_kind(key, value, kinds[key])
        if values.get("n_kv_heads", 0) is None:
            values["n_kv_heads"] = values.get("n_heads", cls.n_heads)
        if values.get("n_experts", 0) is None:
            values["n_experts"] = 0
        if not table.get("use_gradient_checkpointing", True):
            values["grad_ckpt_policy"] = "none"
        values.setdefault("collab", _collaboration(table))
        if "moc_collab_steps" in values and "collab" not in table:
            values["moc_collab_steps"] = max(1, values["moc_collab_steps"])
        if "moc_collab_heads" in values or "d_model" in values:
            width = values.get("d_model", cls.d_model)
            wanted = values.get("moc_collab_heads", cls.moc_collab_heads)
            values["moc_collab_heads"] = _reference_heads(wanted, width)
        return cls(**values)


_WEIGHTS = (
    *("aux_loss_weight", "capacity_factor", "router_z_loss_weight"),
    *("router_noise_std", "drop_penalty_weight"),
)
_CHOICES = {
    "capacity_rounding": CapacityRounding,
    "grad_ckpt_policy": CheckpointPolicy,
    "collab": Collaboration,
}
_REFERENCE_ONLY = (
    *("use_gradient_checkpointing", "use_simple_collab", "use_moc_collab"),
    "simple_collab_dropout",  # which the reference never uses
)


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"[model]: {key} = {value!r} {rule}.")


def _divides(key: str, value: int, whole: int, what: str) -> None:
    _require(whole % value == 0, key, value, f"must divide {what}")


def _number(value: object) -> float:
    """The number, or one that no rule accepts."""
    finite = type(value) in {int, float} and abs(value) < float("inf")  # type: ignore[arg-type]
    return value if finite else -1.0  # type: ignore[return-value]


def _as_kind(key: str, value: object, kind: str) -> object:
    """Numbers written as text become numbers; everything else is judged by the class itself."""
    if kind not in {"int", "float"} or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"model: {key} = {value!r} is not a number.") from None
    return int(number) if kind == "int" and number == number // 1 else number


def _collaboration(table: Mapping[str, Any]) -> Collaboration:
    simple = bool(table.get("use_simple_collab", False))
    full = bool(table.get("use_moc_collab", True))
    if simple != full:
        return "simple" if simple else "moc"
    flags = f"use_simple_collab = {simple} and use_moc_collab = {full}"
    raise ConfigError(
        f"model: {flags} contradict each other; the reference collaborates fully there.",
        hint='Say which you want: collab: "none" | "simple" | "moc".',
    )


def _reference_heads(wanted: int, width: int) -> int:
    heads = max(1, min(wanted, MOST_REFERENCE_HEADS))
    while width % heads:
        heads -= 1
    return heads
