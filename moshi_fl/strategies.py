"""Aggregation strategies by name: our own, and Flower's, which are imported only when named."""

from __future__ import annotations

from collections.abc import Mapping

from moshi_fl.aggregate import Strategy, get_strategy
from moshi_fl.records import Scalar


def find_strategy(name: str, options: Mapping[str, Scalar]) -> Strategy:
    """A native strategy such as ``fedavg``, or Flower's own such as ``flower:FedMedian``.

    Raises:
        ConfigError: Unknown strategy or option, or one that cannot work on a hub.
    """
    if ":" not in name:
        return get_strategy(name, options)
    from moshi_fl.flower import flower_strategy

    return flower_strategy(name, options)
