"""What the records on main say about a hub's rounds, gathered for showing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moshi_fl.history import HubState, read_contributions
from moshi_fl.records import Contribution, Merged, Round
from moshi_fl.replica import Replica


@dataclass(frozen=True)
class Part:
    """A contribution's part in a round."""

    merged: Merged
    contribution: Contribution
    share: float  # of the round's weight
    outcome: str = ""
    gain: float | None = None  # nats per token that it was measured to bring, alone
    margin: float | None = None  # its standard error

    @property
    def credit(self) -> float:
        """The gain that counts for its contributor."""
        return max(self.gain or 0.0, 0.0) if self.outcome == "credit" else 0.0


@dataclass(frozen=True)
class Entry:
    """A round and who made it."""

    record: Round
    parts: tuple[Part, ...] = ()

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
class History:
    """All rounds of a hub, oldest first."""

    name: str
    hub: str
    model: str
    url: str
    entries: tuple[Entry, ...]
    evaluators: tuple[tuple[str, float, str], ...] = field(default=())
    """Owner, lower bound of the reputation, and standing of each evaluator."""

    @property
    def newest(self) -> Round:
        """The current round."""
        return self.entries[-1].record

    def people(self) -> list[Person]:
        """Contributors, most credit first, then most contributions, then by name."""
        found: dict[str, list[Part]] = defaultdict(list)
        for entry in self.entries:
            for part in entry.parts:
                found[identity_of(part.contribution)].append(part)
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


def identity_of(contribution: Contribution) -> str:
    """Who a contribution counts for."""
    return contribution.contributor


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
    entries = [_entry(replica, main, record) for record in replica.chain(state, 0)]
    return History(
        name=state.config.hub.name,
        hub=state.config.hub.id,
        model=_model_of(state),
        url=url.rstrip("/"),
        entries=tuple(entries),
    )


def _model_of(state: HubState) -> str:
    return f"{state.config.family}, {state.newest.parameters:,} parameters"


def _entry(replica: Replica, main: str, record: Round) -> Entry:
    contributions = read_contributions(replica.repo, main, record)
    return Entry(record, _parts(record.contributions, contributions))


def _parts(merged: Sequence[Merged], contributions: dict[str, Contribution]) -> tuple[Part, ...]:
    total = sum(entry.weight for entry in merged)
    return tuple(Part(entry, contributions[entry.id], entry.weight / total) for entry in merged)
