"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine learning with adversaries").

An update is scored by its squared distances to those nearest to it: a minority that is far from the
honest ones scores badly, and one that is near does little harm. Distances come from the exact inner
products of the deltas, so they do not suffer from the cancellation that distances of whole weights
suffer from. Every contribution counts the same, whatever its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.aggregate.base import Update, in_order
from moshi_fl.aggregate.combine import combine
from moshi_fl.aggregate.gram import gram
from moshi_fl.aggregate.options import tolerated, whole
from moshi_fl.codec.base import F64, Shape

MOST = 1_000_000


@dataclass(frozen=True)
class Krum:
    """The update with the best score.

    Args:
        f: How many hostile updates to tolerate; by default ``floor((n - 1) / 3)``. A score is the
            sum over the ``n - f - 1`` nearest others, one more than in the paper, as in Allouah et
            al. 2023 (arXiv 2302.01772).

    Raises:
        ConfigError: ``f`` is not a natural number.
    """

    f: int | None = None

    def __post_init__(self) -> None:
        if self.f is not None:
            whole("krum", "f", self.f, 0, MOST)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The chosen delta."""
        ordered = in_order(updates)
        f = tolerated("krum", self.f, len(ordered))
        best = ranking(gram(ordered).distances(), f)[0]
        yield from combine(ordered, shapes, _only({best}, len(ordered)))


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the updates with the best scores.

    Args:
        f: As in ``Krum``.
        keep: How many are averaged; by default ``n - f``, as in Allouah et al. 2023. All, when
            there are fewer.

    Raises:
        ConfigError: ``f`` is not a natural number, or ``keep`` not a positive one.
    """

    f: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.f is not None:
            whole("multi-krum", "f", self.f, 0, MOST)
        if self.keep is not None:
            whole("multi-krum", "keep", self.keep, 1, MOST)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The mean of the chosen deltas."""
        ordered = in_order(updates)
        count = len(ordered)
        f = tolerated("multi-krum", self.f, count)
        kept = min(count, self.keep or count - f)
        chosen = set(ranking(gram(ordered).distances(), f)[:kept])
        yield from combine(ordered, shapes, _only(chosen, count), float(kept))


def ranking(distances: Sequence[Sequence[float]], f: int) -> list[int]:
    """Indices of the updates from the best score to the worst; of equals, the lower id first.

    Args:
        distances: Squared distance of each pair, in the order of the ids.
        f: How many hostile updates to tolerate.
    """
    scores = [_score(index, row, len(distances) - f - 1) for index, row in enumerate(distances)]
    return sorted(range(len(scores)), key=lambda index: (scores[index], index))


def _score(index: int, row: Sequence[float], nearest: int) -> float:
    """Sum over the nearest others, from the smallest up."""
    total = 0.0
    for distance in sorted([*row[:index], *row[index + 1 :]])[:nearest]:
        total += distance
    return total


def _only(chosen: set[int], count: int) -> list[float]:
    return [1.0 if index in chosen else 0.0 for index in range(count)]
