"""Aggregation in delta space: the deltas of a round become one step, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_fl.aggregate.base import Step, Strategy, Update, apply_step
from moshi_fl.aggregate.centers import CenteredClipping, GeometricMedian
from moshi_fl.aggregate.fedavg import FedAvg
from moshi_fl.aggregate.krum import Krum, MultiKrum
from moshi_fl.aggregate.robust import Robust
from moshi_fl.aggregate.trimmed import Median, TrimmedMean
from moshi_fl.errors import ConfigError
from moshi_fl.records import Scalar

__all__ = ["STRATEGIES", "Step", "Strategy", "Update", "apply_step", "get_strategy"]

STRATEGIES: dict[str, tuple[type[Any], frozenset[str]]] = {
    "fedavg": (FedAvg, frozenset()),
    "median": (Median, frozenset()),
    "trimmed-mean": (TrimmedMean, frozenset({"trim"})),
    "geometric-median": (GeometricMedian, frozenset({"iterations", "smoothing"})),
    "centered-clipping": (CenteredClipping, frozenset({"iterations", "radius"})),
    "krum": (Krum, frozenset({"f"})),
    "multi-krum": (MultiKrum, frozenset({"f", "keep"})),
    "robust": (Robust, frozenset({"f", "running_norm"})),
}
"""Strategy name to its class and the options it takes."""


def get_strategy(name: str, options: Mapping[str, Scalar]) -> Strategy:
    """The strategy that a ``hub.toml`` or a record names.

    Raises:
        ConfigError: No such strategy, an option it does not take, or a value out of range.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}.")
    kind, known = STRATEGIES[name]
    unknown = sorted(set(options) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"strategy {name}: unknown option {unknown[0]!r}; it takes: {takes}.")
    strategy: Strategy = kind(**options)
    return strategy
