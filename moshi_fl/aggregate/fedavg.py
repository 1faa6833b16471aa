"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629, algorithm 1), on deltas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moshi_fl.aggregate.base import Update, blocks, carried, in_order
from moshi_fl.codec.base import F64, Shape

BLOCK = 1 << 16  # weights; sums and terms of this many stay in a core's own cache


class FedAvg:
    """Mean of the deltas, weighted by the updates' weights.

    One pass over the files, block by block, with all updates added to a block before the next: the
    memory needed does not depend on their number.
    """

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """``sum(weight * delta) / sum(weight)``, added in the order of the ids.

        The weights are divided by their greatest common divisor first: where all followed the
        same recipe they become 1, and scaling costs nothing.
        """
        ordered = _reduced(in_order(updates))
        total = float(sum(update.weight for update in ordered))
        for name in carried(ordered, shapes):
            mean = np.zeros(shapes[name])
            flat = mean.reshape(-1)
            for part in blocks(math.prod(shapes[name]), BLOCK):
                _add_all(ordered, name, part.start, flat[part])
                flat[part] /= total
            yield name, mean


def _reduced(updates: Sequence[Update]) -> list[Update]:
    common = math.gcd(*(update.weight for update in updates))
    return [replace(update, weight=update.weight // common) for update in updates]


def _add_all(updates: Sequence[Update], name: str, start: int, block: F64) -> None:
    for update in updates:
        update.delta.add(name, start, block, float(update.weight))
        update.delta.release()
