"""Rounds of a federation under attack: honest contributors train, hostile ones send what they like.

The same federation with ``hostile=0`` is the clean run. Attackers take the places of the last
contributors, whose data then takes no honest part; ``absent`` leaves those places empty instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.attacks.defences import Defence, Sent
from benchmarks.attacks.threats import Scene, Threat, success
from benchmarks.attacks.world import World
from moshi_fl.aggregate import apply_step
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.errors import MoshiError


@dataclass
class Run:
    """What came of a federation."""

    loss: float = float("nan")
    """Held-out loss at the end; NaN when no round could be made."""
    backdoor: float | None = None
    """Share of the payload that the model writes, where the attack has one."""
    honest_sent: int = 0
    honest_refused: int = 0
    hostile_sent: int = 0
    hostile_refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """How often the hostile ones were refused for what."""
    honest_reasons: dict[str, int] = field(default_factory=dict)
    broke: str = ""
    """The error that ended it, if one did."""

    @property
    def acceptance(self) -> float:
        """Share of the honest contributions that were not refused."""
        return 1.0 - self.honest_refused / max(1, self.honest_sent)


class Federation:
    """One federation, from the common start."""

    def __init__(
        self,
        world: World,
        defence: Defence,
        threat: Threat | None = None,
        hostile: int = 0,
        absent: int = 0,
    ) -> None:
        self.world, self._defence, self._threat = world, defence, threat
        places = range(world.contributors)
        self._honest = tuple(places[: world.contributors - max(hostile, absent)])
        self._hostile = tuple(places[world.contributors - hostile :])
        self._carries: dict[int, dict[str, np.ndarray]] = {}
        self._memory: dict[Any, Any] = {}
        self.weights = world.start
        self.run = Run()

    def play(self) -> Run:
        """All rounds."""
        for number in range(1, self.world.geometry.rounds + 1):
            try:
                self._round(number)
            except MoshiError as error:
                self.run.broke = str(error)
                return self.run
        self.run.loss = self.world.loss(self.weights)
        if self._threat and self._threat.has_payload:
            self.run.backdoor = success(self.world, self.weights)
        return self.run

    def _round(self, number: int) -> None:
        honest = [Sent(client, self._honest_file(client, number)) for client in self._honest]
        hostile = list(self._hostile_files(number, honest))
        decision = self._defence.decide(number, self.weights, [*honest, *hostile])
        rate = self.world.config.aggregation.server_learning_rate
        self.weights = apply_step(self.weights, decision.step, rate)
        self._count(decision.refused)

    def _honest_file(self, client: int, number: int) -> bytes:
        delta = self.world.trained(self.weights, client, number)
        entries, rest = encode_delta(delta, self.world.codec, self._carries.get(client))
        self._carries[client] = rest
        return delta_bytes(entries, self.world.codec)

    def _hostile_files(self, number: int, honest: list[Sent]) -> Iterator[Sent]:
        if self._threat is None or not self._hostile:
            return
        known = tuple(self.world.decoded(entry.data) for entry in honest)
        scene = Scene(self.world, number, self.weights, known, self._hostile, self._memory)
        for client in self._hostile:
            sent = self._threat.send(scene, client)
            yield Sent(client, sent if isinstance(sent, bytes) else self.world.encoded(sent))

    def _count(self, refused: dict[int, str]) -> None:
        run = self.run
        run.honest_sent += len(self._honest)
        run.hostile_sent += len(self._hostile)
        for client, reason in refused.items():
            if client in self._hostile:
                run.hostile_refused += 1
                run.reasons[reason] = run.reasons.get(reason, 0) + 1
            else:
                run.honest_refused += 1
                run.honest_reasons[reason] = run.honest_reasons.get(reason, 0) + 1
