"""One contribution, named by the commit that its branch has now.

A CI is told a commit and looks minutes later. What it judges, measures and comments on is that
commit or nothing: a branch that has moved meanwhile is refused, and its new head has its own run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.errors import HubError
from moshi_fl.forge import Forge, Proposal
from moshi_fl.replica import Replica
from moshi_hub.offers import PREFIX
from moshi_hub.opened import OpenRound, look
from moshi_hub.results import GateResult, gate_result
from moshi_hub.verify import Verdict


@dataclass(frozen=True)
class Pinned:
    """What was found under a commit.

    Attributes:
        found: The open round, with this contribution alone.
        head: The commit.
        folder: Working folder, with the delta if the gate accepts it.
    """

    found: OpenRound
    head: str
    folder: Path

    @property
    def verdict(self) -> Verdict:
        """What the gate says of it.

        Anyone can put a branch of another name on the same commit: what is a contribution counts.
        """
        found = self.found.verdicts
        return min(found, key=lambda v: (not v.accepted, v.contribution is None, v.is_settled))

    @property
    def proposal(self) -> Proposal | None:
        """Its pull request, if it has one."""
        return self.found.offers.pull_requests.get(self.verdict.branch)

    def as_result(self) -> bytes:
        """The verdict as a file for other jobs."""
        number = self.proposal.number if self.proposal else 0
        rules, entry = self.found.rules, self.verdict.contribution
        trained = self.found.trained.get(entry.id, "") if entry else ""
        hub, round_ = rules.config.hub.id, rules.round
        return gate_result(hub, round_, self.verdict, self.head, number, trained)


@contextmanager
def pinned(replica: Replica, head: str) -> Iterator[Pinned]:
    """Judge what has this commit as its head, until the block ends.

    Raises:
        HubError: Nothing open has it, or it cannot be fetched just now.
    """
    with replica.workspace() as folder:
        found = look(replica, folder, head)
        if not found.verdicts:
            raise _nothing(head, " ".join(found.offers.problems))
        one = Pinned(found, head, folder)
        first = one.verdict
        if not first.is_settled:
            raise HubError(f"{head[:12]} cannot be judged now: {first.findings[0].message}")
        entry = first.contribution
        if entry and found.rules.seen.get(entry.delta.files[0].sha256) == entry.id:
            raise HubError(f"contribution {entry.id[:12]} is in a round already.")
        yield one


def _nothing(head: str, problems: str) -> HubError:
    why = problems or "it was closed or merged, its branch has moved, or its fork is gone."
    return HubError(
        f"no open contribution has the head {head[:12]}: {why}",
        hint="Nothing was judged or said. A new head has a run of its own.",
    )


def check_head(forge: Forge, gate: GateResult) -> Proposal:
    """The pull request of a verdict, which must still be what that is about.

    Raises:
        HubError: It was closed, or its branch has moved since.
    """
    for entry in forge.proposals(PREFIX):
        if entry.number == gate.pull_request:
            if entry.commit == gate.head:
                return entry
            raise HubError(
                f"pull request {gate.pull_request} has moved to {entry.commit[:12]}; "
                f"the verdict is about {gate.head[:12]}.",
                hint="Nothing was said. The new head has a run of its own.",
            )
    raise HubError(f"pull request {gate.pull_request} is no open contribution any more.")
