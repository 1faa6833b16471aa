"""What a key has contributed to a round already: asked of the hub before work is done for nothing.

A hub takes one contribution per key and base round, whoever sends it from which machine. What is
looked up here is a courtesy to the contributor: the hub's gate decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moshi_fl.errors import BadSignature, CorruptRecord, HubError, Rejected
from moshi_fl.history import (
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

MAX_LOOKED_AT = 400  # branches: their names stand on a command line
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
    others = _open(replica, to, present, key, number)
    others = [entry for entry in others if entry.hub == state.config.hub.id]
    refs = [ref for one in others for ref in (contribution_branch(number, one.id), one.delta.ref)]
    held = {ref: present[ref] for ref in refs if ref in present}
    return Earlier(others[0].id, owner, number, refs=held) if others else None


def _open(
    replica: Replica, to: HubRepo, present: Mapping[str, str], key: str, number: int
) -> list[Contribution]:
    """Open contributions to a round that this key has signed; others may call themselves so."""
    ids = [place[1] for ref in present if (place := branch_place(ref)) and place[0] == number]
    branches = {contribution_branch(number, entry): entry for entry in sorted(ids)[:MAX_LOOKED_AT]}
    local = {branch: f"refs/moshi-fl/earlier/{entry}" for branch, entry in branches.items()}
    expect = {branch: present[branch] for branch in branches}
    if not branches:
        return []
    replica.fetch_main()  # they stand on it
    try:
        to.fetch(local, max_bytes=(1 << 20) + len(local) * BRANCH_BYTES, expect=expect)
        found = [_signed_by(key, to, expect[b], (number, entry)) for b, entry in branches.items()]
    except HubError:  # a branch went in this moment, or one is far too large: the gate will say
        return []
    finally:
        to.delete_refs(*local.values())
    return [entry for entry in found if entry]


def _signed_by(key: str, repo: HubRepo, commit: str, place: tuple[int, str]) -> Contribution | None:
    paths = [contribution_path(*place), signature_path(*place)]
    try:
        data, signature = repo.read_many(commit, paths, limit=MAX_CONTRIBUTION_BYTES)
        record = load(data, Contribution, name=paths[0])
        if record.key == key and record.id == place[1]:
            check_signature(record, signature)
            return record
    except (CorruptRecord, BadSignature):
        pass
    return None


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


def said_of(before: Earlier | None) -> list[tuple[str, str]]:
    """What a contributor is told of it: names of stages, and texts."""
    return [("again", before.words)] if before else []


def lands_on(state: HubState, base_round: int) -> int:
    """The round that a delta made on ``base_round`` is sent to: too old a one is rebased."""
    newest = state.newest.round
    return newest if newest - base_round > state.config.delta.max_staleness else base_round
