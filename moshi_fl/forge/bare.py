"""A Git repository without a forge: branches say all there is to say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moshi_fl.forge.base import Offer, Proposal, Status
from moshi_fl.store import HubRepo


@dataclass(frozen=True)
class BareGit:
    """The hub as a plain repository: what would be said on a forge stays unsaid."""

    repo: HubRepo

    def push_url(self) -> str:
        """The hub itself."""
        return self.repo.url

    def propose(self, offer: Offer) -> Proposal:
        """The branch is the proposal."""
        return Proposal(0, "", offer.branch, title=offer.title)

    def proposals(self, prefix: str = "") -> Iterator[Proposal]:
        """None: who can push branches has pushed them here."""
        return iter(())

    def say(self, number: int, body: str, *, marker: str) -> None:
        """Nowhere to say it."""

    def label(self, number: int, add: Sequence[str], remove: Sequence[str] = ()) -> None:
        """Nowhere to put it."""

    def close(self, number: int, body: str, *, marker: str) -> None:
        """Whoever merges deletes the branch."""

    def set_status(self, commit: str, status: Status) -> None:
        """Nowhere to show it."""

    def statuses(self, commit: str) -> dict[str, Status]:
        """None."""
        return {}

    def keys_of(self, login: str) -> tuple[str, ...]:
        """Nobody has a login here."""
        return ()
