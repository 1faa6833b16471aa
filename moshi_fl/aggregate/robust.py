"""The default pipeline: clip, mix with the nearest neighbours, trim.

Clipping bounds what one update can move, mixing (NNM: Allouah et al. 2023, arXiv 2302.01772,
"Fixing by mixing") makes honest updates alike although their data are not, and the trimmed mean
leaves out what is still at the ends. Together they tolerate a third of the updates being hostile.
Every contribution counts the same, whatever its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moshi_fl.aggregate.base import Update, blocks, carried, in_order
from moshi_fl.aggregate.centers import clip_factor, median
from moshi_fl.aggregate.combine import combine, middle_mean, rows_of, squeezed
from moshi_fl.aggregate.gram import gram
from moshi_fl.aggregate.options import number, tolerated, whole
from moshi_fl.codec.base import F64, Shape

BLOCK = 1 << 12  # weights; so many of 32 updates and of their mixtures stay in a core's own cache
DECODED = 1 << 16  # weights of all updates that are decoded at a time
VALUES = 1 << 21  # unless there are many updates
MOST = 1_000_000
LARGEST = 1e30


@dataclass(frozen=True)
class Robust:
    """Clip to the median norm, mix each update with its nearest, take the trimmed mean.

    Args:
        f: How many hostile updates to tolerate; by default ``floor((n - 1) / 3)``.
        running_norm: What norms of earlier rounds came to: a round whose median norm is more than
            twice that is clipped to twice that. 0 where there is none. The merger sets it.

    Raises:
        ConfigError: An option is out of range.
    """

    f: int | None = None
    running_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.f is not None:
            whole("robust", "f", self.f, 0, MOST)
        number("robust", "running_norm", self.running_norm, 0.0, LARGEST)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The step of the pipeline; of one or two updates, the mean of what is clipped."""
        ordered = in_order(updates)
        count = len(ordered)
        f = tolerated("robust", self.f, count, share=3)
        products = gram(ordered)
        limit = norm_limit(median(products.norms), self.running_norm)
        factors = [clip_factor(norm, limit) for norm in products.norms]
        if not f:
            yield from combine(ordered, shapes, factors, float(count))
            return
        far = outsiders(products.distances(factors), f)
        for name in carried(ordered, shapes):
            mean = np.zeros(shapes[name])
            flat = mean.reshape(-1)
            for part in blocks(math.prod(shapes[name]), min(DECODED, max(BLOCK, VALUES // count))):
                _mixed_mean(rows_of(ordered, name, part, factors), far, f, flat[part])
            yield name, mean


def norm_limit(median_norm: float, running_norm: float) -> float:
    """The norm to which updates are clipped."""
    return min(median_norm, 2.0 * running_norm) if running_norm else median_norm


def next_running_norm(median_norm: float, running_norm: float) -> float:
    """What the next round's ``running_norm`` is, after a round with these."""
    if not running_norm:
        return median_norm
    return 0.8 * running_norm + 0.2 * norm_limit(median_norm, running_norm)


def outsiders(distances: Sequence[Sequence[float]], f: int) -> list[tuple[int, ...]]:
    """For each update the ``f`` farthest others, in the order of the ids.

    Of equally far ones those with higher ids are left out first; an update is its own nearest.
    """
    found = []
    for index, row in enumerate(distances):
        others = [other for other in range(len(row)) if other != index]
        others.sort(key=lambda other: (row[other], other))
        found.append(tuple(sorted(others[len(others) - f :])))
    return found


def _mixed_mean(rows: F64, far: Sequence[tuple[int, ...]], f: int, mean: F64) -> None:
    """Trimmed mean over the mixtures of a block's rows."""
    some, where = squeezed(rows)
    means = np.zeros(some.shape[1])
    for part in blocks(len(means), BLOCK):
        middle_mean(_mixtures(some[:, part], far, f), f, means[part])
    mean[where] = means


def _mixtures(rows: F64, far: Sequence[tuple[int, ...]], f: int) -> F64:
    """Mean of each row and its nearest: all rows in order, less the farthest in order."""
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    made: dict[tuple[int, ...], F64] = {}
    mixed = np.empty(rows.shape)
    for index, left_out in enumerate(far):
        if left_out in made:
            mixed[index] = made[left_out]
            continue
        mixture = made[left_out] = mixed[index]
        mixture[:] = total
        for other in left_out:
            mixture -= rows[other]
        mixture /= float(len(rows) - f)
    return mixed
