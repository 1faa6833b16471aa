"""Inner products of all updates of a round, exact, and so the same on every machine.

Each delta is rounded once to whole multiples of a power of two, 36 bits below its largest value.
From then on everything is integers: a sum of them is the same in whatever order, in however many
parts, with or without fused multiply-add. So this is the one place where a matrix product may be
used: a factor has at most 2^18 in magnitude, a product at most 2^36, and a sum of at most 2^17 of
them stays below 2^53, up to which float64 holds every integer (as in Ozaki et al. 2012, "Error-free
transformations of matrix multiplication").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_fl.aggregate.base import Update, blocks, in_order
from moshi_fl.aggregate.combine import squeezed
from moshi_fl.codec.base import F64

BITS = 36
"""Magnitude of the rounded values: the largest of a delta is from 2^35 to below 2^36, or it."""
LOW_BITS = 18  # the lower part of a value, as a signed number from -2^17 to 2^17
LONGEST = 1 << 16  # values multiplied at a time: exact up to 2^17
MEMORY = 1 << 21  # float64 values held at a time, whatever the number of updates
ROOM = 1 << 9  # sums below 2^53 that an int64 can take
RELEASE = 1 << 16  # values after which a file's pages are let go

Integers = NDArray[np.int64]


class Gram:
    """Inner products of some updates, in the order of their ids.

    Args:
        scales: Exponent ``k`` of each update: its values were multiplied by ``2^k`` and rounded.
        products: Exact inner products of the rounded values.
    """

    def __init__(self, scales: Sequence[int], products: Sequence[Sequence[int]]) -> None:
        self.size = len(scales)
        self.dots = [
            [math.ldexp(product, -scales[i] - scales[j]) for j, product in enumerate(row)]
            for i, row in enumerate(products)
        ]
        """Inner product of update i with update j, rounded once to float64."""

    @property
    def norms(self) -> list[float]:
        """Euclidean norm of each update."""
        return [math.sqrt(row[i]) for i, row in enumerate(self.dots)]

    def cosine(self, i: int, j: int) -> float:
        """Cosine of the angle between two updates; 0.0 where one is zero."""
        scale = math.sqrt(self.dots[i][i]) * math.sqrt(self.dots[j][j])
        return self.dots[i][j] / scale if scale else 0.0

    def distances(self, factors: Sequence[float] | None = None) -> list[list[float]]:
        """Squared distance of each pair of updates, each update times its factor."""
        by = factors or [1.0] * self.size
        a = [[by[i] * by[j] * dot for j, dot in enumerate(row)] for i, row in enumerate(self.dots)]
        return [
            [max(0.0, a[i][i] + a[j][j] - 2.0 * a[i][j]) for j in range(self.size)]
            for i in range(self.size)
        ]


def gram(updates: Sequence[Update]) -> Gram:
    """Inner products of all updates, in the order of their ids, in one pass over the files.

    Values that an update does not carry count as zero. Two short passes: the largest value of each
    update, then the products; memory does not depend on the size of the model.

    Raises:
        MoshiError: There are no updates.
    """
    ordered = in_order(updates)
    scales = [scale_of(update) for update in ordered]
    total = _Exact(2 * len(ordered))
    for name, size in _sizes(ordered).items():
        for part in blocks(size, _block_length(len(ordered))):
            total.add(_parts(ordered, scales, name, part))
            if part.stop == size or not part.stop % RELEASE:
                _release(ordered)
    return Gram(scales, _joined(total.value(), len(ordered)))


def norms(updates: Sequence[Update]) -> list[float]:
    """Euclidean norm of each update, in the order of the ids; the same as ``gram(…).norms``."""
    return [gram([update]).norms[0] for update in in_order(updates)]


def scale_of(update: Update) -> int:
    """The exponent that brings an update's largest magnitude to 2^35 or above, below 2^36."""
    largest = update.delta.largest()
    return BITS - math.frexp(largest)[1] if largest else 0


def _sizes(updates: Sequence[Update]) -> dict[str, int]:
    """Values of each tensor that any update carries: what the longest of them has."""
    sizes: dict[str, int] = {}
    for update in updates:
        for name, shape in update.delta.shapes.items():
            sizes[name] = max(sizes.get(name, 0), math.prod(shape))
    return sizes


def _block_length(count: int) -> int:
    fitting = max(1 << 8, MEMORY // (2 * count))
    return min(LONGEST, 1 << fitting.bit_length() - 1)


def _parts(updates: Sequence[Update], scales: Sequence[int], name: str, part: slice) -> F64:
    """Upper and lower parts of a block's rounded values, shape (2 * updates, values not zero)."""
    rows = np.zeros((len(updates), part.stop - part.start))
    for row, update, scale in zip(rows, updates, scales, strict=True):
        update.delta.add(name, part.start, row, 1.0)
        np.multiply(row, 2.0**scale, out=row)  # powers of two: exact
        np.rint(row, out=row)
    rows, _ = squeezed(rows)
    parts = np.empty((2, *rows.shape))
    for row, high, low in zip(rows, *parts, strict=True):
        np.multiply(row, 2.0**-LOW_BITS, out=high)
        np.rint(high, out=high)
        np.multiply(high, 2.0**LOW_BITS, out=low)
        np.subtract(row, low, out=low)
    return parts.reshape(2 * len(rows), rows.shape[1])


def _release(updates: Sequence[Update]) -> None:
    for update in updates:
        update.delta.release()


class _Exact:
    """A sum of matrices of integers, each given as float64 below 2^53."""

    def __init__(self, size: int) -> None:
        self._small: Integers = np.zeros((size, size), np.int64)
        self._count = 0
        self._large: NDArray[Any] = np.zeros((size, size), object)

    def add(self, parts: F64) -> None:
        """Add the inner products of the rows."""
        self._small += (parts @ parts.T).astype(np.int64)
        self._count += 1
        if self._count == ROOM:
            self._flush()

    def _flush(self) -> None:
        self._large = self._large + self._small.astype(object)
        self._small[:] = 0
        self._count = 0

    def value(self) -> NDArray[Any]:
        """The sum, as Python's integers."""
        self._flush()
        return self._large


def _joined(products: NDArray[Any], count: int) -> list[list[int]]:
    """Products of whole values from those of their upper and lower parts."""
    high, low = slice(count), slice(count, None)
    mixed = products[high, low] + products[low, high]
    joined = (
        products[high, high] * (1 << 2 * LOW_BITS) + mixed * (1 << LOW_BITS) + products[low, low]
    )
    whole: list[list[int]] = joined.tolist()
    return whole
