"""Signs a contribution and sends it: two refs, one atomic push, the same bytes however often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.errors import BadSignature, HubError, Rejected
from moshi_fl.history import (
    DELTA_FILE,
    HubState,
    Refs,
    check_signature,
    contribution_branch,
    contribution_path,
    signature_path,
)
from moshi_fl.records import Contribution, File, Location, dump
from moshi_fl.replica import Replica
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, Signer
from moshi_fl.store import NOREPLY, Author, HubRepo, PushRejected, RefUpdate
from moshi_fl.weights import sha256_bytes, write_atomic

DELTA_AUTHOR = Author("moshi-fl", NOREPLY)


@dataclass(frozen=True)
class Sent:
    """What left this machine.

    Attributes:
        branch: Branch of the record on the hub.
        refs: All refs that were written.
        record_bytes: Size of the record, which anyone may read.
        delta_bytes: Size of the delta.
        again: Whether the hub already had it.
    """

    branch: str
    refs: tuple[str, ...]
    record_bytes: int
    delta_bytes: int
    again: bool = False


def delta_commit(repo: HubRepo, ref: str, data: bytes) -> str:
    """Store a delta as an orphan commit whose id follows from ref and content alone."""
    repo.prepare()
    tree = repo.tree({DELTA_FILE: repo.put(data)})
    return repo.commit(tree, message=f"{ref}\n", author=DELTA_AUTHOR, when=0)


def delta_location(repo: HubRepo, refs: Refs, number: int, data: bytes) -> Location:
    """Where a delta made on this round will lie; its commit, stored here, follows from its content.

    Args:
        repo: The store to put it into.
        refs: Names of the hub's refs.
        number: The round.
        data: The delta file.
    """
    sha256 = sha256_bytes(data)
    ref = refs.delta(number, sha256)
    file = File(name=DELTA_FILE, bytes=len(data), sha256=sha256)
    return Location(ref=ref, commit=delta_commit(repo, ref, data), files=(file,))


def signature_of(path: Path, contribution: Contribution, signer: Signer) -> str:
    """The signature in this file, if it is one over this record; else a new one, kept there.

    Not every key would make the same one again.

    Raises:
        SigningError: The key cannot be used.
    """
    if path.exists():
        kept = path.read_bytes()
        with suppress(BadSignature):
            check_signature(contribution, kept)
            return kept.decode()
    armoured = signer.sign(dump(contribution), CONTRIBUTION_NAMESPACE)
    write_atomic(path, armoured.encode())
    return armoured


def submit(
    replica: Replica,
    state: HubState,
    contribution: Contribution,
    signature: str,
    delta: Path,
    to: HubRepo,
    anew: str = "moshi-fl contribute --seed N",
    withdraw: Mapping[str, str] | None = None,
) -> Sent:
    """Push a contribution's record, its signature and the delta.

    Args:
        replica: The hub's copy on this machine.
        state: What the hub said last.
        contribution: The record.
        signature: Over its bytes.
        delta: The file that it names.
        to: Where to push: the replica's own store, or the same with a fork's address.
        anew: What a user does to make another contribution.
        withdraw: Refs of an earlier one, with their commits, that go in the same push.

    Raises:
        HubError: The hub cannot be reached or refuses, or what is to be withdrawn has gone; the run
            stays and can be resumed.
        Rejected: It was sent before, and the hub dropped it.
    """
    repo, number = to, contribution.round
    branch = contribution_branch(number, contribution.id)
    record = dump(contribution)
    refs = (branch, contribution.delta.ref)
    old = {ref: oid for ref, oid in (withdraw or {}).items() if ref not in refs}
    present = repo.remote_refs(*refs, *old)
    if branch in present or is_merged(replica, state, contribution):
        return Sent(branch, refs, len(record), contribution.delta.bytes, again=True)
    if not delta.exists():
        raise Rejected(
            f"contribution {contribution.id[:12]} was sent before, and is open no more: "
            "it was withdrawn, or the hub did not take it.",
            hint=f"{anew}   (another one; why a hub did not take it, its maintainer knows)",
        )
    commit = delta_commit(repo, contribution.delta.ref, delta.read_bytes())
    if commit != contribution.delta.commit:
        raise HubError(
            "the delta on disk is not the one in the record.", hint=f"{anew}   (makes another one)"
        )
    updates = [
        RefUpdate(branch, _record_commit(replica, contribution, signature.encode()), None),
        RefUpdate(contribution.delta.ref, commit, present.get(contribution.delta.ref)),
    ]
    _require_still_there(repo, old, present)
    updates += [RefUpdate(ref, None, oid) for ref, oid in old.items()]
    try:
        repo.push(updates)
    except PushRejected:
        if branch not in repo.remote_refs(branch):
            raise
        return Sent(branch, refs, len(record), contribution.delta.bytes, again=True)
    return Sent(branch, refs, len(record), contribution.delta.bytes)


def _require_still_there(repo: HubRepo, old: Mapping[str, str], present: Mapping[str, str]) -> None:
    """What has gone meanwhile cannot be replaced: a push deletes what is there, if it is there."""
    moved = tuple(ref for ref, oid in old.items() if present.get(ref) != oid)
    if moved:
        raise PushRejected(
            f"{moved[0]} was taken or replaced on {repo.shown_url} meanwhile; nothing was pushed.",
            refs=moved,
            hint="moshi-fl contribute --resume   (says what became of it)",
        )


def _record_commit(replica: Replica, contribution: Contribution, signature: bytes) -> str:
    """One commit on top of main that adds both files: what a pull request would show."""
    repo, main = replica.repo, replica.fetch_main()
    place = contribution.round, contribution.id
    record = repo.put(dump(contribution))
    files = {contribution_path(*place): record, signature_path(*place): repo.put(signature)}
    tree = repo.tree(files, base=main)
    message = f"Contribution {contribution.id[:12]} to round {contribution.round}\n"
    author = Author(contribution.contributor, NOREPLY)
    return repo.commit(tree, parents=(main,), message=message, author=author, when=0)


def is_merged(replica: Replica, state: HubState, contribution: Contribution) -> bool:
    """Whether a published round has taken it in."""
    return merged_test(replica, state)(contribution.id, contribution.round) is True


def merged_test(replica: Replica, state: HubState) -> Callable[[str, int], bool | None]:
    """Whether a contribution became part of a round; None while it still may."""

    def test(contribution_id: str, number: int) -> bool | None:
        newest = state.newest.round
        if number >= newest:
            return None
        rounds = replica.chain(state, number + 1)
        if any(merged.id == contribution_id for entry in rounds for merged in entry.contributions):
            return True
        return None if newest - number <= state.config.delta.max_staleness else False

    return test
