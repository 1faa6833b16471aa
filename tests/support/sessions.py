"""Evaluations on a real hub: an anchor, appointed evaluators, and those who do it differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from moshi_fl.draw import nonce_commitment, seed_of
from moshi_fl.evidence import (
    Attestation,
    AttestationCommitment,
    BaseLosses,
    Closing,
    Draw,
    Evaluator,
    Evaluators,
    Losses,
    NonceCommitment,
    NonceReveal,
    Opening,
    Sealing,
    Seat,
    Submission,
    Verdicts,
    evaluator_id,
    pack,
)
from moshi_fl.merkle import leaf, merkle_root
from moshi_fl.records import Contribution, Location, Record, digest, dump
from moshi_fl.replica import Replica
from moshi_fl.session import Session, Signed, draw_assignments, read_session
from moshi_fl.signing import ATTESTATION_NAMESPACE, EVALUATION_NAMESPACE
from moshi_fl.verdicts import decide_all, verdicts_of
from moshi_fl.weights import write_atomic
from moshi_hub import evaluator as steps
from moshi_hub.agenda import awaited, next_step
from moshi_hub.board import RefBoard
from moshi_hub.chair import Chair
from moshi_hub.evaluation import board_for, chair_for, change_evaluators, desk_for
from moshi_hub.heldout import pool_path, store_pool
from moshi_hub.judging import Decided
from moshi_hub.local import local_signer
from moshi_hub.opened import OpenRound
from tests.support.keys import signature_by, signer_of
from tests.support.simulator import HubSimulator, write_corpus

WHEN = "2026-01-01T00:00:00Z"
HUB_STEPS = ("opening", "closing", "draw", "sealing", "verdicts")
TRUTH = [2_000_000 + 1000 * n for n in range(6)]

Lie = Callable[[Attestation], Attestation]


def shifted(by: int, only: str = "") -> Lie:
    """Makes every contribution, or only the one of this id, better by so many micro-nats."""

    def lie(found: Attestation) -> Attestation:
        results = (
            _shift(entry, by) if only in {"", entry.submission} else entry
            for entry in found.results
        )
        return msgspec.structs.replace(found, results=tuple(results))

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
        from moshi_hub.opened import look

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


class Paper:
    """A whole session on paper: right records with made-up losses; no hub, no model.

    Args:
        names: Evaluators; the anchor is ``hub``.
        gains: Micro-nats that each submission brings on every sequence.
    """

    def __init__(self, *names: str, gains: tuple[int, ...] = (50_000,)) -> None:
        self.board: dict[str, Signed] = {}
        self.names = names
        seats = [Seat(key=signer_of(n).public_key, owner=n, counts=True) for n in names]
        self.opening = Opening(
            hub="0" * 16,
            round=1,
            previous="1" * 64,
            mode="appointed",
            anchor=signer_of("hub").public_key,
            seats=tuple(sorted(seats, key=lambda seat: seat.key)),
            pool="2" * 64,
            pool_sequences=12,
            sequences=6,
            private_sequences=2,
            precision="float64",
            share=0.25,
            quorum=2,
            hours=1.0,
            created=WHEN,
        )
        self.gains = {f"{n:032x}": value for n, value in enumerate(gains)}
        self._write()

    def say(self, name: str, who: str, record: Record) -> None:
        """Put a signed record on the board."""
        hub = who == "hub" and name.partition("/")[0] in HUB_STEPS
        namespace = EVALUATION_NAMESPACE if hub else ATTESTATION_NAMESPACE
        data = dump(record)
        self.board[name] = Signed(data, signature_by(who, data, namespace))

    def _write(self) -> None:
        everybody, opening = ("hub", *self.names), digest(self.opening)
        self.say("opening", "hub", self.opening)
        nonces = {who: f"{n + 1:064x}" for n, who in enumerate(everybody)}
        keys = {who: signer_of(who).public_key for who in everybody}
        ids = {who: evaluator_id(key) for who, key in keys.items()}
        joined = [
            NonceCommitment(
                opening=opening, key=keys[who], commitment=nonce_commitment(keys[who], nonces[who])
            )
            for who in everybody
        ]
        for who, record in zip(everybody, joined, strict=True):
            self.say(f"commitment/{ids[who]}", who, record)
        submissions = tuple(
            Submission(id=name, record=name * 2, key=signer_of("author").public_key)
            for name in sorted(self.gains)
        )
        closing = Closing(
            opening=opening,
            commitments=tuple(sorted(map(digest, joined))),
            submissions=submissions,
            root=merkle_root([leaf(entry) for entry in submissions]).hex(),
            created=WHEN,
        )
        self.say("closing", "hub", closing)
        reveals = [
            NonceReveal(closing=digest(closing), key=keys[who], nonce=nonces[who])
            for who in everybody
        ]
        for who, reveal in zip(everybody, reveals, strict=True):
            self.say(f"nonce/{ids[who]}", who, reveal)
        seed = seed_of(digest(closing), nonces.values())
        session = read_session(self.board)
        draw = Draw(
            closing=digest(closing),
            stage=1,
            reveals=tuple(sorted(map(digest, reveals))),
            seed=seed,
            assignments=draw_assignments(session, seed, submissions, 1),
            created=WHEN,
        )
        self.say("draw/1", "hub", draw)
        self._measure(read_session(self.board), keys)

    def _measure(self, session: Session, keys: dict[str, str]) -> None:
        draw, pledges = digest(session.draws[1]), []
        for who, key in keys.items():
            name = evaluator_id(key)
            if not session.assigned(1, name):
                continue
            found = Attestation(
                draw=draw,
                key=key,
                bases=(BaseLosses(round=0, shared=pack(TRUTH[:6]), private=pack(TRUTH[:2])),),
                results=tuple(
                    Losses(
                        submission=entry,
                        base_round=0,
                        shared=pack([loss - self.gains[entry] for loss in TRUTH[:6]]),
                        private=pack([loss - self.gains[entry] for loss in TRUTH[:2]]),
                    )
                    for entry in session.assigned(1, name)
                ),
            )
            pledge = AttestationCommitment(draw=draw, key=key, attestation=digest(found))
            pledges.append(pledge)
            self.say(f"pledge/1/{name}", who, pledge)
            self.say(f"attestation/1/{name}", who, found)
        commitments = tuple(sorted(map(digest, pledges)))
        sealing = Sealing(draw=draw, commitments=commitments, created=WHEN)
        self.say("sealing/1", "hub", sealing)

    def verdicts(self) -> Verdicts:
        """What follows."""
        session = read_session(self.board)
        place = Location(ref="refs/moshi/evidence/1", commit="0" * 40, files=())
        return verdicts_of(session, decide_all(session, lambda *_: None), place)
