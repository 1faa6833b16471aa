"""What goes to the hub above, as this hub itself has it: claimed, then sent, then noted as sent.

One ref holds either a contribution that waits to be sent, whole, or what was sent last. It moves
from what was read to what follows, or not at all: so of two machines one decides what is sent, and
whoever comes next, also after a kill, sends that very contribution before it makes another. The hub
above sees one id, however often it comes.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moshi_fl.errors import CorruptRecord, HubError
from moshi_fl.history import DELTA_FILE
from moshi_fl.records import (
    MAX_RECORD_BYTES,
    Contribution,
    ContributionId,
    HubId,
    Record,
    RoundNumber,
    dump,
    load,
)
from moshi_fl.signing import MAX_SIGNATURE_BYTES
from moshi_fl.store import NOREPLY, Author, HubRepo, PushRejected, RefUpdate
from moshi_fl.weights import write_atomic

PASSED_FILE = "passed.json"
PREPARED_FILE = "prepared.json"
SIGNATURE_FILE = "record.sig"
MAX_WAITING = 1 << 30  # bytes of a pack that holds a contribution of this hub's own


class Passed(Record, frozen=True, kw_only=True):
    """A contribution to the other hub: this hub's rounds after ``first``, up to ``last``."""

    format: Literal[1] = 1
    kind: Literal["passed"] = "passed"
    upstream: HubId
    id: ContributionId
    round: RoundNumber
    first: RoundNumber
    last: RoundNumber


class Prepared(Record, frozen=True, kw_only=True):
    """A contribution that lies ready to be sent; its delta is beside it."""

    format: Literal[1] = 1
    kind: Literal["prepared"] = "prepared"
    passed: Passed
    contribution: Contribution


@dataclass(frozen=True)
class Told:
    """What the hub says.

    Attributes:
        commit: Where the ref is; None where there is none.
        passed: What was sent last.
        waiting: What is to be sent before anything else.
    """

    commit: str | None = None
    passed: Passed | None = None
    waiting: Prepared | None = None


@dataclass(frozen=True)
class Outbox:
    """The ref of one hub."""

    repo: HubRepo
    ref: str

    def read(self) -> Told:
        """What the hub says now."""
        present = self.repo.remote_refs(self.ref)
        if self.ref not in present:
            return Told()
        commit = present[self.ref]
        self.repo.fetch(
            {self.ref: "refs/moshi-fl/upward"}, max_bytes=MAX_WAITING, expect={self.ref: commit}
        )
        try:
            return self._told(commit)
        except CorruptRecord as error:
            message = f"{self.ref} holds nothing that a hub sends upward: {error}"
            raise CorruptRecord(message, hint=self.removal) from error

    @property
    def removal(self) -> str:
        """What to do about something on the ref that this hub did not put there."""
        url = shlex.quote(self.repo.shown_url)
        return f"delete {self.ref}, if this hub did not make it: git push {url} :{self.ref}"

    def _told(self, commit: str) -> Told:
        limits = dict.fromkeys((PASSED_FILE, PREPARED_FILE), MAX_RECORD_BYTES)
        found = self.repo.read_listed(commit, limits, at_most=len(limits) + 2)
        if PREPARED_FILE in found:
            return Told(commit, None, load(found[PREPARED_FILE], Prepared, name=PREPARED_FILE))
        data = self.repo.read(commit, PASSED_FILE, limit=MAX_RECORD_BYTES)
        return Told(commit, load(data, Passed, name=PASSED_FILE))

    def claim(self, told: Told, prepared: Prepared, signature: str, delta: bytes) -> Told:
        """Let a contribution wait on the hub, so that it is sent and no other.

        Raises:
            HubError: Another machine was faster.
        """
        put = self.repo.put
        files = {
            PREPARED_FILE: put(dump(prepared)),
            SIGNATURE_FILE: put(signature.encode()),
            DELTA_FILE: put(delta),
        }
        commit = self._commit(files, prepared)
        self._move(told, commit)
        return Told(commit, None, prepared)

    def fetch(self, told: Told, folder: Path) -> None:
        """Bring what waits into a folder; that it is there is seen by ``prepared.json``."""
        assert told.commit is not None
        assert told.waiting is not None
        limit = told.waiting.contribution.delta.bytes
        for name, most in ((SIGNATURE_FILE, MAX_SIGNATURE_BYTES), (DELTA_FILE, limit)):
            write_atomic(folder / name, self.repo.read(told.commit, name, limit=most))
        write_atomic(folder / PREPARED_FILE, dump(told.waiting))

    def note(self, told: Told) -> Told:
        """Replace what waited by the note that it was sent.

        Raises:
            HubError: Another machine has gone on meanwhile.
        """
        prepared = told.waiting
        assert prepared is not None
        commit = self._commit({PASSED_FILE: self.repo.put(dump(prepared.passed))}, prepared)
        self._move(told, commit)
        return Told(commit, prepared.passed)

    def _commit(self, files: dict[str, str], prepared: Prepared) -> str:
        by = Author(prepared.contribution.contributor, NOREPLY)
        return self.repo.commit(self.repo.tree(files), message=f"{self.ref}\n", author=by, when=0)

    def _move(self, told: Told, commit: str) -> None:
        try:
            self.repo.push([RefUpdate(self.ref, commit, told.commit)])
        except PushRejected as error:
            raise HubError(
                "another machine sends this hub's rounds in this moment.",
                hint="the same command again   (goes on from there; run it on one machine only)",
            ) from error
