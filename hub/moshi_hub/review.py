"""A maintainer's signature on a round that somebody else proposed.

Nobody signs what they have not recomputed: the round must extend what the hub has now, and its
weights must follow, bit for bit, from the contributions that its branch names. A round of another
hub must be that hub's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moshi_fl.aggregate import get_strategy
from moshi_fl.errors import CorruptRecord, HubError, UntrustedHub
from moshi_fl.history import (
    HUB_FILE,
    MAX_TOKENIZER_BYTES,
    TOKENIZER_FILE,
    HubState,
    check_chain,
    check_one_per_key,
    check_signatures,
    first_rival,
    read_contributions,
    round_path,
)
from moshi_fl.hubfile import MAX_HUBFILE_BYTES, changed_settings, parse_hubfile
from moshi_fl.records import MAX_RECORD_BYTES, Location, Round, dump
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.restore import StrategyFinder, advance, aggregate, delta_name, fetch_locations, grown
from moshi_fl.signed.files import TARGETS
from moshi_fl.store import HubRepo, PushRejected, RefUpdate
from moshi_fl.taken import check_taken
from moshi_fl.upstream import Origin, origin_of, stand_of
from moshi_fl.weights import Weights, not_finite, sha256_bytes, weights_digest
from moshi_hub.keys import Passphrase, passphrase_from_environment
from moshi_hub.merge import desk_for
from moshi_hub.metadata import counted, keys_of
from moshi_hub.opened import rules_of, settings_on
from moshi_hub.propose import weigh
from moshi_hub.proposed import Proposed, fetch_proposed
from moshi_hub.publish import author, commit_latest, extend
from moshi_hub.verify import Rules

ADVICE = "do not sign it; moshi-hub merge proposes the round again"


class NoKeyHere(HubError):
    """This machine cannot sign."""


class Unseen(UntrustedHub):
    """The round is another hub's, and that hub is not at hand."""


@dataclass(frozen=True)
class Signature:
    """What became of a signature.

    Attributes:
        record: The round.
        have: Valid signatures on it now.
        need: How many it takes.
        added: Whether this call added one.
        settings: What the round changes in ``hub.toml``.
    """

    record: Round
    have: int
    need: int
    added: bool
    settings: tuple[str, ...] = ()


def sign_round(
    replica: Replica,
    number: int | None = None,
    *,
    passphrase: Passphrase = passphrase_from_environment,
    find_strategy: StrategyFinder = get_strategy,
    name: str = "moshi-hub",
    upstream: Replica | None = None,
) -> Signature:
    """Recompute a proposed round and sign it with the targets keys on this machine.

    Doing it twice adds nothing. A round that takes another hub's is compared with ``upstream``.

    Raises:
        UntrustedHub: The round is not what its contributions make, or does not extend the hub's;
            or it takes none of the hub that this one stands on.
        Unseen: It takes another hub's, and there is no ``upstream`` to compare it with.
        NoKeyHere: None of the hub's targets keys is on this machine.
        HubError: No such proposal, or it was proposed anew meanwhile.
    """
    replica.repo.prepare()
    snapshot, main = replica.pull(), replica.fetch_main()
    state, repo = snapshot.state, replica.repo
    config = settings_on(repo, main)
    proposed = fetch_proposed(repo, state.refs, number or snapshot.round + 1)
    record = proposed.manifest.newest
    desk = desk_for(replica, state, config, passphrase)
    if not desk.keys.signers(keys_of(desk.root, "targets")):
        raise NoKeyHere(
            "none of the hub's targets keys is on this machine.",
            hint="moshi-hub keys new targets   (makes one, which another maintainer adds)",
        )
    source = proposed.branch or main
    _check_files(repo, source, state, proposed)
    rules = rules_of(replica, snapshot, main, config)
    if origin := origin_of(record):
        _take_over(replica, snapshot, record, origin, upstream)
    else:
        _recompute(replica, source, snapshot, record, rules, find_strategy)
    targets = proposed.targets
    if not desk.is_next(targets, proposed.files, record.round):
        targets = desk.draft_targets(proposed.files, record.round)
    targets = desk.sign_targets(targets)
    if added := targets != proposed.targets:
        files = {**proposed.files, **desk.roots, TARGETS: targets}
        commit = commit_latest(repo, proposed.manifest, files, author(name))
        _push(repo, state, proposed, commit)
    have, need = counted(desk.root, "targets", targets)
    proposed_config = parse_hubfile(proposed.files[HUB_FILE].decode("utf-8", "replace"))
    settings = changed_settings(state.config, proposed_config)
    return Signature(record, have, need, added, tuple(settings))


def _push(repo: HubRepo, state: HubState, proposed: Proposed, commit: str) -> None:
    updates = [
        RefUpdate(state.refs.latest, state.commit, state.commit),
        RefUpdate(state.refs.next(proposed.number), commit, proposed.latest),
    ]
    try:
        repo.push(updates)
    except PushRejected as error:
        raise PushRejected(
            f"round {proposed.number} was signed or proposed anew meanwhile.",
            hint=f"moshi-hub sign {proposed.number}   (signs what is there now)",
            refs=error.refs,
        ) from error


