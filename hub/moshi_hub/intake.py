"""Who came first: the order in which open contributions were first seen.

An open delta is public, so anybody can send it again as their own. The hub sees only refs, which
say nothing about time, so whoever merges keeps a list of the ids seen, oldest first: in the
replica's folder, and on the hub when asked to, where the next machine goes on with it. Only what is
still open stays on the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.errors import MoshiError, UntrustedHub
from moshi_fl.history import Refs, branch_place
from moshi_fl.records import MAX_RECORD_BYTES, Intake, dump, load
from moshi_fl.replica import Replica
from moshi_fl.store import Author, RefUpdate
from moshi_fl.weights import write_atomic

INTAKE_FILE = "intake.json"
LOCAL_FILE = "first-seen.json"
MAX_SEEN = 20_000  # ids; what comes beyond them is ordered by name alone
_PACK_SLACK = 1 << 16


@dataclass(frozen=True)
class Arrivals:
    """Open branches in the order of first sight.

    Attributes:
        intake: The record of it.
        order: The branches, those that name no contribution last.
        problem: Why the hub's own list was left aside; empty when it was not.
    """

    intake: Intake
    order: tuple[str, ...]
    problem: str = ""


def arrivals(
    replica: Replica, hub: str, names: Refs, refs: Mapping[str, str], branches: Iterable[str]
) -> Arrivals:
    """Put open branches in order, and remember it on this machine.

    Args:
        replica: The hub's copy on this machine.
        hub: The hub's id.
        names: Names of its refs.
        refs: The hub's refs, as listed.
        branches: Those of contributions.
    """
    theirs, problem = _recorded(replica, hub, names, refs)
    path = replica.folder / LOCAL_FILE
    with replica.repo.lock():
        ours: tuple[str, ...] = ()
        if path.exists():
            ours = load(path.read_bytes(), Intake, name=LOCAL_FILE).seen
        intake = Intake(hub=hub, seen=first_seen([theirs, ours], branches))
        write_atomic(path, dump(intake))
    return Arrivals(intake, in_order(branches, intake.seen), problem)


def recorded_order(
    replica: Replica, hub: str, names: Refs, refs: Mapping[str, str], branches: Iterable[str]
) -> tuple[str, ...]:
    """Open branches in the order that the hub itself records: whoever asks is told the same.

    The arguments are those of ``arrivals``.
    """
    branches = tuple(branches)
    theirs, _ = _recorded(replica, hub, names, refs)
    return in_order(branches, first_seen([theirs], branches))


def first_seen(known: Sequence[Sequence[str]], branches: Iterable[str]) -> tuple[str, ...]:
    """Ids of open contributions: those known, in the order of the lists, then those that are new.

    New ones have the order of their branches' names: nothing tells which came first.
    """
    places = (branch_place(branch) for branch in sorted(branches))
    fresh = [place[1] for place in places if place]
    still_open = set(fresh)
    kept = [entry for entries in known for entry in entries if entry in still_open]
    return tuple(dict.fromkeys([*kept, *fresh]))[:MAX_SEEN]


def in_order(branches: Iterable[str], seen: Sequence[str]) -> tuple[str, ...]:
    """Branches in the order of their ids on the list; what is not on it comes last, by name."""
    rank = {contribution_id: number for number, contribution_id in enumerate(seen)}
    return tuple(
        sorted(
            branches, key=lambda branch: (rank.get(branch.rsplit("/", 1)[-1], len(rank)), branch)
        )
    )


def publish_intake(replica: Replica, names: Refs, intake: Intake, by: Author) -> bool:
    """Put the list on the hub; False when it says the same already.

    Raises:
        PushRejected: Another machine did so in this moment; look again.
    """
    repo = replica.repo
    present = repo.remote_refs(names.intake).get(names.intake)
    tree = repo.tree({INTAKE_FILE: repo.put(dump(intake))})
    commit = repo.commit(tree, message=f"{names.intake}\n", author=by, when=0)
    if commit != present:
        repo.push([RefUpdate(names.intake, commit, present)])
    return commit != present


def _recorded(
    replica: Replica, hub: str, names: Refs, refs: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    """The hub's own list; an unusable one holds up nobody, but it is told."""
    if names.intake not in refs:
        return (), ""
    local, expect = "refs/moshi-fl/intake", {names.intake: refs[names.intake]}
    limit = MAX_RECORD_BYTES + _PACK_SLACK
    try:
        replica.repo.fetch({names.intake: local}, max_bytes=limit, expect=expect)
        data = replica.repo.read(refs[names.intake], INTAKE_FILE, limit=MAX_RECORD_BYTES)
        intake = load(data, Intake, name=INTAKE_FILE)
        if intake.hub != hub:
            raise UntrustedHub(f"{INTAKE_FILE} is that of the hub {intake.hub}.")
    except MoshiError as error:
        return (), f"the hub's own list of what came first cannot be used: {error}"
    return intake.seen, ""
