"""What a key has contributed to a round already: asked of the hub before work is done for nothing.

A hub takes one contribution per key and base round, whoever sends it from which machine. What is
looked up here is a courtesy to the contributor: the hub's gate decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moshi_fl.errors import BadSignature, CorruptRecord, HubError, Rejected
from moshi_fl.history import (
    MAIN,
    MAX_CONTRIBUTION_BYTES,
    HubState,
    branch_place,
    check_signature,
    contribution_branch,
    contribution_path,
    signature_path,
)
from moshi_fl.pull_request import forge_of, pushing_to
from moshi_fl.records import Contribution, load
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.signing import fingerprint
from moshi_fl.store import HubRepo
from moshi_sdk.planning import Options
from moshi_sdk.runs import Run, Runs

MAX_OPEN = 2000  # branches that are looked at
AT_ONCE = 400  # of them: their names stand on a command line
BRANCH_BYTES = 1 << 15  # of a pack: trees, record and signature of one contribution


@dataclass(frozen=True)
class Earlier:
    """Another contribution of the same key to the same round.

    Attributes:
        id: Its id.
        owner: Fingerprint of the key.
        base_round: The round that both are made on.
        taken: The round that has taken it in; None while it is open.
        refs: Its refs on the hub, or the fork, with their commits; those of all, if there are more.
            A delta that others name, too, is not among them.
    """

    id: str
    owner: str
    base_round: int
    taken: int | None = None
    refs: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What there is, in a sentence."""
        where = "is open" if self.taken is None else f"is in round {self.taken}"
        return (
            f"contribution {self.id[:12]} of your key {self.owner} to round {self.base_round} "
            f"{where} already; a hub takes one per key and round"
        )

    def refused(self) -> Rejected:
        """Why another one is not sent."""
        if self.taken is None:
            hint = "--replace   (withdraws that one and sends this instead), or wait for a round"
        else:
            hint = "moshi-fl contribute --discard; then contribute anew, on the newest round"
        return Rejected(f"{self.words}.", hint=hint)


def earlier_one(
    replica: Replica, state: HubState, to: HubRepo, key: str, number: int, own: str = ""
) -> Earlier | None:
    """Another contribution of this key to this round, open or in a round; None where none is known.

    What cannot be read now is not known.

    Args:
        replica: The hub's copy on this machine.
        state: What the hub said last.
        to: Where contributions are pushed: the hub, or a fork of it.
        key: The public key.
        number: The round that both are made on.
        own: Id of the contribution that there is to be; empty where it has none yet.

    Raises:
        HubError: The hub cannot be reached.
        SigningError: ssh-keygen cannot be asked.
    """
    owner = fingerprint(key)
    for record in replica.chain(state, number + 1) if number < state.newest.round else ():
        for merged in record.contributions:
            if (merged.owner, merged.base_round) == (owner, number):
                is_own = merged.id == own
                return None if is_own else Earlier(merged.id, owner, number, record.round)
    present = to.remote_refs()
    if own and contribution_branch(number, own) in present:
        return None
    found = _open(replica, to, present, number)
    is_ours = [_is_by(key, *entry) and entry[0].hub == state.config.hub.id for entry in found]
    ours = [record for (record, _), own in zip(found, is_ours, strict=True) if own]
    shared = {record.delta.ref for (record, _), own in zip(found, is_ours, strict=True) if not own}
    refs = [contribution_branch(number, one.id) for one in ours]
    refs += [one.delta.ref for one in ours if one.delta.ref not in shared]
    held = {ref: present[ref] for ref in refs if ref in present}
    return Earlier(ours[0].id, owner, number, refs=held) if ours else None


Signed = tuple[Contribution, bytes]
"""A record, and what is said to be its signature."""


def _open(replica: Replica, to: HubRepo, present: Mapping[str, str], number: int) -> list[Signed]:
    """Records of the open contributions to a round, by whomever."""
    branches = sorted(ref for ref in present if (place := branch_place(ref)) and place[0] == number)
    if branches:
        replica.fetch_main()  # they stand on it
    parts = (branches[at : at + AT_ONCE] for at in range(0, min(len(branches), MAX_OPEN), AT_ONCE))
    return [entry for part in parts for entry in _read(to, {ref: present[ref] for ref in part})]


def _read(repo: HubRepo, branches: Mapping[str, str]) -> list[Signed]:
    """What is on these; one that has gone, or that nobody can fetch, hides none of the others."""
    local = {ref: ref.replace("refs/heads/", "refs/moshi-fl/earlier/", 1) for ref in branches}
    try:
        repo.fetch(local, max_bytes=(1 << 20) + len(local) * BRANCH_BYTES, expect=branches)
        found = [_record(repo, commit, branch) for branch, commit in branches.items()]
        return [entry for entry in found if entry]
    except HubError:
        repo.remote_refs(MAIN)  # fails, too, where that is the hub's or the network's doing
    finally:
        repo.delete_refs(*local.values())
    refs, half = list(branches), len(branches) // 2
    parts = [refs[:half], refs[half:]] if half else []
    return [entry for part in parts for entry in _read(repo, {ref: branches[ref] for ref in part})]


def _record(repo: HubRepo, commit: str, branch: str) -> Signed | None:
    place = branch_place(branch)
    assert place
    paths = [contribution_path(*place), signature_path(*place)]
    try:
        data, signature = repo.read_many(commit, paths, limit=MAX_CONTRIBUTION_BYTES)
        record = load(data, Contribution, name=paths[0])
    except CorruptRecord:
        return None
    return (record, signature) if record.id == place[1] else None


def _is_by(key: str, record: Contribution, signature: bytes) -> bool:
    """Whether this key has signed it; others may call themselves so."""
    if record.key != key:
        return False
    try:
        check_signature(record, signature)
    except BadSignature:
        return False
    return True


def make_way(found: Earlier | None, *, replace: bool) -> Mapping[str, str]:
    """Refs to withdraw in the push that sends another one.

    Raises:
        Rejected: There is an earlier one, which is not to be replaced, or cannot be.
    """
    if found is None:
        return {}
    if found.taken is not None or not replace:
        raise found.refused()
    return found.refs


def first_look(
    replica: Replica, snapshot: Snapshot, runs: Runs, run: Run, options: Options
) -> Earlier | None:
    """Refuse before any work what the hub would refuse after it.

    Returns:
        What this key has contributed already, where that is no obstacle.
    """
    state, plan, own = snapshot.state, run.plan, run.contribution()
    if not snapshot.online:
        return None
    number = lands_on(state, plan.base_round)
    been = any((sent.base_round, sent.key) == (number, plan.key) for sent in runs.sent())
    to = pushing_to(forge_of(replica), replica) if been else replica.repo  # no fork is made for it
    found = earlier_one(replica, state, to, plan.key, number, own.id if own else "")
    if found and (own := run.contribution()) and own.id == found.id:
        return None  # another process has sent this very one meanwhile
    if not options.dry_run:
        make_way(found, replace=options.replace)
    return found


def said_of(before: Earlier | None, *, replace: bool) -> list[tuple[str, str]]:
    """What a contributor is told of it: names of stages, and texts."""
    if before is None:
        return []
    is_to_go = replace and before.taken is None
    return [("again", before.words + "; this one is to take its place" * is_to_go)]


def lands_on(state: HubState, base_round: int) -> int:
    """The round that a delta made on ``base_round`` is sent to: too old a one is rebased."""
    newest = state.newest.round
    return newest if newest - base_round > state.config.delta.max_staleness else base_round
