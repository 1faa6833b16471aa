"""What a hub does with the files of a round: a strategy alone, or the whole default pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.attacks.gate import Gate
from benchmarks.attacks.verdicts import rejected
from benchmarks.attacks.world import World
from moshi_fl.aggregate import STRATEGIES, Step, Update, apply_step, get_strategy
from moshi_fl.codec.delta import Delta
from moshi_fl.records import Scalar
from moshi_fl.weights import Weights

TOLERATED = 3
"""What strategies are told to tolerate of ten: floor((n - 1) / 3), as the default does."""

ALONE: dict[str, Mapping[str, Scalar]] = {
    "fedavg": {},
    "median": {},
    "trimmed-mean": {"trim": TOLERATED / 10},
    "geometric-median": {},
    "centered-clipping": {},
    "krum": {"f": TOLERATED},
    "multi-krum": {"f": TOLERATED},
    "robust": {"f": TOLERATED},
}
"""Strategies by the name in ``hub.toml``, with the options that suit ten contributors."""


@dataclass(frozen=True)
class Sent:
    """A contribution of the round."""

    client: int
    data: bytes
    base: int | None = None


@dataclass
class Decision:
    """What became of a round: its step, and who was refused for what (client to reason)."""

    step: Step
    refused: dict[int, str] = field(default_factory=dict)


class Defence(Protocol):
    """Turns what was sent into a step, round after round."""

    def decide(self, number: int, weights: Weights, sent: Sequence[Sent]) -> Decision:
        """Round ``number`` (from 1), on these weights."""
        ...


class Alone:
    """A strategy without gate, selection and verdicts: equal weights, nothing is looked at."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._strategy = world, get_strategy(name, ALONE[name])

    def decide(self, number: int, weights: Weights, sent: Sequence[Sent]) -> Decision:
        """Aggregate everything."""
        return Decision(self._strategy.aggregate(updates(self._world, sent), self._world.shapes))


class Default:
    """The default: gate, selection, verdicts (unless left out), then ``robust``."""

    def __init__(self, world: World, folder: Path, *, verdicts: bool = True) -> None:
        self._world, self._verdicts = world, verdicts
        self._gate = Gate(world, folder)

    def decide(self, number: int, weights: Weights, sent: Sequence[Sent]) -> Decision:
        """Refuse, then aggregate what is left."""
        self._gate.open(number - 1, weights)
        refused: dict[int, str] = {}
        for entry in sent:
            verdict = self._gate.judge(entry.client, entry.data, entry.base)
            if not verdict.accepted:
                refused[entry.client] = verdict.findings[0].code
        kept = [entry for entry in sent if entry.client not in refused]
        if self._verdicts:
            for entry in kept:
                if rejected(self.gains(weights, entry)):
                    refused[entry.client] = "rejected"
            kept = [entry for entry in kept if entry.client not in refused]
        if not kept:
            return Decision((), refused)
        strategy = get_strategy("robust", {})
        return Decision(strategy.aggregate(updates(self._world, kept), self._world.shapes), refused)

    def gains(self, weights: Weights, entry: Sent) -> np.ndarray:
        """How much lower the loss of each of the hub's sequences is with the delta."""
        world = self._world
        delta = world.decoded(entry.data)
        after = apply_step(weights, ((n, d.astype(np.float64)) for n, d in delta.items()))
        return world.losses(weights, world.verdict_pool) - world.losses(after, world.verdict_pool)


def updates(world: World, sent: Iterable[Sent]) -> list[Update]:
    """What strategies take; the ids are in the order of the contributors."""
    return [
        Update(
            f"{entry.client:032x}",
            1,
            Delta.parse(entry.data, world.shapes, world.codec, f"contributor {entry.client}"),
        )
        for entry in sent
    ]


def known() -> list[str]:
    """The strategies of ``ALONE`` that there are."""
    return [name for name in ALONE if name in STRATEGIES]
