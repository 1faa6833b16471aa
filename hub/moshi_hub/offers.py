"""Where open contributions lie: on branches of the hub, and of forks with an open pull request.

A forge says which forks to look at; whether a fork holds what its pull request showed is checked
here, and everything else by the gate, as for any branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moshi_fl.config import load_settings
from moshi_fl.errors import HubError
from moshi_fl.forge import Forge, Proposal, open_forge
from moshi_fl.history import branch_place
from moshi_fl.replica import Replica
from moshi_fl.store import HubRepo

HEADS = "refs/heads/"
PREFIX = "contribute/"
MAX_FORKS = 500
"""Forks that one look visits; the rest waits until some of these are merged."""


@dataclass(frozen=True)
class Place:
    """A repository with open contributions, and what it had when it was listed."""

    repo: HubRepo
    refs: Mapping[str, str]
    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    """Branch to its pull request."""

    def beside(self, scratch: HubRepo) -> HubRepo:
        """A throw-away store that fetches from here."""
        if scratch.url == self.repo.url:
            return scratch
        return HubRepo(scratch.path, self.repo.url, timeout=scratch.timeout)


@dataclass(frozen=True)
class Offers:
    """Open contributions of all places.

    Attributes:
        forge: Where pull requests are, if there are any.
        places: Branch to the place that holds it.
        beside: The same, and what else the repository of a commit that is asked for has open.
        problems: Why a fork could not be looked at.
    """

    forge: Forge
    places: Mapping[str, Place]
    beside: Mapping[str, Place]
    problems: tuple[str, ...] = ()

    @property
    def branches(self) -> dict[str, str]:
        """Branches with their commits, in order of name."""
        return {branch: self.places[branch].refs[branch] for branch in sorted(self.places)}

    def on(self, repo: HubRepo) -> dict[str, str]:
        """Those of the branches, with their commits, that lie in this repository."""
        return {
            branch: place.refs[branch]
            for branch, place in sorted(self.places.items())
            if place.repo.url == repo.url
        }

    @property
    def pull_requests(self) -> dict[str, Proposal]:
        """Branch to its pull request, where it has one."""
        found = ((branch, place.proposals.get(branch)) for branch, place in self.places.items())
        return {branch: proposal for branch, proposal in found if proposal}


def open_offers(replica: Replica, refs: Mapping[str, str], head: str = "") -> Offers:
    """Find the open contributions.

    Args:
        replica: The hub's copy on this machine.
        refs: The hub's own refs, as listed.
        head: Only what has this commit as its head now, and what is beside it.

    A forge that does not answer hides forks; the hub's own branches are judged all the same.
    """
    forge = open_forge(replica.repo, load_settings().github_api)
    proposals, problems = _proposals(forge)
    if head:
        near = {entry.clone_url for entry in proposals if entry.commit == head}
        proposals = [entry for entry in proposals if entry.clone_url in near]
    own = Place(replica.repo, refs, _own(proposals, refs))
    places = {ref: own for ref in refs if ref.startswith(HEADS + PREFIX)}
    if head:
        places |= _misnamed(replica, [entry for entry in proposals if entry.commit == head])
    for url, entries in _by_fork(proposals).items():
        try:
            place = _fork(replica, url, entries)
        except HubError as error:
            problems.append(str(error))
            continue
        for branch in place.proposals:
            places.setdefault(branch, place)
    asked = {name: place for name, place in places.items() if head in {"", place.refs[name]}}
    homes = {place.repo.url for place in asked.values()}
    beside = {name: place for name, place in places.items() if place.repo.url in homes}
    return Offers(forge, asked, beside, tuple(problems))


def _proposals(forge: Forge) -> tuple[list[Proposal], list[str]]:
    try:
        return list(forge.proposals(PREFIX)), []
    except HubError as error:
        return [], [f"pull requests from forks are not seen: {error.in_full}"]


def _own(proposals: list[Proposal], refs: Mapping[str, str]) -> dict[str, Proposal]:
    """Pull requests of the hub's own branches; a fork's branch of the same name is another one."""
    return {
        HEADS + entry.branch: entry
        for entry in reversed(proposals)  # of several, the oldest counts
        if entry.clone_url is None and refs.get(HEADS + entry.branch) == entry.commit
    }


def _misnamed(replica: Replica, proposals: list[Proposal]) -> dict[str, Place]:
    """Pull requests whose branches name no contribution; nothing of them is fetched."""
    odd = {HEADS + entry.branch: entry for entry in proposals}
    return {
        branch: Place(replica.repo, {branch: entry.commit}, {branch: entry})
        for branch, entry in odd.items()
        if branch_place(branch) is None
    }


def _by_fork(proposals: list[Proposal]) -> dict[str, list[Proposal]]:
    """Pull requests by the fork that holds their branches, oldest first."""
    found: dict[str, list[Proposal]] = {}
    for entry in proposals:
        url = entry.clone_url
        if url is None or branch_place(HEADS + entry.branch) is None:
            continue
        if url in found or len(found) < MAX_FORKS:
            found.setdefault(url, []).append(entry)
    return found


def _fork(replica: Replica, url: str, entries: list[Proposal]) -> Place:
    repo = HubRepo(replica.repo.path, url, timeout=replica.timeout)
    refs = repo.remote_refs()
    shown = {HEADS + entry.branch: entry for entry in entries}
    held = {branch: entry for branch, entry in shown.items() if refs.get(branch) == entry.commit}
    return Place(repo, refs, held)
