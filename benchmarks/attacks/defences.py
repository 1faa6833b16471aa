"""What a hub does with the files of a round: a strategy alone, or the whole default pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.attacks.gate import Gate
from benchmarks.attacks.verdicts import is_rejected
from benchmarks.attacks.world import Losses, World
from moshi_fl.aggregate import Step, Update, apply_step, get_strategy
from moshi_fl.aggregate.centers import median
from moshi_fl.aggregate.gram import gram
from moshi_fl.aggregate.robust import next_running_norm
from moshi_fl.codec.delta import Delta
from moshi_fl.hubfile import EvaluationRules
from moshi_fl.records import Scalar
from moshi_fl.weights import Weights
from moshi_hub.selection import Candidate, without_copies

MEASURED_SHARE = EvaluationRules().share

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
}
"""Strategies by the name in ``hub.toml``, with the options that suit ten contributors."""


@dataclass(frozen=True)
class Sent:
    """A contribution of the round."""

    client: int
    data: bytes


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
        self._running_norm = 0.0

    def decide(self, number: int, weights: Weights, sent: Sequence[Sent]) -> Decision:
        """Refuse, then aggregate what is left."""
        self._gate.open(number - 1, weights)
        refused = self._by_gate(sent)
        refused |= self._as_copies([entry for entry in sent if entry.client not in refused])
        if self._verdicts:
            refused |= self._by_verdict(weights, [e for e in sent if e.client not in refused])
        return Decision(self._step([e for e in sent if e.client not in refused]), refused)

    def _by_gate(self, sent: Sequence[Sent]) -> dict[int, str]:
        judged = {entry.client: self._gate.judge(entry.client, entry.data) for entry in sent}
        return {who: v.findings[0].code for who, v in judged.items() if not v.accepted}

    def _as_copies(self, sent: Sequence[Sent]) -> dict[int, str]:
        found = updates(self._world, sent)
        products = gram(found)
        candidates = [Candidate(update.id, update.id, 0) for update in found]
        _, dropped = without_copies(
            candidates, lambda one, other: products.cosine(_place(found, one), _place(found, other))
        )
        return {int(contribution, 16): finding.code for contribution, finding in dropped.items()}

    def _by_verdict(self, weights: Weights, sent: Sequence[Sent]) -> dict[int, str]:
        before = self._world.losses(weights, self._world.verdict_pool)
        return {
            entry.client: "no-gain"
            for entry in sent
            if is_rejected(before, self._losses_with(weights, entry))
        }

    def _losses_with(self, weights: Weights, entry: Sent) -> Losses:
        world = self._world
        delta = world.decoded(entry.data)
        step = ((n, d.astype(np.float64)) for n, d in delta.items())
        after = apply_step(weights, step, MEASURED_SHARE)
        return world.losses(after, world.verdict_pool)

    def _step(self, sent: Sequence[Sent]) -> Step:
        if not sent:
            return ()
        found, running = updates(self._world, sent), self._running_norm
        self._running_norm = next_running_norm(median(gram(found).norms), running)
        strategy = get_strategy("robust", {"running_norm": running})
        return strategy.aggregate(found, self._world.shapes)


def _place(found: Sequence[Update], contribution: str) -> int:
    return [update.id for update in found].index(contribution)


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
