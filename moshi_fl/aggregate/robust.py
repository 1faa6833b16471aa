"""Coordinate-wise robust strategies (Yin et al. 2018, arXiv 1803.01498).

Every contribution counts the same, whatever number of examples it claims: weights are what an
attacker would inflate first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moshi_fl.aggregate.base import Update, blocks, carried, in_order
from moshi_fl.codec.base import F64, Shape
from moshi_fl.errors import ConfigError

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
        if type(self.trim) not in (int, float) or not 0 <= self.trim < 0.5:
            raise ConfigError(
                f"strategy trimmed-mean: trim must be from 0 to below 0.5, not {self.trim!r}."
            )

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
            _middle_mean(_values(ordered, name, part), drop, flat[part])
        yield name, mean


def _values(updates: Sequence[Update], name: str, part: slice) -> F64:
    """Values of all updates in a block, shape (updates, weights); zeros are positive."""
    values = np.zeros((len(updates), part.stop - part.start))
    for row, update in zip(values, updates, strict=True):
        update.delta.add(name, part.start, row, 1.0)
        update.delta.release()
    return values


def _middle_mean(values: F64, drop: int, mean: F64) -> None:
    """Mean over the sorted updates without ``drop`` at either end, added from the smallest up."""
    values.sort(axis=0)
    middle = values[drop : len(values) - drop]
    for row in middle:
        mean += row
    mean /= float(len(middle))
