"""One merge, from the open contributions to a proposed or published round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moshi_fl.aggregate import get_strategy
from moshi_fl.errors import HubError, MoshiError
from moshi_fl.history import SIGNED_FILES, HubState, round_branch
from moshi_fl.hubfile import HubConfig
from moshi_fl.records import Contribution, Round, dump
from moshi_fl.replica import Replica
from moshi_fl.restore import StrategyFinder
from moshi_fl.signed.files import TARGETS
from moshi_fl.store import is_local
from moshi_hub.announce import announce, announce_past, propose_round
from moshi_hub.choice import choose, kept, select_from, strategy_of
from moshi_hub.cleanup import clean_up, settle
from moshi_hub.drift import drifts
from moshi_hub.figures import FIGURES_FILE, Explainer
from moshi_hub.judging import Decided, held, without_gain
from moshi_hub.keys import KeyStore, Passphrase, passphrase_from_environment
from moshi_hub.metadata import Desk, utc_now
from moshi_hub.opened import OpenRound, look
from moshi_hub.pending import decided_before, record_arrivals, refuse_again
from moshi_hub.propose import Evaluator, Proposal, propose
from moshi_hub.proposed import REPORT_FILE, fetch_proposed
from moshi_hub.publish import (
    Built,
    author,
    build_round,
    publish_proposed,
    push_proposed,
    push_published,
)
from moshi_hub.report import Findings, pull_request_body, round_report
from moshi_hub.samples import Sampler, Samples


@dataclass(frozen=True)
class Options:
    """What a maintainer may decide about one merge."""

    publish: bool = False
    dry_run: bool = False
    strategy: str | None = None
    exclude: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    """Beginnings of ids of disputed contributions that the maintainer accepts."""
    name: str = "moshi-hub"
    if_ready: bool = False
    """Raise ``NothingToMerge`` where the same round is proposed already; record who came first."""


Gate = Callable[[OpenRound, Path], Decided | None]
"""Evaluates an open round, given its working folder; None where there is nothing to do it with."""


@dataclass(frozen=True)
class Outcome:
    """What a merge did, or would do."""

    open_round: OpenRound
    proposal: Proposal
    built: Built | None
    waiting: tuple[Contribution, ...]
    update_bytes: int
    keyframe_bytes: int
    leftovers: str = ""
    """Why the clean-up after publishing is not complete; empty when it is."""
    page: str = ""
    """The pull request of a proposed round; empty where there is no forge."""


def merge(
    replica: Replica,
    options: Options,
    *,
    evaluator: Callable[[HubConfig], Evaluator | None],
    find_strategy: StrategyFinder = get_strategy,
    passphrase: Passphrase = passphrase_from_environment,
    gate: Gate | None = None,
    sampler: Sampler | None = None,
    explainer: Explainer | None = None,
) -> Outcome:
    """Merge the open contributions into the next round.

    Args:
        replica: The hub's copy on this machine.
        options: The maintainer's decisions.
        evaluator: Gives what measures held-out loss, or None where there is no held-out data.
        find_strategy: Looks up an aggregation strategy by name.
        passphrase: Gives the passphrase of a key that has one.
        gate: Gives the verdicts on the open contributions; None takes all that pass ``look``.
        sampler: Lets the model speak before and after, for the report.
        explainer: Tells more of it than its loss, before and after.

    Raises:
        HubError: Too few contributions; someone else published first; or the keys here do not
            suffice to publish.
    """
    with replica.workspace() as folder:
        found, left = look(replica, folder), ""
        if options.if_ready:
            record_arrivals(replica, found, options.name)
        if options.publish:
            announce_past(replica, found)
            found, left = _finish_clean_up(replica, found)
        if options.publish and not options.dry_run:
            desk_for(replica, found.snapshot.state, found.rules.config, passphrase).require_keys()
        again = options.if_ready and not options.publish
        if again:
            out, taken = decided_before(replica, found)
            options = replace(
                options, exclude=(*options.exclude, *out), accept=(*options.accept, *taken)
            )
            refuse_again(replica, found, kept(found, options.exclude))  # before it is measured
        decided = gate(found, folder) if gate else None
        late: set[str] = set()
        if decided:
            found = replace(found, verdicts=without_gain(found.verdicts, decided.verdicts))
            late = held(found.accepted, decided.verdicts, options.accept)
        found, chosen, waiting = choose(found, options.exclude, folder / "deltas", late)
        if again:
            refuse_again(replica, found, chosen)
        proposal = propose(
            found.snapshot.state,
            found.rules,
            found.snapshot.load(),
            chosen,
            folder,
            strategy=strategy_of(found, options.strategy),
            find_strategy=find_strategy,
            evaluate=evaluator(found.rules.config),
        )
        absent = {entry.id for entry in found.accepted} - {
            c.id for c in kept(found, options.exclude)
        }
        proposal = replace(proposal, decided=decided, left_out=tuple(sorted(absent)))
        if options.dry_run:
            return _outcome(found, proposal, None, waiting)
        findings = findings_on(replica, found, proposal, waiting, sampler, explainer)
        outcome = push_round(replica, found, findings, options, passphrase)
        return replace(outcome, leftovers=" ".join(filter(None, [left, outcome.leftovers])))


def desk_for(
    replica: Replica,
    state: HubState,
    config: HubConfig,
    passphrase: Passphrase = passphrase_from_environment,
) -> Desk:
    """Where the hub's next metadata is signed: on top of what was just verified.

    All roots come from the hub: this machine may have been pinned to a later one than the first.
    """
    metadata = {name: data for name, data in state.files.items() if name not in SIGNED_FILES}
    store = KeyStore(replica.home, state.config.hub.id, passphrase=passphrase)
    return Desk(metadata, store, config.trust, utc_now())


def _finish_clean_up(replica: Replica, found: OpenRound) -> tuple[OpenRound, str]:
    """Remove what a published round has taken: the merge that should have done it was killed.

    Returns:
        What is open without it, and what went wrong, in words.
    """
    state = found.snapshot.state
    taken = {
        merged.id
        for record in replica.chain(state, min(found.rules.bases))
        for merged in record.contributions
    }
    done = tuple(v for v in found.verdicts if v.contribution and v.contribution.id in taken)
    if not done:
        return found, ""
    left = clean_up(replica.repo, state, found.rules, settle(done, found.branches, set()))
    return replace(found, verdicts=tuple(v for v in found.verdicts if v not in done)), left


def findings_on(
    replica: Replica,
    found: OpenRound,
    proposal: Proposal,
    waiting: Sequence[Contribution],
    sampler: Sampler | None,
    explainer: Explainer | None = None,
) -> Findings:
    """What a maintainer should know of a round before publishing it."""
    state, base = found.snapshot.state, found.snapshot.load()
    settled = {*proposal.contributions, *(entry.id for entry in waiting)}
    before, after = (base, state.tokenizer), (proposal.weights, proposal.tokenizer)
    samples = sampler(proposal.config, before, after) if sampler else Samples()
    return Findings(
        proposal=proposal,
        verdicts=found.verdicts,
        waiting=waiting,
        excluded=[entry for entry in found.accepted if entry.id not in settled],
        trained=found.trained,
        figures=explainer(proposal.config, before, after) if explainer else None,
        drift=drifts(base, proposal.weights),
        samples=samples,
        address="" if is_local(replica.url) else replica.repo.shown_url,
    )


def push_round(
    replica: Replica,
    found: OpenRound,
    findings: Findings,
    options: Options,
    passphrase: Passphrase,
) -> Outcome:
    """Publish a round, or propose it, as the maintainer has decided."""
    repo, state = replica.repo, found.snapshot.state
    proposal, waiting = findings.proposal, findings.waiting
    desk = desk_for(replica, state, proposal.config, passphrase)

    def sign(files: Mapping[str, bytes], number: int) -> Mapping[str, bytes]:
        metadata = desk.propose(files, number)
        return desk.publish(metadata[TARGETS]) if options.publish else metadata

    texts = {REPORT_FILE: round_report(findings).encode()}
    if findings.figures:
        texts[FIGURES_FILE] = dump(findings.figures)
    by = author(options.name)
    built = build_round(repo, state, found.main, proposal, texts, by, found.signatures, sign)
    present = repo.remote_refs(f"{state.refs.prefix}*", round_branch(built.record.round))
    if not options.publish:
        push_proposed(repo, state, built, present)
        page, problem = propose_round(found.offers.forge, built.record, pull_request_body(findings))
        return replace(_outcome(found, proposal, built, waiting, problem), page=page)
    push_published(repo, state, built, present)
    still_open = {entry.id for entry in (*waiting, *findings.excluded)}
    leftovers = _clean_up(replica, found, still_open, built.record)
    return _outcome(found, proposal, built, waiting, leftovers)


def _clean_up(replica: Replica, found: OpenRound, waiting: set[str], record: Round) -> str:
    """Delete what the round has settled, and tell contributors on a forge; what went wrong."""
    told = announce(replica, found, record)
    return " ".join(filter(None, [_delete(replica, found, waiting), *told]))


def _delete(replica: Replica, found: OpenRound, waiting: set[str]) -> str:
    try:
        state = replica.pull().state
    except MoshiError as error:  # the round is published, whatever else goes wrong
        return str(error)
    settled = settle(found.verdicts, found.branches, waiting)
    return clean_up(replica.repo, state, found.rules, settled)


def _outcome(
    found: OpenRound,
    proposal: Proposal,
    built: Built | None,
    waiting: Sequence[Contribution],
    leftovers: str = "",
) -> Outcome:
    update = sum(path.stat().st_size for path in proposal.update_files)
    keyframe = sum(path.stat().st_size for path in proposal.keyframe_files)
    return Outcome(found, proposal, built, tuple(waiting), update, keyframe, leftovers)


def publish_round(
    replica: Replica,
    number: int | None = None,
    *,
    passphrase: Passphrase = passphrase_from_environment,
    name: str = "moshi-hub",
) -> tuple[Round, str]:
    """Publish a proposed round, then remove what it has settled.

    Args:
        replica: The hub's copy on this machine.
        number: Which round; the next one when None.
        passphrase: Gives the passphrase of a key that has one.
        name: Who makes the commit.

    Returns:
        The round's record, and why the clean-up is not complete (empty when it is).

    Raises:
        TooFewSignatures: Not enough maintainers have signed it.
    """
    with replica.workspace() as folder:
        found = look(replica, folder)
        state = found.snapshot.state
        wanted = found.snapshot.round + 1 if number is None else number
        proposed = fetch_proposed(replica.repo, state.refs, wanted)
        desk = desk_for(replica, state, found.rules.config, passphrase)
        if not desk.is_next(proposed.targets, proposed.files, wanted):
            raise HubError(
                f"what was signed of round {wanted} does not follow on what the hub has now.",
                hint=f"moshi-hub sign {wanted}   (signs it anew, on top of that)",
            )
        metadata = desk.publish(proposed.targets)
        publish_proposed(replica.repo, state, found.main, proposed, metadata, author(name))
        record = replica.pull().record
        taken = {merged.id for merged in record.contributions}
        dropped = select_from(found, found.intake, folder / "deltas").dropped
        waiting = {entry.id for entry in found.accepted} - taken - set(dropped)
        return record, _clean_up(replica, found, waiting, record)


def finish(replica: Replica) -> list[str]:
    """What the publishing of earlier rounds left undone: who is to be told, and branches to delete.

    Returns:
        What went wrong, in words.
    """
    with replica.workspace() as folder:
        found = look(replica, folder)
        problems, _ = announce_past(replica, found)
        _, left = _finish_clean_up(replica, found)
        return [*problems, *filter(None, [left])]
