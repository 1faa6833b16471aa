"""For timers: whether there is a round to make or to publish now, or one that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from moshi_fl.errors import HubError
from moshi_fl.records import Contribution
from moshi_fl.replica import Replica
from moshi_fl.store import PushRejected
from moshi_fl.upstream import Origin, takes_upstream
from moshi_hub.announce import show_round
from moshi_hub.intake import publish_intake
from moshi_hub.opened import OpenRound
from moshi_hub.proposed import decisions, has_round, proposed_now, proposed_report
from moshi_hub.publish import author


class NothingToMerge(HubError):
    """There is no round to make now. Looking again later is all that is to do."""


def record_arrivals(replica: Replica, found: OpenRound, name: str) -> None:
    """Put on the hub who came first: a machine that forgets everything merges here."""
    names, intake = found.snapshot.state.refs, found.arrivals.intake
    if intake.seen:
        with suppress(PushRejected):  # another machine did so in this moment
            publish_intake(replica, names, intake, author(name))


def decided_before(replica: Replica, found: OpenRound) -> tuple[set[str], set[str]]:
    """What a maintainer left out of the round that is proposed now, and accepted though disputed.

    Returns:
        The ids of each that are open still.
    """
    state, number = found.snapshot.state, found.snapshot.round + 1
    proposed = proposed_now(replica.repo, state, number)
    if proposed is None or not proposed.follows(found.snapshot.record):
        return set(), set()
    is_open = {entry.id for entry in found.intake}
    excluded, accepted = decisions(replica.repo, proposed)
    return excluded & is_open, accepted & is_open


def refuse_again(
    replica: Replica,
    found: OpenRound,
    chosen: Sequence[Contribution],
    origin: Origin | None = None,
) -> None:
    """Leave a round that is under review as it is, while nothing has changed.

    Args:
        replica: The hub's copy on this machine.
        found: The open round.
        chosen: What a round would be made of now.
        origin: The round of another hub that it would take instead.

    Raises:
        NothingToMerge: It is proposed, with the same contributions, or merged and not published;
            or it takes another hub's round, and is not to take a newer one.
    """
    repo, number = replica.repo, found.snapshot.round + 1
    proposed = proposed_now(repo, found.snapshot.state, number)
    if proposed is None or not proposed.follows(found.snapshot.record):
        return
    record = proposed.manifest.newest
    if has_round(repo, found.main, record):
        raise NothingToMerge(
            f"round {number} is merged and waits to be published.", hint="moshi-hub publish"
        )
    if origin is None and takes_upstream(record):
        raise NothingToMerge(
            f"round {number} is proposed already: another hub's round, taken as it is.",
            hint="moshi-hub publish",
        )
    same = {entry.id for entry in chosen} == proposed.contributions
    same = same and (origin is None or record.strategy == origin.strategy)
    if same and proposed.branch and repo.parents(proposed.branch) == [found.main]:
        report = proposed_report(repo, proposed)
        problem = show_round(found.offers.forge, record, report, proposed.branch)
        said = f" It is not shown as a pull request: {problem}" if problem else ""
        raise NothingToMerge(f"round {number} is proposed already, with the same.{said}")


def is_on_main(replica: Replica, number: int | None = None) -> bool:
    """Whether main has a proposed round that is not published: somebody merged its pull request."""
    state, main = replica.look(), replica.fetch_main()
    wanted = state.newest.round + 1 if number is None else number
    proposed = proposed_now(replica.repo, state, wanted)
    return proposed is not None and has_round(replica.repo, main, proposed.manifest.newest)
