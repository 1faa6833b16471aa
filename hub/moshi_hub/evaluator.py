"""What one evaluator does in a session, the hub's anchor included: one step at a time.

Each step looks at the board and does what is next, or nothing. What must not change between two
steps (the nonce, the attestation) is on disk before its commitment is published, so that a killed
process, started again, says the same.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.draw import nonce_commitment
from moshi_fl.errors import ConfigError, UntrustedHub
from moshi_fl.evidence import (
    MAX_ATTESTATION_BYTES,
    Attestation,
    AttestationCommitment,
    NonceCommitment,
    NonceReveal,
    evaluator_id,
)
from moshi_fl.records import Record, digest, dump, load
from moshi_fl.session import Session, Signed, read_session
from moshi_fl.signing import ATTESTATION_NAMESPACE, Signer
from moshi_fl.weights import write_atomic
from moshi_hub.board import Board
from moshi_hub.measure import Desk, Meter, measure


@dataclass(frozen=True)
class Evaluator:
    """Somebody with a key, a folder of their own, and what it takes to measure.

    Attributes:
        signer: Signs what this evaluator says.
        folder: What it must remember during a session; nobody else's.
        desk: Gives what to measure; asked only when something is measured.
        anchors: Keys that may open a session of this hub; empty accepts any.
    """

    signer: Signer
    folder: Path
    desk: Callable[[], Desk]
    anchors: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The evaluator id."""
        return evaluator_id(self.signer.public_key)

    def advance(self, board: Board) -> list[str]:
        """Do all steps that can be done now; returns them in words.

        Raises:
            UntrustedHub: The hub's records contradict themselves, or are not signed by its anchor.
            ConfigError: This evaluator has no seat in the session.
        """
        done: list[str] = []
        while word := self.step(board):
            done.append(word)
        return done

    def step(self, board: Board) -> str:
        """Do the next step; returns it in words, empty when there is nothing to do."""
        found = board.read()
        if "opening" not in found:
            return ""
        session = read_session(found)
        self._check(session)
        if session.closing is None:
            return self._join(board, session, found)
        if not session.draws:
            return self._reveal(board, session, found)
        return self._attest(board, session, found)

    def _check(self, session: Session) -> None:
        if self.anchors and session.opening.anchor not in self.anchors:
            raise UntrustedHub("the evaluation was opened by a key that is not the hub's anchor.")
        if session.key_of(self.id) is None:
            raise ConfigError(
                "this key has no seat in the evaluation.",
                hint="moshi-hub evaluators add KEY   (a maintainer does this on main)",
            )

    def _join(self, board: Board, session: Session, found: dict[str, Signed]) -> str:
        if self.id in session.commitments:
            return ""
        key = self.signer.public_key
        record = NonceCommitment(
            opening=digest(session.opening),
            key=key,
            commitment=nonce_commitment(key, self._nonce(session)),
        )
        return self._post(board, found, "commitment", record, "joined")

    def _reveal(self, board: Board, session: Session, found: dict[str, Signed]) -> str:
        assert session.closing is not None
        if self.id not in session.commitments or self.id in session.reveals:
            return ""
        record = NonceReveal(
            closing=digest(session.closing), key=self.signer.public_key, nonce=self._nonce(session)
        )
        return self._post(board, found, "nonce", record, "revealed its nonce")

    def _attest(self, board: Board, session: Session, found: dict[str, Signed]) -> str:
        for stage in session.draws:
            wanted = session.assigned(stage, self.id)
            if self.id not in session.reveals or not wanted:
                continue
            if stage not in session.sealings:
                if self.id in session.pledges[stage]:
                    continue
                record = self._pledge(session, stage, wanted)
                words = f"measured {len(wanted)} contribution(s) and committed to the result"
                return self._post(board, found, f"pledge/{stage}", record, words)
            if self.id in session.sealed(stage) and self.id not in session.attestations[stage]:
                attestation = self._attestation(session, stage, wanted)
                return self._post(
                    board, found, f"attestation/{stage}", attestation, "revealed its attestation"
                )
        return ""

    def _pledge(self, session: Session, stage: int, wanted: list[str]) -> AttestationCommitment:
        found = self._attestation(session, stage, wanted)
        return AttestationCommitment(
            draw=found.draw, key=self.signer.public_key, attestation=digest(found)
        )

    def _attestation(self, session: Session, stage: int, wanted: list[str]) -> Attestation:
        draw = digest(session.draws[stage])
        path = self.folder / f"attestation-{draw[:16]}.json"
        if path.exists():
            return load(path.read_bytes(), Attestation, name=path.name, limit=MAX_ATTESTATION_BYTES)
        desk = self.desk()
        if desk.pool_digest != session.opening.pool:
            raise ConfigError(
                "the held-out pool on this machine is not the one that is evaluated on.",
                hint="moshi-hub pool import FILE   (the hub's maintainer exports it)",
            )
        sequences = session.sequences
        meter = Meter(desk, session.opening.precision, session.opening.share)
        bases, results = measure(meter, wanted, sequences.shared, sequences.private(self.id))
        found = Attestation(draw=draw, key=self.signer.public_key, bases=bases, results=results)
        self._keep(path, dump(found))
        return found

    def _nonce(self, session: Session) -> str:
        path = self.folder / f"nonce-{digest(session.opening)[:16]}"
        if not path.exists():
            fresh = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
            self._keep(fresh, secrets.token_hex(32).encode())
            with suppress(FileExistsError):  # of two processes, the first one's nonce holds
                path.hardlink_to(fresh)
            fresh.unlink()
        return path.read_text(encoding="ascii")

    def _keep(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, data)

    def _post(
        self, board: Board, found: dict[str, Signed], folder: str, record: Record, words: str
    ) -> str:
        """Put up a record; what somebody else put in its place gives way."""
        name, data = f"{folder}/{self.id}", dump(record)
        signed = Signed(data, self.signer.sign(data, ATTESTATION_NAMESPACE))
        return words if board.post(name, signed, instead=found.get(name)) else ""
