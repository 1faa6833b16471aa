"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629, algorithm 1), on deltas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from moshi_fl.aggregate.base import Update, in_order
from moshi_fl.aggregate.combine import combine
from moshi_fl.codec.base import F64, Shape


class FedAvg:
    """Mean of the deltas, weighted by the updates' weights."""

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """``sum(weight * delta) / sum(weight)``, added in the order of the ids.

        The weights are divided by their greatest common divisor first: where all followed the
        same recipe they become 1, and scaling costs nothing.
        """
        ordered = in_order(updates)
        common = math.gcd(*(update.weight for update in ordered))
        weights = [update.weight // common for update in ordered]
        yield from combine(
            ordered, shapes, [float(weight) for weight in weights], float(sum(weights))
        )
