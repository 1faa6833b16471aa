"""The size and the rule of a TTT layer; strict, and able to read the reference's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import (
    given,
    require_counts,
    require_fractions,
    require_numbers,
    settings_from,
)


@dataclass(frozen=True)
class TttConfig:
    """Size and rule of a TTT layer.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    d_model: int
    n_heads: int
    kind: Literal["linear", "mlp"] = "linear"
    mini_batch: int = 16  # tokens whose gradients are taken at the same weights
    base_lr: float | None = None  # None: 1.0 for "linear", 0.1 for "mlp"
    rope_theta: float = 10000.0
    use_gate: bool = False  # multiply the output by gelu(g_proj(x))
    share_qk: bool = False  # one projection, and a short convolution each for queries and keys
    alpha: float | None = None  # start of a gate per channel, tanh(alpha); None: no gate
    forget: float = 0.0  # share of the way back to the first weights, after each mini-batch
    checkpoint_every: int = 0  # mini-batches that training computes again; 0: keeps all

    def __post_init__(self) -> None:
        require_counts(self, ("d_model", "n_heads", "mini_batch"), name="[model] ttt")
        require_fractions(self, ("forget",), name="[model] ttt")
        rates = ("rope_theta", *given(self, "base_lr"))
        require_numbers(self, rates, name="[model] ttt", above_zero=True)
        if self.kind not in {"linear", "mlp"}:
            raise ConfigError(f'[model]: ttt kind = {self.kind!r} must be "linear" or "mlp".')
        if self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"[model]: d_model = {self.d_model} must give each of n_heads = {self.n_heads} "
                "an even number of columns."
            )

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        return self.d_model // self.n_heads

    @property
    def learning_rate(self) -> float:
        """The highest rate of a fast weight, before it is divided by ``head_dim``."""
        return self.base_lr or (1.0 if self.kind == "linear" else 0.1)

    @classmethod
    def from_reference(cls, table: Mapping[str, Any], kind: str) -> TttConfig:
        """Settings under the names of ttt-lm-pytorch.

        Raises:
            ConfigError: An unknown key or a value out of range.
        """
        names = {
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "mini_batch_size": "mini_batch",
            "ttt_base_lr": "base_lr",
        }
        renamed = {names.get(key, key): value for key, value in table.items()}
        return settings_from(cls, {**renamed, "kind": kind}, name="reference configuration")
