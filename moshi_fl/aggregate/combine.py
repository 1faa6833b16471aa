"""A step that is a combination of the updates, or a robust mean of some rows made from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moshi_fl.aggregate.base import Update, blocks, carried
from moshi_fl.codec.base import F64, Shape

Integers = NDArray[np.int64]

BLOCK = 1 << 16  # weights; sums and terms of this many stay in a core's own cache


def combine(
    updates: Sequence[Update],
    shapes: Mapping[str, Shape],
    factors: Sequence[float],
    divisor: float = 1.0,
) -> Iterator[tuple[str, F64]]:
    """``sum(factor * delta) / divisor``, tensor by tensor, added in the order of the updates.

    One pass over the files; the memory needed does not depend on the number of updates. A factor
    of zero adds nothing.
    """
    for name in carried(updates, shapes):
        total = np.zeros(shapes[name])
        flat = total.reshape(-1)
        for part in blocks(math.prod(shapes[name]), BLOCK):
            for update, factor in zip(updates, factors, strict=True):
                if factor:
                    update.delta.add(name, part.start, flat[part], factor)
                    update.delta.release()
            if divisor != 1.0:
                flat[part] /= divisor
        yield name, total


def rows_of(
    updates: Sequence[Update], name: str, part: slice, factors: Sequence[float] | None = None
) -> F64:
    """Values of all updates in a block, each times its factor; shape (updates, weights).

    Zeros are positive.
    """
    rows = np.zeros((len(updates), part.stop - part.start))
    for row, update, factor in zip(rows, updates, factors or [1.0] * len(updates), strict=True):
        update.delta.add(name, part.start, row, factor)
        update.delta.release()
    return rows


def squeezed(rows: F64) -> tuple[F64, Integers | slice]:
    """The columns of a block in which any update has a value, and where they are.

    Sparse updates leave most of a block untouched. Whatever is computed of a column of zeros is
    zero, so what is worked out here for the rest is the same to the last bit.
    """
    used = np.flatnonzero((rows != 0).any(axis=0))
    if 2 * len(used) > rows.shape[1]:
        return rows, slice(None)
    return rows[:, used], used


def middle_mean(rows: F64, drop: int, mean: F64) -> None:
    """Add to ``mean`` (zeros) the mean of each column without ``drop`` values at either end.

    What is left is added from the smallest up. ``rows`` is sorted in place.
    """
    rows.sort(axis=0)
    middle = rows[drop : len(rows) - drop]
    for row in middle:
        mean += row
    mean /= float(len(middle))
