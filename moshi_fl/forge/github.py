"""GitHub, and GitHub Enterprise Server: a hub's branches as pull requests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from moshi_fl.forge.address import Repository, find_token, parse_address
from moshi_fl.forge.api import Api, ForgeError
from moshi_fl.forge.bare import BareGit
from moshi_fl.forge.base import Forge, Offer, Proposal, State, Status
from moshi_fl.store import HubRepo

MAX_BODY = 65_535  # characters of a comment or a description; GitHub refuses 65,536
MAX_TITLE = 256
MAX_STATUS = 140  # characters of a status
JOB = "github-actions[bot]"  # stands for any app
NOT_A_USER = "not accessible by integration"  # what the token of a job is told
CUT = "\n\n*(shortened)*\n"
FORK_POLLS = 30
STATES: dict[str, State] = {
    "pending": "pending",
    "success": "success",
    "failure": "failure",
    "error": "error",
}


@dataclass(frozen=True)
class GitHub:
    """One repository on a GitHub.

    Args:
        repository: Which.
        api: How to speak to it.
        wait: Sleeps while a fork is being made.
    """

    repository: Repository
    api: Api
    wait: Callable[[float], None] = time.sleep

    @cached_property
    def login(self) -> str:
        """Whose token it is; empty without one. That of a job or an app has no user: ``JOB``.

        Raises:
            ForgeError: The token is not accepted.
        """
        if not self.api.token:
            return ""
        try:
            return str(self.api.get("user")["login"])
        except ForgeError as error:
            if error.status != 403 or NOT_A_USER not in str(error):  # a limit is 403, too
                raise
            return JOB

    @cached_property
    def _may_push(self) -> bool:
        here = self.repository.slug
        ours = os.environ.get("GITHUB_REPOSITORY") or here  # a job's token is its repository's
        if self.api.token and self.login == JOB and ours.lower() == here.lower():
            return True  # nothing says more
        there = self.api.get(f"repos/{self.repository.slug}")
        return bool(there.get("permissions", {}).get("push"))

    def push_url(self) -> str:
        """The hub where the token may push, else this user's fork, made if need be.

        Raises:
            ForgeError: The token is that of a job elsewhere, which has no fork.
        """
        if self._may_push or not self.api.token:
            return self.repository.clone_url
        if self.login == JOB:
            raise ForgeError(
                f"a job's or an app's token has no fork of {self.repository.slug} to push to.",
                hint="Set GH_TOKEN to a token of a user.",
            )
        return self._fork()

    def _fork(self) -> str:
        made = self.api.send("POST", f"repos/{self.repository.slug}/forks", {})
        slug = str(made["full_name"])
        for _ in range(FORK_POLLS):  # GitHub makes it in the background
            try:
                return str(self.api.get(f"repos/{slug}")["clone_url"])
            except ForgeError as error:
                if error.status != 404:
                    raise
            self.wait(2.0)
        raise ForgeError(f"the fork {slug} is not ready yet.", hint="Run the command again.")

    def propose(self, offer: Offer) -> Proposal:
        """Open the pull request of a branch, or bring the one there is up to date.

        A closed one stays closed and is returned as it is, unless the offer is to be made anew:
        GitHub reopens none whose branch was pushed anew since. Without a token nothing is opened:
        the proposal's ``url`` is the page on which a person can.
        """
        if not self.api.token:
            url = self.repository.compare_url(offer.base, quote(offer.branch))
            return Proposal(0, url, offer.branch, title=offer.title)
        found = self._find(offer.branch)
        if found is None or (offer.anew and found["state"] != "open"):
            found = self._open(offer)
        elif found["state"] == "open":
            found = self._update(found, offer)
        proposal = self._read(found)
        missing = [label for label in offer.labels if label not in proposal.labels]
        if missing and proposal.is_open:
            self._try_label(proposal.number, missing)
        return proposal

    def _find(self, branch: str) -> Any | None:
        """The newest pull request of the user's branch, open ones first."""
        owners = dict.fromkeys((self.login, self.repository.owner))
        for owner in owners:
            path = f"repos/{self.repository.slug}/pulls"
            found = list(self.api.pages(path, head=f"{owner}:{branch}", state="all"))
            found = [pull for pull in found if pull["head"]["ref"] == branch]
            if found:
                return max(found, key=lambda pull: (pull["state"] == "open", pull["number"]))
        return None

    def _open(self, offer: Offer) -> Any:
        path = f"repos/{self.repository.slug}/pulls"
        text = {"title": offer.title[:MAX_TITLE], "body": fitted(offer.body), "base": offer.base}
        head = offer.branch if self._may_push else f"{self.login}:{offer.branch}"
        try:
            # Nobody but its author shall change what a contribution's branch holds.
            body = {**text, "head": head, "maintainer_can_modify": False}
            return self.api.send("POST", path, body)
        except ForgeError as error:
            found = self._find(offer.branch) if error.status == 422 else None
            if found is None:
                raise
            return found  # another process of this user opened it meanwhile

    def _update(self, found: Any, offer: Offer) -> Any:
        text = {"title": offer.title[:MAX_TITLE], "body": fitted(offer.body)}
        if all((found.get(key) or "") == value for key, value in text.items()):
            return found
        path = f"repos/{self.repository.slug}/pulls/{found['number']}"
        return self.api.send("PATCH", path, text)

    def proposals(self, prefix: str = "") -> Iterator[Proposal]:
        """Open pull requests whose branches begin so, oldest first."""
        path = f"repos/{self.repository.slug}/pulls"
        for pull in self.api.pages(path, state="open", sort="created", direction="asc"):
            if str(pull["head"]["ref"]).startswith(prefix):
                yield self._read(pull)

    def proposal(self, number: int) -> Proposal:
        """One pull request."""
        return self._read(self.api.get(f"repos/{self.repository.slug}/pulls/{number}"))

    def _read(self, pull: Any) -> Proposal:
        return Proposal(
            number=int(pull["number"]),
            url=str(pull["html_url"]),
            branch=str(pull["head"]["ref"]),
            commit=str(pull["head"]["sha"]),
            clone_url=self._fork_of(pull),
            author=str((pull.get("user") or {}).get("login", "")),
            is_open=pull["state"] == "open",
            title=str(pull["title"]),
            labels=tuple(str(label["name"]) for label in pull.get("labels") or ()),
        )

    def _fork_of(self, pull: Any) -> str | None:
        url = str((pull["head"].get("repo") or {}).get("clone_url") or "")
        is_fork = url.startswith(f"{self.repository.web}/") and url != self.repository.clone_url
        return url if is_fork else None

    def say(self, number: int, body: str, *, marker: str) -> None:
        """The one comment of this marker: made at first, edited from then on.

        Only a comment of the token's own user counts: anyone can write a marker. An app is not told
        its name: to it, any app's counts, which no person's can be.
        """
        tag = f"<!-- moshi-fl:{marker} -->"
        text = fitted(f"{tag}\n{body}")
        mine = self._comment(number, tag)
        if mine is None:
            path = f"repos/{self.repository.slug}/issues/{number}/comments"
            self.api.send("POST", path, {"body": text})
        elif mine["body"] != text:
            path = f"repos/{self.repository.slug}/issues/comments/{mine['id']}"
            self.api.send("PATCH", path, {"body": text})

    def _comment(self, number: int, tag: str) -> Any | None:
        path = f"repos/{self.repository.slug}/issues/{number}/comments"
        for comment in self.api.pages(path):
            author = comment.get("user") or {}
            mine = author.get("login", "") == self.login
            mine = mine or (self.login == JOB and author.get("type", "") == "Bot")
            if mine and str(comment.get("body") or "").startswith(tag):
                return comment
        return None

    def label(self, number: int, add: Sequence[str], remove: Sequence[str] = ()) -> None:
        """Add and remove labels; those that are not there are no error."""
        path = f"repos/{self.repository.slug}/issues/{number}/labels"
        if add:
            self.api.send("POST", path, {"labels": list(add)})
        for name in remove:
            try:
                self.api.send("DELETE", f"{path}/{quote(name, safe='')}")
            except ForgeError as error:
                if error.status != 404:
                    raise

    def _try_label(self, number: int, names: Sequence[str]) -> None:
        """Who may not label (most contributors) still has their pull request."""
        try:
            self.label(number, names)
        except ForgeError as error:
            if error.status not in {403, 404}:
                raise

    def close(self, number: int, body: str, *, marker: str) -> None:
        """Say a last word and close; nothing to do when it is closed already."""
        if not self.proposal(number).is_open:
            return
        self.say(number, body, marker=marker)
        self.api.send("PATCH", f"repos/{self.repository.slug}/pulls/{number}", {"state": "closed"})

    def set_status(self, commit: str, status: Status) -> None:
        """What a check says of a commit; nothing is sent when it says so already."""
        if self.statuses(commit).get(status.context) == status:
            return
        body = {
            "state": status.state,
            "context": status.context,
            "description": status.description[:MAX_STATUS],
        }
        if status.url:
            body["target_url"] = status.url
        self.api.send("POST", f"repos/{self.repository.slug}/statuses/{commit}", body)

    def statuses(self, commit: str) -> dict[str, Status]:
        """Newest status of each check of a commit, by context."""
        newest: dict[str, Status] = {}
        for entry in self.api.pages(f"repos/{self.repository.slug}/commits/{commit}/statuses"):
            context = str(entry["context"])
            state = STATES.get(str(entry["state"]), "error")
            said, url = str(entry.get("description") or ""), str(entry.get("target_url") or "")
            newest.setdefault(context, Status(context, state, said, url))
        return newest

    def keys_of(self, login: str) -> tuple[str, ...]:
        """Public SSH keys that a user has published."""
        found = self.api.pages(f"users/{quote(login, safe='')}/keys")
        return tuple(str(entry["key"]) for entry in found)


def fitted(body: str) -> str:
    """A text that the forge takes: shortened where it is too long, and says so."""
    return body if len(body) <= MAX_BODY else body[: MAX_BODY - len(CUT)] + CUT


def open_forge(repo: HubRepo, api: str = "") -> Forge:
    """The forge of a hub's address: GitHub where it is there, else the bare repository.

    Args:
        repo: The hub's store on this machine.
        api: Base URL of a GitHub Enterprise server's API.
    """
    repository = parse_address(repo.url, api)
    if repository is None:
        return BareGit(repo)
    return GitHub(repository, Api(repository.api, find_token(repository.host)))
