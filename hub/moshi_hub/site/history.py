"""What the records on main say about a hub's rounds, gathered for showing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.errors import CorruptRecord
from moshi_fl.evidence import MICRO, Credit, Evaluators, Verdicts
from moshi_fl.history import HubState, read_contributions, round_path
from moshi_fl.records import Contribution, Merged, Round
from moshi_fl.replica import Replica
from moshi_fl.rules import owner_of
from moshi_fl.trusted import read_evaluators, read_ledger, read_verdicts
from moshi_fl.upstream import Origin, origin_of
from moshi_hub.figures import MAX_FIGURES_BYTES, RoundFigures, figures_path, read_figures
from moshi_hub.trust import Reputation, reputations, status

ROUND_FILES = "rounds/*/round.json"


@dataclass(frozen=True)
class Part:
    """A contribution's part in a round."""

    merged: Merged
    contribution: Contribution
    share: float  # of the round's weight
    entry: Credit | None = None  # its line in the ledger

    @property
    def is_measured(self) -> bool:
        """Whether evaluators have measured it."""
        return self.entry is not None and self.entry.outcome != "unmeasured"

    @property
    def gain(self) -> float | None:
        """Nats per token that it was measured to bring, alone."""
        return self.entry.gain / MICRO if self.entry and self.is_measured else None

    @property
    def margin(self) -> float | None:
        """Standard error of the gain."""
        return self.entry.standard_error / MICRO if self.entry and self.is_measured else None

    @property
    def credit(self) -> float:
        """The gain that counts for its contributor."""
        return self.entry.credit / MICRO if self.entry else 0.0


@dataclass(frozen=True)
class Entry:
    """A round and who made it."""

    record: Round
    parts: tuple[Part, ...] = ()
    commit: str = ""
    """The commit that brought it to main."""
    figures: RoundFigures | None = None
    """What whoever made it has measured beside its loss."""

    @property
    def origin(self) -> Origin | None:
        """What it takes of another hub."""
        return origin_of(self.record)

    @property
    def update_bytes(self) -> int:
        """Bytes of what leads to it."""
        return self.record.update.location.bytes if self.record.update else 0

    @property
    def keyframe_bytes(self) -> int:
        """Bytes of its whole weights, where they are published."""
        return self.record.keyframe.bytes if self.record.keyframe else 0


@dataclass(frozen=True)
class Person:
    """What one contributor brought: a name and the identity behind it."""

    name: str
    identity: str
    contributions: int
    credit: float


@dataclass(frozen=True)
class Juror:
    """An evaluator, and what the rounds say about it."""

    owner: str
    reputation: float  # lower bound
    standing: str


@dataclass(frozen=True)
class History:
    """All rounds of a hub, oldest first."""

    name: str
    hub: str
    model: str
    url: str
    entries: tuple[Entry, ...]
    evaluators: tuple[Juror, ...] = ()

    @property
    def newest(self) -> Round:
        """The current round."""
        return self.entries[-1].record

    def people_so_far(self) -> list[tuple[int, int]]:
        """How many identities had contributed by each round."""
        seen: set[str] = set()
        found = []
        for entry in self.entries:
            seen |= {part.merged.owner for part in entry.parts}
            found.append((entry.record.round, len(seen)))
        return found

    def people(self) -> list[Person]:
        """Contributors, most credit first, then most contributions, then by name."""
        found: dict[str, list[Part]] = defaultdict(list)
        for entry in self.entries:
            for part in entry.parts:
                found[owner_of(part.contribution)].append(part)
        people = [
            Person(
                name=parts[-1].contribution.contributor,
                identity=identity,
                contributions=len(parts),
                credit=sum(part.credit for part in parts),
            )
            for identity, parts in found.items()
        ]
        return sorted(people, key=lambda p: (-p.credit, -p.contributions, p.name))


def gather(replica: Replica, url: str = "") -> History:
    """Read all rounds of a hub.

    Args:
        replica: The hub's copy on this machine.
        url: Where a browser finds the repository, for links; empty for none.

    Raises:
        HubError, UntrustedHub: As for any look at the hub.
    """
    state = replica.look()
    main = replica.fetch_main()
    rounds = replica.chain(state, 0)
    commits = replica.repo.added(main, ROUND_FILES)
    listed = read_evaluators(replica.repo, main)
    return History(
        name=state.config.hub.name,
        hub=state.config.hub.id,
        model=_model_of(state),
        url=url.rstrip("/"),
        entries=tuple(_entry(replica, main, record, commits) for record in rounds),
        evaluators=_jurors(listed, read_verdicts(replica.repo, main, rounds)) if listed else (),
    )


def _model_of(state: HubState) -> str:
    return f"{state.config.family}, {state.newest.parameters:,} parameters"


def _figures(replica: Replica, main: str, number: int) -> RoundFigures | None:
    """What main has of a round; None where that is missing, or no such file."""
    try:
        data = replica.repo.read(main, figures_path(number), limit=MAX_FIGURES_BYTES)
    except CorruptRecord:
        return None
    return read_figures(data)


def _entry(replica: Replica, main: str, record: Round, commits: Mapping[str, str]) -> Entry:
    contributions = read_contributions(replica.repo, main, record)
    ledger = read_ledger(replica.repo, main, record)
    lines = {entry.contribution: entry for entry in ledger.entries} if ledger else {}
    total = sum(merged.weight for merged in record.contributions)
    parts = (
        Part(merged, contributions[merged.id], merged.weight / total, lines.get(merged.id))
        for merged in record.contributions
    )
    commit = commits.get(round_path(record.round), "")
    return Entry(record, tuple(parts), commit, _figures(replica, main, record.round))


def _jurors(listed: Evaluators, rounds: Sequence[Verdicts | None]) -> tuple[Juror, ...]:
    known = reputations(rounds)
    found = []
    for entry in listed.evaluators:
        reputation = known.get(entry.key, Reputation())
        standing = status(entry, reputation)
        found.append(Juror(entry.owner, reputation.lower_bound, standing))
    return tuple(sorted(found, key=lambda juror: (-juror.reputation, juror.owner)))
