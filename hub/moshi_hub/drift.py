"""How far a round moves the model, layer by layer; for whoever reviews it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moshi_fl.text import markdown
from moshi_fl.weights import Array, Weights

BLOCK = 1 << 20  # numbers looked at in one go


@dataclass(frozen=True)
class Drift:
    """The change of one layer.

    Attributes:
        layer: What its tensors' names begin with.
        parameters: How many numbers it holds.
        change: Euclidean norm of the change.
        before: Euclidean norm of what it was.
    """

    layer: str
    parameters: int
    change: float
    before: float

    @property
    def relative(self) -> float:
        """The change in parts of what it was; infinite where that was zero."""
        if self.before:
            return self.change / self.before
        return math.inf if self.change else 0.0


def drifts(old: Weights, new: Weights) -> list[Drift]:
    """The change of each layer, in the order in which the model's names come.

    Numbers that were appended since (rows of a vocabulary) had no value before and do not count.
    Block by block, so that it takes no memory beside the weights.
    """
    layers: dict[str, list[str]] = {}
    for name in sorted(old, key=_natural):
        layers.setdefault(layer_of(name), []).append(name)
    return [_drift(layer, [(old[n], new[n]) for n in names]) for layer, names in layers.items()]


def layer_of(name: str) -> str:
    """The group that a tensor belongs to: up to the number of its layer, else its first word.

    ``blocks.3.ffn.weight`` belongs to ``blocks.3``, ``embedding.weight`` to ``embedding``.
    """
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: numbered + 1])


def whole(layers: Sequence[Drift]) -> Drift:
    """The change of all layers together."""
    return Drift(
        "all",
        sum(entry.parameters for entry in layers),
        math.hypot(*(entry.change for entry in layers)),
        math.hypot(*(entry.before for entry in layers)),
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 comes after layer 9."""
    parts = name.split(".")
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _drift(layer: str, pairs: Sequence[tuple[Array, Array]]) -> Drift:
    change = before = 0.0
    for old, new in pairs:
        for was, now in _blocks(old, new):
            moved = now - was
            change += float(np.dot(moved, moved))
            before += float(np.dot(was, was))
    parameters = sum(old.size for old, _ in pairs)
    return Drift(layer, parameters, math.sqrt(change), math.sqrt(before))


def _blocks(old: Array, new: Array) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    was, now = old.reshape(-1), new.reshape(-1)[: old.size]
    for start in range(0, old.size, BLOCK):
        part = slice(start, start + BLOCK)
        yield was[part].astype(np.float64), now[part].astype(np.float64)


def table(layers: Sequence[Drift], rows: int) -> str:
    """A folded table of those that moved, in Markdown; empty where there are none at all."""
    if not layers:
        return ""
    moved = [entry for entry in layers if entry.change]
    what = f"Drift by layer; all weights move by {whole(layers).relative:.3%} of their norm"
    lines = [
        f"| {markdown(entry.layer)} | {entry.parameters:,} | {entry.change:.4g} "
        f"| {entry.relative:.3%} |"
        for entry in moved[:rows]
    ]
    more = [f"\n… and {len(moved) - rows} more."] if len(moved) > rows else []
    still = len(layers) - len(moved)
    more += [f"\n{still} other layers did not move."] if still else []
    return "\n".join(
        [
            f"<details><summary>{what}</summary>\n",
            "| layer | numbers | norm of the change | in parts of its norm |",
            "|---|--:|--:|--:|",
            *lines,
            *more,
            "\n</details>\n",
        ]
    )
