"""What a forge is asked for, whichever it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["pending", "success", "failure", "error"]


@dataclass(frozen=True)
class Offer:
    """A branch that asks to be reviewed.

    Attributes:
        branch: Its name, without ``refs/heads/``.
        base: The branch it wants to go into.
        title: One line.
        body: Markdown.
        labels: Names of labels; missing ones are made where the token may.
        anew: Whether another one is opened when the last one of this branch was closed.
    """

    branch: str
    base: str
    title: str
    body: str
    labels: tuple[str, ...] = ()
    anew: bool = False


@dataclass(frozen=True)
class Proposal:
    """A pull request as the forge tells it. Its texts are a stranger's.

    Attributes:
        number: Its number; 0 where a forge has no pull requests.
        url: Where a person looks at it, or can open it; empty where there is no page for people.
        branch: Name of its branch.
        commit: What the branch pointed to when the forge was asked.
        clone_url: Fork that holds the branch; None when it is the hub's own, is gone, or lies
            elsewhere than on the forge.
        author: Login of who opened it.
        is_open: Whether it waits.
        title: One line.
        labels: Names of its labels.
    """

    number: int
    url: str
    branch: str
    commit: str = ""
    clone_url: str | None = None
    author: str = ""
    is_open: bool = True
    title: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """What a check says of a commit: one line, and where to read more."""

    context: str
    state: State
    description: str
    url: str = ""


class Forge(Protocol):
    """Pull requests, or the nearest thing to them."""

    def push_url(self) -> str:
        """Where this user pushes branches: the hub itself, or a fork that is made if need be.

        Raises:
            ForgeError: The forge refuses or cannot be reached.
        """
        ...

    def propose(self, offer: Offer) -> Proposal:
        """Open a pull request for a branch, or bring the one there is up to date."""
        ...

    def proposals(self, prefix: str = "") -> Iterator[Proposal]:
        """Open pull requests whose branches begin so, oldest first."""
        ...

    def say(self, number: int, body: str, *, marker: str) -> None:
        """The one comment of this marker: made at first, edited from then on."""
        ...

    def label(self, number: int, add: Sequence[str], remove: Sequence[str] = ()) -> None:
        """Add and remove labels; those that are not there are no error."""
        ...

    def close(self, number: int, body: str, *, marker: str) -> None:
        """Say a last word and close; nothing to do when it is closed already."""
        ...

    def set_status(self, commit: str, status: Status) -> None:
        """What a check says of a commit."""
        ...

    def statuses(self, commit: str) -> dict[str, Status]:
        """Newest status of each check of a commit, by context."""
        ...

    def keys_of(self, login: str) -> tuple[str, ...]:
        """Public SSH keys that a user has published."""
        ...
