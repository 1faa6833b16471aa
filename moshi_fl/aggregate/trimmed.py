"""Coordinate-wise robust strategies (Yin et al. 2018, arXiv 1803.01498).

Every contribution counts the same, whatever its weight: weights are what an attacker would inflate
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moshi_fl.aggregate.base import Update, blocks, carried, in_order
from moshi_fl.aggregate.combine import middle_mean, rows_of, squeezed
from moshi_fl.aggregate.options import number
from moshi_fl.codec.base import F64, Shape

VALUES = 1 << 20  # values of all updates that are sorted at a time


class Median:
    """The middle value of each weight; of an even number, the mean of the two."""

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The coordinate-wise median."""
        yield from _trimmed(updates, shapes, drop=(len(updates) - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each weight without the largest and the smallest values.

    Args:
        trim: Share of the updates dropped at either end, rounded down to whole updates.

    Raises:
        ConfigError: ``trim`` is not a number from 0 to below 0.5.
    """

    trim: float = 0.1

    def __post_init__(self) -> None:
        number("trimmed-mean", "trim", self.trim, 0.0, 0.5, below=True)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The coordinate-wise mean of the values in the middle."""
        yield from _trimmed(updates, shapes, drop=int(self.trim * len(updates)))


def _trimmed(
    updates: Sequence[Update], shapes: Mapping[str, Shape], drop: int
) -> Iterator[tuple[str, F64]]:
    ordered = in_order(updates)
    for name in carried(ordered, shapes):
        mean = np.zeros(shapes[name])
        flat = mean.reshape(-1)
        for part in blocks(math.prod(shapes[name]), max(1024, VALUES // len(ordered))):
            rows, where = squeezed(rows_of(ordered, name, part))
            middle = np.zeros(rows.shape[1])
            middle_mean(rows, drop, middle)
            flat[part][where] = middle
        yield name, mean
