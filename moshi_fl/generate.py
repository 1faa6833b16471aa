"""Choosing the next token and cutting text at stop strings; knows no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moshi_fl.errors import ConfigError, MoshiError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. ``temperature=0`` means the most likely one."""

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    min_p: float | None = None
    repetition_penalty: float = 1.0
    int8: bool = False  # weights in eight bits: fewer bytes to read for each token


Scores = NDArray[np.float32]

PENALISED = 256  # tokens back to which a repetition counts


class Sampler:
    """Draws token ids from logits; equal seeds draw equally.

    The settings work in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Only this many most likely tokens stay in play.
        top_p: Only the smallest set of tokens with this much probability stays in play
            (nucleus sampling, Holtzman et al. 2020).
        min_p: Only tokens with at least this share of the likeliest one's probability stay in
            play (Nguyen et al. 2024).
        repetition_penalty: Divides the logits of the last 256 tokens where they are positive, and
            multiplies them where not (Keskar et al. 2019); 1 does nothing.
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
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        for holds, name, value, rule in (
            (0 <= temperature < math.inf, "temperature", temperature, "0 or more"),
            (top_k is None or top_k >= 1, "top_k", top_k, "at least 1"),
            (top_p is None or 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1"),
            (min_p is None or 0 <= min_p <= 1, "min_p", min_p, "from 0 to 1"),
            (
                0 < repetition_penalty < math.inf,
                *("repetition_penalty", repetition_penalty, "above 0"),
            ),
        ):
            if not holds:
                raise ConfigError(f"{name} = {value} must be {rule}.")
        self._temperature, self._penalty = temperature, repetition_penalty
        self._top_k, self._top_p, self._min_p = top_k, top_p, min_p
        self._random = np.random.default_rng(seed)

    @classmethod
    def of(cls, sampling: Sampling) -> Sampler:
        """The sampler that these settings ask for."""
        return cls(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
        )

    def pick(self, logits: Tensor, before: Sequence[int] = ()) -> int:
        """One token id, given the logits (V,) of a position and the tokens before it.

        Raises:
            MoshiError: The logits are not finite.
        """
        scores = self._penalised(logits.detach().float().cpu().numpy(), before)
        best = float(scores.max())
        if not math.isfinite(best):
            raise MoshiError(
                f"the model's logits are not finite (the largest is {best}).",
                hint="Its weights may be damaged; try another round: --round N",
            )
        return int(scores.argmax()) if self._temperature == 0 else self._draw(scores, best)

    def _draw(self, scores: Scores, best: float) -> int:
        temperature = min(max(self._temperature, 1e-30), 1e30)  # within float32
        # Subtracting the maximum first keeps a tiny temperature from overflowing upwards.
        with np.errstate(over="ignore"):
            likelihood = np.exp((scores - best) / temperature)
        if self._top_k is not None and self._top_k < len(likelihood):
            least = np.partition(likelihood, -self._top_k)[-self._top_k]
            likelihood[likelihood < least] = 0
        if self._top_p is not None and self._top_p < 1:
            likelihood = _nucleus(likelihood, self._top_p)
        if self._min_p:
            likelihood[likelihood < self._min_p] = 0  # the likeliest one has 1
        mass = likelihood.cumsum(dtype=np.float64)
        return int(mass.searchsorted(self._random.random() * mass[-1], side="right"))

    def _penalised(self, scores: Scores, before: Sequence[int]) -> Scores:
        if self._penalty == 1 or not before:
            return scores
        seen = np.array(before[-PENALISED:])
        old = scores[seen]
        scores = scores.copy()
        scores[seen] = np.where(old > 0, old / self._penalty, old * self._penalty)
        return scores


def _nucleus(likelihood: Scores, top_p: float) -> Scores:
    total = likelihood.sum(dtype=np.float64)
    # All tokens below the bound together have less than 1 - top_p: no need to sort them.
    likely = np.flatnonzero(likelihood > 0.5 * (1 - top_p) * total / len(likelihood))
    order = likely[np.argsort(-likelihood[likely], kind="stable")]
    above = likelihood[order].cumsum(dtype=np.float64) - likelihood[order]
    kept = order[above < top_p * total]  # the likeliest token always is
    nucleus = np.zeros_like(likelihood)
    nucleus[kept] = likelihood[kept]
    return nucleus


class TextDecoder(Protocol):
    """Turns tokens into text one at a time, holding back what is not complete."""

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        ...

    def finish(self) -> str:
        """What is left over."""
        ...


def pieces_of(decoder: TextDecoder, tokens: Iterable[int]) -> Iterator[str]:
    """The text of these tokens, piece by piece as it becomes certain."""
    for token in tokens:
        if piece := decoder.feed(token):
            yield piece
    if piece := decoder.finish():
        yield piece


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
