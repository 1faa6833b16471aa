"""Changes of whose keys count: the next root, signed by the old and the new keys, then published.

A change that lacks signatures waits on ``PREFIXnext/root`` for other maintainers. What the new
root no longer accepts of the present metadata is signed again in the same step, so that clients
find one consistent state, whichever roots they have skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from moshi_fl.errors import HubError, UntrustedHub
from moshi_fl.history import MAX_LATEST_PACK, SIGNED_FILES, HubState, read_latest
from moshi_fl.replica import Replica
from moshi_fl.signed.files import SNAPSHOT, TARGETS, TIMESTAMP, root_name, root_versions
from moshi_fl.store import PushRejected, RefUpdate
from moshi_hub.keys import Passphrase, passphrase_from_environment
from moshi_hub.merge import desk_for
from moshi_hub.metadata import (
    TUF_ROLES,
    Desk,
    Files,
    counted,
    keys_of,
    missing_for_root,
    next_root,
    sign_root,
)
from moshi_hub.opened import settings_on
from moshi_hub.publish import author, commit_latest
from moshi_hub.rootchange import Change, check_roles, keep


@dataclass(frozen=True)
class Changed:
    """What became of a change.

    Attributes:
        version: Version of the new root.
        lacks: What it still lacks, in words; empty when it is published.
        again: Files that had to be signed again with it.
    """

    version: int
    lacks: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Waiting:
    """A change that waits for signatures: its commit, the next root, and targets if they change."""

    commit: str
    root: bytes
    targets: bytes | None


@dataclass(frozen=True)
class Bench:
    """A hub as it stands, and where its keys are used."""

    replica: Replica
    state: HubState
    files: Files
    desk: Desk
    name: str


def open_bench(
    replica: Replica, passphrase: Passphrase = passphrase_from_environment, name: str = "moshi-hub"
) -> Bench:
    """Look at the hub and verify it."""
    replica.repo.prepare()
    state = replica.look()
    config = settings_on(replica.repo, replica.fetch_main())
    signed = {file: state.files[file] for file in SIGNED_FILES}
    return Bench(replica, state, signed, desk_for(replica, state, config, passphrase), name)


def change_root(bench: Bench, *changes: Change) -> Changed:
    """Make the next root and publish it, or leave it for others to sign.

    Raises:
        HubError: A change already waits, or a role would lack keys.
    """
    if waiting_change(bench):
        raise HubError(
            "a change of keys already waits for signatures.",
            hint="moshi-hub keys sign   (or, to take it back: moshi-hub keys drop)",
        )

    def all_changes(root: Root) -> None:
        for change in changes:
            change(root)

    data = next_root(bench.desk, all_changes)
    check_roles(_root(data))
    return _publish_or_wait(bench, data, None, keep in changes)


def sign_change(bench: Bench) -> Changed:
    """Add this machine's signatures to the change that waits; publish it when it has enough.

    Raises:
        HubError: None waits, or the keys have changed since it was made.
    """
    waiting = waiting_change(bench)
    if waiting is None:
        raise HubError("no change of keys waits for signatures.", hint="moshi-hub keys list")
    check_roles(waiting_root(bench, waiting))
    data = sign_root(bench.desk, waiting.root)
    return _publish_or_wait(bench, data, waiting, waiting.targets is not None)


def drop_change(bench: Bench) -> bool:
    """Take back the change that waits; False when there is none."""
    waiting = waiting_change(bench)
    if waiting:
        bench.replica.repo.push([RefUpdate(bench.state.refs.next_root, None, waiting.commit)])
    return waiting is not None


def waiting_change(bench: Bench) -> Waiting | None:
    """The change that waits for signatures, if there is one."""
    repo, ref = bench.replica.repo, bench.state.refs.next_root
    found = repo.remote_refs(ref)
    if not found:
        return None
    repo.fetch({ref: "refs/moshi-fl/next/root"}, max_bytes=MAX_LATEST_PACK, expect=found)
    files = read_latest(repo, found[ref])
    newest = root_name(max(root_versions(files), default=0))
    return Waiting(found[ref], files.get(newest, b""), files.get(TARGETS))


def waiting_root(bench: Bench, waiting: Waiting) -> Root:
    """The root that a waiting change would bring, provided that a present maintainer began it.

    Whoever rules the repository can put anything there, so that others sign it unread.

    Raises:
        UntrustedHub: None of the present root keys has signed it, or it is no root.
        HubError: The keys have changed since it was made.
    """
    try:
        begun = counted(bench.desk.root, "root", waiting.root)[0] > 0
        root = _root(waiting.root)
    except RepositoryError:
        begun = False
    if not begun:
        raise UntrustedHub(
            "a change of keys waits that none of the hub's root keys has signed.",
            hint="do not sign it; moshi-hub keys drop   (takes it away)",
        )
    if root.version != bench.desk.root.version + 1:
        raise HubError(
            "the keys have changed since the change that waits was made.",
            hint="moshi-hub keys drop   (then make it again)",
        )
    return root


def refresh(bench: Bench, *, with_snapshot: bool) -> None:
    """Publish a new timestamp, and a new snapshot where wanted or needed.

    Raises:
        TooFewSignatures: The online key is not here.
    """
    _publish(bench, bench.desk.refresh(with_snapshot=with_snapshot), None)


def _publish_or_wait(
    bench: Bench, data: bytes, waiting: Waiting | None, sign_again: bool
) -> Changed:
    desk, root = bench.desk, _root(data)
    present, number = desk.metadata[TARGETS], bench.state.newest.round
    targets = None
    if sign_again or _lacks(root, "targets", present):
        targets = waiting.targets if waiting else None
        if targets is None or not desk.is_next(targets, bench.files, number):
            targets = desk.draft_targets(bench.files, number)
        targets = desk.sign_targets(targets, root)
    online = targets is not None or any(
        _lacks(root, role, desk.metadata[f"{role}.json"]) for role in TUF_ROLES["online"]
    )
    lacks = _all_lacks(desk, data, targets, online)
    name = root_name(root.version)
    if lacks:
        _wait(bench, {name: data, **({TARGETS: targets} if targets else {})}, waiting)
        return Changed(root.version, lacks)
    found = desk.publish(targets or present, root) if online else dict(desk.metadata)
    _publish(bench, {**found, name: data}, waiting)
    again = (TARGETS,) * bool(targets) + (SNAPSHOT, TIMESTAMP) * online
    return Changed(root.version, again=again)


def _all_lacks(desk: Desk, data: bytes, targets: bytes | None, online: bool) -> tuple[str, ...]:
    root, lacks = _root(data), []
    if missing := missing_for_root(desk, data):
        lacks.append(f"{missing} signature(s) of root keys")
    if targets and (missing := _lacks(root, "targets", targets)):
        lacks.append(f"{missing} signature(s) of targets keys")
    role = root.get_delegated_role("timestamp")
    if online and len(desk.keys.signers(keys_of(root, "timestamp"))) < role.threshold:
        lacks.append("the online key")
    return tuple(lacks)


def _lacks(root: Root, role: str, data: bytes) -> int:
    have, need = counted(root, role, data)
    return max(0, need - have)


def _wait(bench: Bench, metadata: Files, waiting: Waiting | None) -> None:
    repo, refs = bench.replica.repo, bench.state.refs
    files = {**bench.files, **bench.desk.roots, **metadata}
    commit = commit_latest(repo, bench.state.manifest, files, author(bench.name))
    _push(bench, [RefUpdate(refs.next_root, commit, waiting.commit if waiting else None)])


def _publish(bench: Bench, metadata: Files, waiting: Waiting | None) -> None:
    repo, refs = bench.replica.repo, bench.state.refs
    files = {**bench.files, **metadata}
    commit = commit_latest(repo, bench.state.manifest, files, author(bench.name))
    updates = [RefUpdate(refs.latest, commit, bench.state.commit)]
    if waiting:
        updates.append(RefUpdate(refs.next_root, None, waiting.commit))
    _push(bench, updates)
    bench.replica.look()


def _push(bench: Bench, updates: list[RefUpdate]) -> None:
    try:
        bench.replica.repo.push(updates)
    except PushRejected as error:
        raise PushRejected(
            "the hub's rounds or keys changed meanwhile; nothing was changed.",
            hint="Do the same again: it starts from what is there now.",
            refs=error.refs,
        ) from error


def _root(data: bytes) -> Root:
    return Metadata[Root].from_bytes(data).signed
