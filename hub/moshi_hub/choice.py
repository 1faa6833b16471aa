"""Which accepted contributions a round takes, and how: the hub's rules, a maintainer's word."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from moshi_fl.errors import ConfigError, HubError
from moshi_fl.records import Contribution, Strategy
from moshi_fl.rules import owner_of, strategy_options
from moshi_hub.likeness import likeness
from moshi_hub.opened import OpenRound
from moshi_hub.pending import NothingToMerge
from moshi_hub.selection import Candidate, Selection, select


def choose(
    found: OpenRound, exclude: Sequence[str], deltas: Path, late: Collection[str] = ()
) -> tuple[OpenRound, list[Contribution], list[Contribution]]:
    """Contributions that this round takes, and accepted ones that wait for the next.

    Args:
        found: The open round.
        exclude: Ids, or beginnings of ids, that the maintainer leaves out.
        deltas: Folder with the judged deltas.
        late: Ids that wait for the next round, whatever room there is.

    Returns:
        The open round with the verdicts on what selection left out, what is taken, what waits.

    Raises:
        HubError: Nothing open begins with an excluded id.
        NothingToMerge: Fewer are left than the hub demands.
    """
    _check_exclusions(found, exclude)
    staying = kept(found, exclude)
    held_back = [entry for entry in staying if entry.id in late]
    staying = [entry for entry in staying if entry.id not in late]
    selection = select_from(found, staying, deltas)
    found = _with_findings(found, selection)
    rules = found.rules.config.aggregation
    count = len(selection.taken) + len(selection.waiting)
    if count < rules.min_contributions:
        rejected = len(found.verdicts) - len(found.accepted)
        raise NothingToMerge(
            f"{count} contribution(s) to merge, this hub wants at least "
            f"{rules.min_contributions}; {rejected} rejected.",
            hint="moshi-hub verify   (shows each open contribution and why it was rejected)",
        )
    by_id = {contribution.id: contribution for contribution in staying}
    waiting = [*(by_id[i] for i in selection.waiting), *held_back]
    taken = [by_id[i] for i in selection.taken]
    return found, taken, sorted(waiting, key=lambda entry: entry.id)


def kept(found: OpenRound, exclude: Sequence[str]) -> list[Contribution]:
    """What passed the gate and is not excluded, in the order in which it was judged."""
    return [c for c in found.intake if not c.id.startswith(tuple(exclude))]


def _check_exclusions(found: OpenRound, exclude: Sequence[str]) -> None:
    for start in exclude:
        if not any(
            verdict.branch.rsplit("/", 1)[-1].startswith(start) for verdict in found.verdicts
        ):
            raise HubError(
                f"nothing is left out by --exclude {start}: no open contribution begins so.",
                hint="moshi-hub verify   (lists all)",
            )


def select_from(found: OpenRound, kept: Sequence[Contribution], deltas: Path) -> Selection:
    """What becomes of these accepted contributions, whose deltas are in a folder."""
    candidates = [Candidate(entry.id, owner_of(entry), entry.round) for entry in kept]
    limit = found.rules.config.aggregation.max_contributions
    return select(candidates, lambda some: likeness(found.rules, some, deltas), limit)


def _with_findings(found: OpenRound, selection: Selection) -> OpenRound:
    """The open round, with what selection says of those that never count."""
    verdicts = (
        replace(verdict, findings=(selection.dropped[verdict.contribution.id],))
        if verdict.contribution and verdict.contribution.id in selection.dropped
        else verdict
        for verdict in found.verdicts
    )
    return replace(found, verdicts=tuple(verdicts))


def strategy_of(found: OpenRound, override: str | None) -> Strategy:
    """How to aggregate: as ``hub.toml`` says, unless the maintainer says otherwise this once.

    Raises:
        ConfigError: ``hub.toml`` sets what only the rounds before can tell.
    """
    rules, newest = found.rules.config.aggregation, found.snapshot.record
    if "running_norm" in rules.options:
        raise ConfigError(
            "hub.toml: aggregation.options: running_norm follows from the rounds before.",
            hint="remove it; moshi-hub merge records it by itself.",
        )
    name = override or rules.strategy
    return Strategy(
        name=name,
        options=strategy_options(name, {} if override else rules.options, newest),
        server_learning_rate=rules.server_learning_rate,
    )