def _check_files(repo: HubRepo, source: str, state: HubState, proposed: Proposed) -> None:
    """Insist that the proposal extends the hub's state and is what its branch shows to readers."""
    manifest, files = proposed.manifest, proposed.files
    record = manifest.newest
    if record.round != state.newest.round + 1 or manifest != extend(state.manifest, record):
        raise UntrustedHub(
            f"the proposed round {record.round} does not extend round {state.newest.round}.",
            hint=ADVICE,
        )
    check_chain(manifest.rounds)
    shown = {
        round_path(record.round): (dump(record), MAX_RECORD_BYTES),
        HUB_FILE: (files[HUB_FILE], MAX_HUBFILE_BYTES),
        TOKENIZER_FILE: (files[TOKENIZER_FILE], MAX_TOKENIZER_BYTES),
    }
    for path, (wanted, limit) in shown.items():
        if _read(repo, source, path, limit) != wanted:
            raise UntrustedHub(
                f"{path} on the round's branch is not what would be published.", hint=ADVICE
            )
    if sha256_bytes(files[TOKENIZER_FILE]) != record.tokenizer:
        raise UntrustedHub("the proposed tokenizer is not the one of its round.", hint=ADVICE)


def _read(repo: HubRepo, commit: str, path: str, limit: int) -> bytes | None:
    try:
        return repo.read(commit, path, limit=limit)
    except CorruptRecord:  # not there, or no plain file
        return None


def _recompute(
    replica: Replica,
    source: str,
    snapshot: Snapshot,
    record: Round,
    rules: Rules,
    find_strategy: StrategyFinder,
) -> None:
    contributions = read_contributions(replica.repo, source, record)
    if not contributions:
        raise UntrustedHub(f"round {record.round} names no contributions.", hint=ADVICE)
    if weigh(list(contributions.values()), rules) != record.contributions:
        raise UntrustedHub("the round weighs contributions other than by the rules.", hint=ADVICE)
    check_signatures(replica.repo, source, record, contributions)
    check_one_per_key(record, replica.chain(snapshot.state, first_rival(record)))
    place = _deltas(record)
    sent = {entry.id: entry.delta.files[0].sha256 for entry in contributions.values()}
    _compare_deltas(record, place, sent)
    with replica.scratch() as scratch, replica.workspace() as files:
        folder = fetch_locations(scratch, [place], files)[0]
        weights = grown(aggregate(snapshot.load(), record, folder, find_strategy), record)
        _check_weights(weights, record, "what its contributions make")


def _take_over(
    replica: Replica,
    snapshot: Snapshot,
    record: Round,
    origin: Origin,
    upstream: Replica | None,
) -> None:
    """Of a round that takes another hub's weights: that it is one, and that its step leads there.

    The record alone proves nothing: whoever can push a proposal can name any weights in it.
    """
    stand = stand_of(replica.chain(snapshot.state, 0))
    if stand is None or stand.origin.hub != origin.hub:
        on = f"stands on hub {stand.origin.hub}" if stand else "did not begin with another hub's"
        raise UntrustedHub(
            f"round {record.round} takes a round of hub {origin.hub}, and this hub {on}.",
            hint=ADVICE,
        )
    if origin.round <= stand.origin.round:
        raise UntrustedHub(
            f"round {record.round} takes round {origin.round} of hub {origin.hub}; "
            f"round {stand.number} has taken round {stand.origin.round} already.",
            hint=ADVICE,
        )
    if upstream is None:
        raise Unseen(
            f"round {record.round} takes round {origin.round} of hub {origin.hub}, by its own "
            "word only.",
            hint="--upstream URL   (of that hub: compares them before it signs)",
        )
    check_taken(record, origin, upstream)
    if record.update is None:
        raise UntrustedHub(f"round {record.round} has no update.", hint=ADVICE)
    with replica.scratch() as scratch, replica.workspace() as files:
        folder = fetch_locations(scratch, [record.update.location], files)[0]
        weights = advance(snapshot.load(), record, folder)
        if bad := not_finite(weights):
            raise UntrustedHub(f"{bad!r} of round {record.round} is not finite.", hint=ADVICE)
        _check_weights(weights, record, "what its step leads to")


def _check_weights(weights: Weights, record: Round, what: str) -> None:
    found = weights_digest(weights)
    if found != record.weights:
        raise UntrustedHub(
            f"round {record.round} is not {what} "
            f"(recomputed {found[:12]}, proposed {record.weights[:12]}).",
            hint=ADVICE,
        )


def _deltas(record: Round) -> Location:
    """Where the round's deltas lie."""
    if record.archive:
        return record.archive
    if record.update is None or record.update.kind != "deltas":
        raise UntrustedHub(f"round {record.round} does not show its deltas.", hint=ADVICE)
    return record.update.location


def _compare_deltas(record: Round, place: Location, sent: Mapping[str, str]) -> None:
    recorded = {file.name: file.sha256 for file in place.files}
    for merged in record.contributions:
        if recorded.get(delta_name(merged)) != sent[merged.id]:
            raise UntrustedHub(
                f"the delta of {merged.id[:12]} is not its contributor's.", hint=ADVICE
            )
