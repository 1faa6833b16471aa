"""Choosing the next token and cutting text at stop strings; knows no model."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError


class Sampler:
    """Draws token ids from logits; equal seeds draw equally.

    Args:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Only this many most likely tokens stay in play.
        top_p: Only the smallest set of tokens with this much probability stays in play
            (nucleus sampling, Holtzman et al. 2020).
        seed: None draws a fresh one.

    Raises:
        ConfigError: A setting out of range; names it.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature = {temperature} must be 0 or more.")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k = {top_k} must be at least 1.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"top_p = {top_p} must be above 0 and at most 1.")
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._random = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)

    def pick(self, logits: Tensor) -> int:
        """One token id, given the logits (V,) of a position."""
        if self._temperature == 0:
            return int(logits.argmax())
        logits = logits.float().cpu()
        # Subtracting the maximum first keeps a tiny temperature from overflowing.
        logits = (logits - logits.max()) / self._temperature
        if self._top_k is not None and self._top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self._top_k).values[-1], -torch.inf)
        probabilities = logits.softmax(-1)
        if self._top_p is not None:
            probabilities = _nucleus(probabilities, self._top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
    return probabilities.index_fill(0, tokens[outside], 0.0)


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first stop string, which may lie across pieces.

    Text that could be the start of a stop string is held back until it is clear that it is not.
    """
    stop = [text for text in stop if text]
    held = ""
    for piece in pieces:
        held += piece
        cuts = [position for text in stop if (position := held.find(text)) >= 0]
        if cuts:
            held = held[: min(cuts)]
            break
        keep = _unclear(held, stop)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _unclear(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
