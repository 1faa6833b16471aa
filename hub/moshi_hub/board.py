"""Where the records of an evaluation are put up: refs of the hub, or a folder of this machine.

Nothing here judges a record: ``moshi_fl.session`` does. A name is taken once: whoever posts where
something is already has lost a race, and reads again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from moshi_fl.errors import CorruptRecord, MoshiError
from moshi_fl.evidence import MAX_ATTESTATION_BYTES, Opening
from moshi_fl.history import Refs
from moshi_fl.records import load
from moshi_fl.session import MAX_STEP_BYTES, Signed, board_of, evidence_file
from moshi_fl.signing import MAX_SIGNATURE_BYTES
from moshi_fl.store import NOREPLY, Author, HubRepo, PushRejected, RefUpdate
from moshi_fl.weights import write_atomic

RECORD_FILE, SIGNATURE_FILE = "record.json", "record.sig"
MAX_BOARD_PACK = 64 << 20
_OURS = re.compile(r"opening|closing|verdicts|(draw|sealing)/[12]")
_THEIRS = re.compile(r"(?:commitment|nonce|pledge/[12]|attestation/[12])/([0-9a-f]{32})")


class Board(Protocol):
    """A place for signed records by name."""

    def read(self) -> dict[str, Signed]:
        """All records that are there now."""
        ...

    def post(self, name: str, signed: Signed, *, instead: Signed | None = None) -> bool:
        """Put up a record; False when the name is taken by another than ``instead``."""
        ...


class FolderBoard:
    """A folder that processes of this machine share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, Signed]:
        """All records that are complete."""
        found = {}
        for path in sorted([*self.folder.glob("[!.]*.json"), *self.folder.glob("[!.]*.sig")]):
            with suppress(FileNotFoundError):  # replaced at this very moment
                found[path.name] = path.read_bytes()
        return board_of(found)

    def post(self, name: str, signed: Signed, *, instead: Signed | None = None) -> bool:
        """Put up a record; it appears with its signature, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / evidence_file(name)
        if instead:
            path.unlink(missing_ok=True)
        if path.exists():
            return path.read_bytes() == signed.record
        write_atomic(path.with_suffix(".sig"), signed.signature.encode())
        fresh = self.folder / f".tmp-{os.getpid()}-{path.name}"
        fresh.write_bytes(signed.record)
        try:
            path.hardlink_to(fresh)
        except FileExistsError:
            return path.read_bytes() == signed.record
        finally:
            fresh.unlink()
        return True


class RefBoard:
    """Small refs of a hub, each an orphan commit of a record and its signature.

    Args:
        repo: The replica's store.
        refs: Names of the hub's refs.
        number: The round that is evaluated.
    """

    def __init__(self, repo: HubRepo, refs: Refs, number: int) -> None:
        self._repo, self._refs, self._number = repo, refs, number
        self._prefix = refs.evaluation(number, "")
        self._found: dict[str, str] = {}
        self._known: dict[str, Signed | None] = {}

    def read(self) -> dict[str, Signed]:
        """All records of people who have a seat; what cannot be read is as if it were not there."""
        present = self._repo.remote_refs(self._prefix)
        names = {ref.removeprefix(self._prefix): oid for ref, oid in present.items()}
        self._found = names
        board = self._fetch({n: oid for n, oid in names.items() if _OURS.fullmatch(n)})
        seats = _seats(board)
        theirs = {n: oid for n, oid in names.items() if _has_seat(n, seats)}
        return board | self._fetch(theirs)

    def post(self, name: str, signed: Signed, *, instead: Signed | None = None) -> bool:
        """Put up a record on its ref, in one push that fails when someone else was faster."""
        commit = self.commit(name, signed)
        expected = self._found.get(name) if instead else None
        try:
            self._repo.push([RefUpdate(self._prefix + name, commit, expected)])
        except PushRejected:
            return False
        return True

    def commit(self, name: str, signed: Signed) -> str:
        """The orphan commit of a record; it follows from name and content alone."""
        files = {RECORD_FILE: signed.record, SIGNATURE_FILE: signed.signature.encode()}
        blobs = dict(zip(files, self._repo.put_many(list(files.values())), strict=True))
        author = Author("moshi-fl", NOREPLY)
        message = f"{self._prefix}{name}\n"
        return self._repo.commit(self._repo.tree(blobs), message=message, author=author, when=0)

    def _fetch(self, names: Mapping[str, str]) -> dict[str, Signed]:
        wanted = {self._prefix + name: oid for name, oid in names.items()}
        local = {ref: self._local(ref) for ref in wanted}
        have = self._repo.refs("refs/moshi-fl/evaluation/")
        missing = {ref: name for ref, name in local.items() if have.get(name) != wanted[ref]}
        try:
            expect = {ref: wanted[ref] for ref in missing}
            self._repo.fetch(missing, max_bytes=MAX_BOARD_PACK, expect=expect)
        except MoshiError:
            self._one_by_one(missing, wanted)
        have = self._repo.refs("refs/moshi-fl/evaluation/") if missing else have
        here = {name for name in names if have.get(local[self._prefix + name]) == names[name]}
        found = {name: self._record(names[name]) for name in sorted(here)}
        return {name: signed for name, signed in found.items() if signed}

    def _one_by_one(self, missing: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        """One of them is too large, or has moved; the others shall not suffer from it."""
        limit = MAX_ATTESTATION_BYTES + (1 << 20)
        for ref, name in missing.items():
            try:
                self._repo.fetch({ref: name}, max_bytes=limit, expect={ref: wanted[ref]})
            except MoshiError:
                self._repo.delete_refs(name)

    def _local(self, ref: str) -> str:
        return f"refs/moshi-fl/evaluation/{ref.removeprefix(self._refs.prefix)}"

    def _record(self, commit: str) -> Signed | None:
        if commit not in self._known:
            self._known[commit] = self._read(commit)
        return self._known[commit]

    def _read(self, commit: str) -> Signed | None:
        names, limit = [RECORD_FILE, SIGNATURE_FILE], MAX_ATTESTATION_BYTES
        try:
            record, signature = self._repo.read_many(commit, names, limit=limit)
        except CorruptRecord:
            return None
        if len(signature) > MAX_SIGNATURE_BYTES:
            return None
        return Signed(record, signature.decode("ascii", "replace"))


def _seats(board: Mapping[str, Signed]) -> set[str]:
    """Ids of those who may post; whether the opening is right is judged elsewhere."""
    try:
        signed = board["opening"]
        opening = load(signed.record, Opening, name="opening", limit=MAX_STEP_BYTES)
    except (KeyError, CorruptRecord):
        return set()
    from moshi_fl.evidence import evaluator_id

    return {evaluator_id(opening.anchor), *(seat.id for seat in opening.seats)}


def _has_seat(name: str, seats: set[str]) -> bool:
    found = _THEIRS.fullmatch(name)
    return found is not None and found[1] in seats
