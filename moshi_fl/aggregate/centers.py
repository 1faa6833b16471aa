"""Geometric median and centered clipping: combinations of the updates, found step by step.

Both move a point until it lies in the middle of the updates. The point is always a combination of
them, so its coefficients are all there is to compute, from the inner products alone; the updates
themselves are read once more at the end. Every contribution counts the same, whatever its weight.
All sums run in the order of the ids, from 0.0 up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.aggregate.base import Update, in_order
from moshi_fl.aggregate.combine import combine
from moshi_fl.aggregate.gram import gram
from moshi_fl.aggregate.options import number, whole
from moshi_fl.codec.base import F64, Shape

Matrix = Sequence[Sequence[float]]

MOST_ITERATIONS = 10_000


@dataclass(frozen=True)
class GeometricMedian:
    """The point whose distances to all updates have the smallest sum.

    Found by the smoothed Weiszfeld algorithm (RFA: Pillutla, Kakade and Harchaoui 2019, arXiv
    1912.13445, algorithm 2), from the origin, with a fixed number of iterations. Where each
    iteration costs a round trip, the paper makes do with 3; here one costs next to nothing.

    Args:
        iterations: How many.
        smoothing: Distances below this count as this; 1e-6 in the paper's experiments.

    Raises:
        ConfigError: An option is out of range.
    """

    iterations: int = 32
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        whole("geometric-median", "iterations", self.iterations, 1, MOST_ITERATIONS)
        number("geometric-median", "smoothing", self.smoothing, 1e-12, 1e12)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The geometric median."""
        ordered = in_order(updates)
        products = gram(ordered)
        distances = products.distances()
        shares = self._shares(products.norms)
        for _ in range(self.iterations - 1):
            shares = self._shares(radii_within(distances, shares))
        yield from combine(ordered, shapes, shares)

    def _shares(self, radii: Sequence[float]) -> list[float]:
        """Of each update in the next point, which add up to one: the nearer, the more."""
        pulls = [1.0 / max(self.smoothing, radius) for radius in radii]
        total = added(pulls)
        return [pull / total for pull in pulls]


@dataclass(frozen=True)
class CenteredClipping:
    """The mean of the updates, each clipped to a ball around the last such mean.

    Karimireddy, He and Jaggi 2021 (arXiv 2012.10333). The paper starts at the aggregate of the
    round before, and needs one iteration; here every round stands on its own and starts at the
    origin, so it takes a few.

    Args:
        radius: Of the ball (``tau``); by default the median norm of the updates: the paper's 10
            and 100 belong to its own models.
        iterations: How many.

    Raises:
        ConfigError: An option is out of range.
    """

    radius: float | None = None
    iterations: int = 3

    def __post_init__(self) -> None:
        if self.radius is not None:
            number("centered-clipping", "radius", self.radius, 1e-12, 1e12)
        whole("centered-clipping", "iterations", self.iterations, 1, MOST_ITERATIONS)

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The clipped mean after the last iteration."""
        ordered = in_order(updates)
        products = gram(ordered)
        tau = median(products.norms) if self.radius is None else float(self.radius)
        shares = [0.0] * len(ordered)
        for _ in range(self.iterations):
            factors = [clip_factor(r, tau) for r in radii_around(products.dots, shares)]
            stay = 1.0 - added(factors) / len(ordered)
            shares = [
                share * stay + factor / len(ordered)
                for share, factor in zip(shares, factors, strict=True)
            ]
        yield from combine(ordered, shapes, shares)


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply a vector of this norm with, so that it has at most the limit."""
    return 1.0 if norm <= limit else limit / norm


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number, half the sum of the two."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0


def added(values: Sequence[float]) -> float:
    """The sum, one after the other from 0.0 up."""
    total = 0.0
    for value in values:
        total += value
    return total


def radii_within(distances: Matrix, shares: Sequence[float]) -> list[float]:
    """Distance of each update from the point with these shares, which add up to one.

    ``|x_i - z|^2 = sum_j s_j D_ij - 1/2 sum_jk s_j s_k D_jk``, where D are squared distances: no
    large numbers cancel, wherever the updates lie.
    """
    means = [_weighted(row, shares) for row in distances]
    spread = _weighted(means, shares)
    return [math.sqrt(max(0.0, mean - spread / 2.0)) for mean in means]


def radii_around(dots: Matrix, shares: Sequence[float]) -> list[float]:
    """Distance of each update from the point with these coefficients, whatever their sum."""
    along = [_weighted(row, shares) for row in dots]
    own = _weighted(along, shares)
    return [
        math.sqrt(max(0.0, dots[index][index] - 2.0 * part + own))
        for index, part in enumerate(along)
    ]


def _weighted(values: Sequence[float], shares: Sequence[float]) -> float:
    return added([share * value for share, value in zip(shares, values, strict=True)])
