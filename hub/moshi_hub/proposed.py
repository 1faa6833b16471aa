"""A round that is proposed and not published yet, as the hub has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moshi_fl.errors import HubError, UntrustedHub
from moshi_fl.history import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNED_FILES,
    HubState,
    Refs,
    read_latest,
    round_branch,
    round_folder,
    round_path,
)
from moshi_fl.records import Manifest, Round, digest, dump, load
from moshi_fl.signed.files import TARGETS
from moshi_fl.store import HubRepo

REPORT_FILE = "report.md"
MAX_REPORT_BYTES = 1 << 20
LEFT_OUT, ACCEPTED = "Left-out: ", "Accepted: "
"""How lines of its commit begin that name what a maintainer decided."""


@dataclass(frozen=True)
class Proposed:
    """A proposed round as it lies on the hub.

    Attributes:
        number: Its number.
        latest: Commit of ``PREFIXnext/N``.
        branch: Commit of its branch; None when that is gone.
        files: What is signed, by file name.
        targets: The signed targets metadata.
    """

    number: int
    latest: str
    branch: str | None
    files: Mapping[str, bytes]
    targets: bytes

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        data = self.files[MANIFEST_FILE]
        return load(data, Manifest, name=MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)

    @property
    def contributions(self) -> set[str]:
        """Ids of what it takes."""
        return {merged.id for merged in self.manifest.newest.contributions}

    def follows(self, record: Round) -> bool:
        """Whether it was made on that round, which is the newest."""
        return self.manifest.newest.previous == digest(record)


def proposed_now(repo: HubRepo, state: HubState, number: int) -> Proposed | None:
    """The proposal of that number, if there is one."""
    ref = state.refs.next(number)
    return fetch_proposed(repo, state.refs, number) if ref in repo.remote_refs(ref) else None


def decisions(repo: HubRepo, proposed: Proposed) -> tuple[set[str], set[str]]:
    """Ids that a maintainer excluded from it, and disputed ones that a maintainer accepted."""
    lines = repo.message(proposed.branch).splitlines() if proposed.branch else []

    def after(word: str) -> set[str]:
        return {line.removeprefix(word) for line in lines if line.startswith(word)}

    return after(LEFT_OUT), after(ACCEPTED)


def proposed_report(repo: HubRepo, proposed: Proposed) -> str:
    """What its branch has for a maintainer to read."""
    assert proposed.branch
    path = f"{round_folder(proposed.number)}/{REPORT_FILE}"
    return repo.read(proposed.branch, path, limit=MAX_REPORT_BYTES).decode("utf-8", "replace")


def fetch_proposed(repo: HubRepo, refs: Refs, number: int) -> Proposed:
    """Bring a proposal here.

    Raises:
        HubError: There is no such proposal.
    """
    branch, prepared = round_branch(number), refs.next(number)
    found = repo.remote_refs(branch, prepared)
    if prepared not in found:
        raise HubError(
            f"round {number} is not proposed on this hub.",
            hint="moshi-hub merge   (proposes the next round)",
        )
    wanted = {ref: f"refs/moshi-fl/{ref.removeprefix('refs/')}" for ref in found}
    repo.fetch(wanted, max_bytes=1 << 30, expect=found)
    latest = found[prepared]
    files = read_latest(repo, latest)
    if TARGETS not in files:
        raise UntrustedHub(
            f"{prepared} has no {TARGETS}.", hint="moshi-hub merge   (proposes again)"
        )
    signed = {name: files[name] for name in SIGNED_FILES}
    return Proposed(number, latest, found.get(branch), signed, files[TARGETS])


def has_round(repo: HubRepo, main: str, record: Round) -> bool:
    """Whether main has exactly this round's record."""
    wanted, path = dump(record), round_path(record.round)
    return any(
        entry.path == path and repo.read(main, path, limit=1 << 20) == wanted
        for entry in repo.entries(main, round_folder(record.round))
    )
