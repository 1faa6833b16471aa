"""Evaluations on a real hub: an anchor, appointed evaluators, and those who do it differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from moshi_fl.evidence import Attestation, Evaluator, Evaluators, Losses, Verdicts, pack
from moshi_fl.records import Contribution
from moshi_fl.replica import Replica
from moshi_fl.session import Session
from moshi_fl.weights import write_atomic
from moshi_hub import evaluator as steps
from moshi_hub.board import RefBoard
from moshi_hub.chair import Chair, awaited, next_step
from moshi_hub.evaluation import board_for, chair_for, change_evaluators, desk_for
from moshi_hub.heldout import pool_path, store_pool
from moshi_hub.judging import Decided
from moshi_hub.local import local_signer
from moshi_hub.merge import OpenRound
from tests.support.keys import signer_of
from tests.support.simulator import HubSimulator, write_corpus

Lie = Callable[[Attestation], Attestation]


def shifted(by: int) -> Lie:
    """Makes every contribution better (or worse) by so many micro-nats."""

    def lie(found: Attestation) -> Attestation:
        return msgspec.structs.replace(
            found, results=tuple(_shift(entry, by) for entry in found.results)
        )

    return lie


def _shift(entry: Losses, by: int) -> Losses:
    import base64

    numbers = np.frombuffer(base64.b64decode(entry.shared), "<i4").astype(np.int64)
    return msgspec.structs.replace(entry, shared=pack(np.clip(numbers - by, 0, None)))


class Person(steps.Evaluator):
    """An appointed evaluator, who may lie."""

    lie: Lie = staticmethod(lambda found: found)

    def _attestation(self, session: Session, stage: int, wanted: list[str]) -> Attestation:
        return self.lie(super()._attestation(session, stage, wanted))


class Court:
    """A hub whose maintainer has appointed people."""

    def __init__(self, hub: HubSimulator, *names: str, vouched: bool = True) -> None:
        self.hub, self.replica = hub, hub.replica
        hub.edit_settings(
            "[evaluation]\n", '[evaluation]\nevaluators = "appointed"\nprivate_sequences = 4\n'
        )
        state = self.replica.look()
        rules = msgspec.structs.replace(
            state.config,
            evaluation=msgspec.structs.replace(state.config.evaluation, private_sequences=4),
        )
        store_pool(
            self.replica, rules, state.tokenizer, [write_corpus(hub.folder / "held", files=5)]
        )
        self.appoint(*names, vouched=vouched)
        self.people: dict[str, Person] = {}
        self.boards: dict[str, RefBoard] = {}
        self.found: OpenRound | None = None

    def appoint(self, *names: str, vouched: bool = True) -> None:
        """Put people on the list."""

        def change(listed: Evaluators) -> Evaluators:
            new = [
                Evaluator(key=signer_of(name).public_key, owner=name, vouched=vouched)
                for name in names
            ]
            everybody = {entry.key: entry for entry in [*listed.evaluators, *new]}
            ordered = tuple(everybody[key] for key in sorted(everybody))
            return msgspec.structs.replace(listed, evaluators=ordered)

        change_evaluators(self.replica, self.hub.home, "m", change)

    @property
    def anchor_key(self) -> str:
        """The hub's anchor."""
        hub = self.replica.look().config.hub.id
        return local_signer(self.hub.home, hub, "anchor").public_key

    def chair(self) -> Chair:
        """The hub's part, as a fresh process finds it."""
        self.found = self.hub.look()
        folder = max((self.hub.folder / "look").iterdir(), key=lambda p: int(p.name))
        return chair_for(self.replica, self.found, folder, self.hub.home, "appointed")

    def board(self) -> RefBoard:
        """Where everybody meets."""
        state = self.replica.look()
        return RefBoard(self.replica.repo, state.refs, state.newest.round + 1)

    def person(self, name: str, lie: Lie | None = None) -> Person:
        """An evaluator on a machine of their own, with the pool."""
        if name not in self.people:
            replica = self.hub.person(name)
            replica.pull()
            write_atomic(pool_path(replica), pool_path(self.replica).read_bytes())
            who = Person(
                signer_of(name),
                self.hub.folder / f"{name}-remembers",
                lambda: self._desk(replica),
                (self.anchor_key,),
            )
            self.people[name] = who
        if lie:
            object.__setattr__(self.people[name], "lie", lie)
        return self.people[name]

    def _desk(self, replica: Replica):
        from moshi_hub.merge import look

        folder = Path(replica.folder) / "desk"
        if not folder.exists():
            folder.mkdir()
            self._looked = look(replica, folder)
        return desk_for(replica, self._looked, folder / "deltas")

    def anchor(self, chair: Chair) -> steps.Evaluator:
        """The hub's own measurements."""
        return steps.Evaluator(chair.signer, self.hub.folder / "anchor", lambda: chair.desk)

    def run(
        self, *names: str, until: str = "", absent: Callable[[str, str], bool] | None = None
    ) -> Session:
        """Everybody does what they can; the hub waits for nobody who does nothing.

        Args:
            names: Who takes part.
            until: Stop before the hub does this step.
            absent: Whether somebody sleeps through a step of the hub.
        """
        chair = self.chair()
        board = board_for(self.replica, chair)
        anchor = self.anchor(chair)
        for _ in range(20):
            session = chair.read(board)
            step = next_step(session)
            for name in names:
                if not (absent and absent(name, step)):
                    person = self.person(name)
                    person.advance(self.board_of(name))
            anchor.advance(board)
            session = chair.read(board)
            if step in {"", until} and session:
                return session
            chair.advance(board, step)
        raise AssertionError(f"this does not end: {awaited(chair.read(board))}")

    def board_of(self, name: str) -> RefBoard:
        """The board as somebody's machine sees it."""
        if name not in self.boards:
            replica = self.hub.person(name)
            state = replica.look()
            self.boards[name] = RefBoard(replica.repo, state.refs, state.newest.round + 1)
        return self.boards[name]

    def decided(self) -> Decided:
        """The end of it."""
        chair = self.chair()
        decided = chair.decided(board_for(self.replica, chair))
        assert decided
        return decided

    def verdicts(self) -> Verdicts:
        """What was decided."""
        return self.decided().verdicts

    def helpful(self, name: str = "ann", seed: int = 1) -> Contribution:
        """A contribution that makes the model better: one step of honest training."""
        return self.hub.contribute(name, seed=seed, delta=self._gradient(-1.0, seed))

    def harmful(self, name: str = "mallory", seed: int = 2) -> Contribution:
        """One that makes it worse."""
        return self.hub.contribute(name, seed=seed, delta=self._gradient(1.0, seed))

    def _gradient(self, sign: float, seed: int) -> dict[str, np.ndarray]:
        import torch

        from moshi_fl.models import get_family
        from moshi_fl.models.common import load_weights

        snapshot = self.replica.pull()
        config = snapshot.state.config
        task = get_family("char").load(config.model_table, snapshot.state.tokenizer)
        module = task.build()
        load_weights(module, snapshot.load())
        data = write_corpus(self.hub.folder / f"data{seed}", files=2)
        corpus = task.read([data], seed=seed)
        loss, _ = task.loss(module, next(iter(task.batches(corpus, 16, seed=seed))))
        loss.backward()
        random = np.random.default_rng(seed)
        return {
            name: (sign * 0.3 * p.grad.numpy() * (1 + 0.1 * random.random())).astype(np.float32)
            for name, p in module.named_parameters()
            if p.grad is not None and torch.any(p.grad != 0)
        }
