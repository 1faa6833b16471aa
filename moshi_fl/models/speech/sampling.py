"""Choosing tokens from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.models.moc_layers import wide


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    use_sampling: bool = True  # False: the likeliest
    temp: float = 0.8  # of audio; 0: the likeliest
    temp_text: float = 0.7
    top_k: int = 250  # likeliest audio tokens to choose from; 0: all
    top_k_text: int = 25
    top_p: float = 0.0  # choose from the fewest tokens with this share in all; 0: by top_k

    def __post_init__(self) -> None:
        for key in ("temp", "temp_text", "top_k", "top_k_text", "top_p"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"sampling: {key} = {getattr(self, key)!r} must be 0 or more.")

    def text(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Text tokens (B,) for logits (B, V)."""
        return self._choose(logits, self.temp_text, self.top_k_text, generator)

    def audio(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Audio tokens (B,) for logits (B, V)."""
        return self._choose(logits, self.temp, self.top_k, generator)

    def _choose(
        self, logits: Tensor, temperature: float, k: int, generator: torch.Generator | None
    ) -> Tensor:
        if not self.use_sampling or temperature <= 0:
            return logits.argmax(-1)
        p = torch.softmax(logits.to(wide(logits.dtype)) / temperature, dim=-1)
        if self.top_p > 0:
            p, tokens = p.sort(-1, descending=True)
            p = torch.where(p.cumsum(-1) - p <= self.top_p, p, 0)
        elif 0 < k < p.shape[-1]:
            p, tokens = p.topk(k, dim=-1)
        else:
            tokens = torch.arange(p.shape[-1], device=p.device).expand_as(p)
        # As a race of exponential clocks: no cumulative sums, and nothing waits for a GPU.
        winner = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
        return tokens.gather(-1, winner[:, None])[:, 0]
