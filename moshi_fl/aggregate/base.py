"""The interface of aggregation strategies, and the arithmetic they share.

Everything here is defined to the last bit: float64, contributions in the order of their ids,
elementwise numpy operations only. No reduction such as ``numpy.sum`` or a matrix product is used,
because the order in which they add depends on the machine; the one exception is
``moshi_fl.aggregate.gram``, where everything is integers and the order makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_fl.codec.base import F32, F64, Shape
from moshi_fl.codec.delta import Delta, is_prefix
from moshi_fl.errors import MoshiError
from moshi_fl.weights import Array, Weights

Step = Iterable[tuple[str, NDArray[np.float64]]]
"""Change per tensor, in canonical order; a tensor that is left out does not change."""


@dataclass(frozen=True)
class Update:
    """One accepted contribution: its id, its integer weight, its delta."""

    id: str
    weight: int
    delta: Delta


class Strategy(Protocol):
    """Turns the deltas of a round into one step."""

    def aggregate(
        self, updates: Sequence[Update], shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, F64]]:
        """The step, tensor by tensor in canonical order, in the shapes of the base.

        Updates may come in any order. Tensors that no update carries are left out; an update that
        lacks a tensor, or rows by which it has grown since, counts as zero there.

        Raises:
            MoshiError: There is nothing to aggregate.
        """
        ...


def in_order(updates: Sequence[Update]) -> list[Update]:
    """The updates by id, which is the order they are added in.

    Raises:
        MoshiError: There are none.
        ValueError: An id appears twice or a weight is not positive.
    """
    if not updates:
        raise MoshiError("there are no contributions to aggregate.")
    ordered = sorted(updates, key=lambda update: update.id)
    if len({update.id for update in ordered}) != len(ordered):
        raise ValueError("a contribution appears twice")
    if min(update.weight for update in ordered) < 1:
        raise ValueError("a weight is not positive")
    return ordered


def carried(updates: Sequence[Update], shapes: Mapping[str, Shape]) -> list[str]:
    """Names of the tensors that any update carries, in canonical order.

    Raises:
        ValueError: A delta's tensor is not a flat prefix of the base's.
    """
    names: set[str] = set()
    for update in updates:
        for name, shape in update.delta.shapes.items():
            if name not in shapes or not is_prefix(shape, shapes[name]):
                raise ValueError(f"{update.id}: {name!r} of shape {shape} is not in the base")
            names.add(name)
    return sorted(names)


def blocks(size: int, length: int) -> Iterator[slice]:
    """Consecutive slices of at most this length."""
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


def apply_step(weights: Weights, step: Step, server_learning_rate: float = 1.0) -> dict[str, Array]:
    """``W' = float32(float64(W) + server_learning_rate * step)``, rounded once.

    Raises:
        MoshiError: A new weight is not finite.
    """
    new = dict(weights)
    for name, change in step:
        new[name] = _stepped(name, weights[name], change, server_learning_rate)
    return new


def _stepped(name: str, old: Array, change: F64, rate: float) -> F32:
    new = np.empty(old.shape, np.float32)
    flat, before, delta = new.reshape(-1), old.reshape(-1), change.reshape(-1)
    with np.errstate(over="ignore"):
        for part in blocks(math.prod(old.shape), 1 << 16):
            term = delta[part] * rate
            term += before[part]
            flat[part] = term
    if not np.isfinite(new).all():
        raise MoshiError(
            f"the step would make a weight of {name!r} infinite.",
            hint="lower server_learning_rate or max_norm in hub.toml.",
        )
    return new
