"""A GitHub on loopback: it remembers what it is told, and speaks as the description says.

Every request is checked against GitHub's published description before it is carried out, and every
answer before it is sent; what does not fit is noted in ``problems``, which a test expects empty.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.support.openapi import Description, Operation

Answer = tuple[int, Any]


@dataclass
class FakeGitHub:
    """State of one GitHub with one upstream repository, and who may do what in it.

    Attributes:
        tokens: Token to login.
        writers: Logins that may push to the upstream repository.
        web: Where Git finds repositories; the API's own address when empty.
        commit_of: What an owner's branch points to; a made-up commit when None.
        rights: Token of a job to the permissions it has; other tokens may what their login may.
        refusals: Answers given instead, in order, to whatever comes next: status, headers, body.
        failing: Changes whose address contains this are answered by 502, until it is emptied.
    """

    description: Description
    owner: str = "hub"
    name: str = "model"
    tokens: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    keys: dict[str, list[str]] = field(default_factory=dict)
    refusals: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    rights: dict[str, dict[str, str]] = field(default_factory=dict)
    failing: str = ""
    url: str = ""
    web: str = ""
    commit_of: Callable[[str, str], str] | None = None

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.pulls: list[dict[str, Any]] = []
        self.comments: dict[int, list[dict[str, Any]]] = {}
        self.status_list: dict[str, list[dict[str, Any]]] = {}
        self.forks: dict[str, int] = {}  # full name to how often it is not there yet
        self._serial = 1000

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    # -- what it knows ---------------------------------------------------------

    def user(self, login: str) -> dict[str, Any]:
        kind = "Bot" if login.endswith("[bot]") else "User"
        return {**self.description.sample("simple-user"), "login": login, "type": kind}

    def repository(self, slug: str, login: str) -> dict[str, Any]:
        owner, name = slug.split("/")
        found = self.description.sample("full-repository")
        may = login == owner or (owner == self.owner and login in self.writers)
        found.update(
            name=name,
            full_name=slug,
            clone_url=f"{self.web or self.url}/{slug}.git",
            permissions={"admin": False, "push": may, "pull": True},
        )
        found["owner"]["login"] = owner
        return found

    def open_pull(self, login: str, body: dict[str, Any]) -> dict[str, Any]:
        owner, _, branch = body["head"].rpartition(":")
        owner = owner or self.owner
        number = len(self.pulls) + 1
        pull = self.description.sample("pull-request")
        pull.update(
            number=number,
            state="open",
            title=body["title"],
            body=body.get("body"),
            labels=[],
            user=self.user(login),
            html_url=f"{self.url}/{self.owner}/{self.name}/pull/{number}",
        )
        commit = self.commit_of(owner, branch) if self.commit_of else f"{number:040x}"
        pull["head"].update(ref=branch, label=f"{owner}:{branch}", sha=commit)
        pull["head"]["repo"] = {
            **self.description.sample("repository"),
            "clone_url": f"{self.web or self.url}/{owner}/{self.name}.git",
        }
        pull["base"]["ref"] = body["base"]
        self.pulls.append(pull)
        return pull

    def as_described(self, answer: Any) -> Any:
        """An answer without the null of a fork that is gone, of which the description is silent."""
        if isinstance(answer, list):
            return [self.as_described(entry) for entry in answer]
        if isinstance(answer, dict) and (answer.get("head") or {}).get("repo", "") is None:
            repo = self.description.sample("repository")
            return {**answer, "head": {**answer["head"], "repo": repo}}
        return answer

    def listed(self, pull: dict[str, Any]) -> dict[str, Any]:
        """The shorter form of lists."""
        short = self.description.sample("pull-request-simple")
        return {**short, **{key: pull[key] for key in short if key in pull}}


NOT_FOR_JOBS = {"message": "Resource not accessible by integration"}
PERMISSIONS = {"pulls": "pull-requests", "issues": "pull-requests", "statuses": "statuses"}
"""Part of a repository's address to the permission that a job needs to change what is there."""


def _lacks(rights: dict[str, str] | None, method: str, path: str) -> bool:
    """Whether a job may not do this."""
    parts = path.strip("/").split("/")
    if rights is None or len(parts) < 4 or parts[0] != "repos":
        return False
    wanted = PERMISSIONS.get(parts[3], "contents")
    had = rights.get(wanted, "none")
    return had == "none" if method == "GET" else had != "write"


def _respond(
    hub: FakeGitHub, op: Operation, login: str, query: dict[str, str], body: Any
) -> Answer:
    answers: dict[tuple[str, str], Callable[..., Answer]] = {
        ("GET", "/user"): _who,
        ("GET", "/users/{username}/keys"): _keys,
        ("GET", "/repos/{owner}/{repo}"): _repository,
        ("POST", "/repos/{owner}/{repo}/forks"): _fork,
        ("GET", "/repos/{owner}/{repo}/pulls"): _list_pulls,
        ("POST", "/repos/{owner}/{repo}/pulls"): _new_pull,
        ("GET", "/repos/{owner}/{repo}/pulls/{pull_number}"): _one_pull,
        ("PATCH", "/repos/{owner}/{repo}/pulls/{pull_number}"): _change_pull,
        ("GET", "/repos/{owner}/{repo}/issues/{issue_number}/comments"): _list_comments,
        ("POST", "/repos/{owner}/{repo}/issues/{issue_number}/comments"): _new_comment,
        ("PATCH", "/repos/{owner}/{repo}/issues/comments/{comment_id}"): _change_comment,
        ("POST", "/repos/{owner}/{repo}/issues/{issue_number}/labels"): _add_labels,
        ("DELETE", "/repos/{owner}/{repo}/issues/{issue_number}/labels/{name}"): _drop_label,
        ("POST", "/repos/{owner}/{repo}/statuses/{sha}"): _new_status,
        ("GET", "/repos/{owner}/{repo}/commits/{ref}/statuses"): _list_statuses,
    }
    act = answers.get((op.method, op.path))
    if act is None:
        return 404, {"message": "Not Found"}
    return act(hub, op.arguments, login, query, body)


def _who(hub: FakeGitHub, _: Any, login: str, *__: Any) -> Answer:
    if not login:
        return 401, {"message": "Requires authentication"}
    if login.endswith("[bot]"):
        return 403, NOT_FOR_JOBS
    user = hub.description.sample("private-user")
    return 200, {**user, "login": login, "business_plus": False}  # public ones lack this


def _keys(hub: FakeGitHub, at: dict[str, str], *_: Any) -> Answer:
    keys = hub.keys.get(at["username"], [])
    return 200, [{"id": number, "key": key} for number, key in enumerate(keys, 1)]


def _repository(hub: FakeGitHub, at: dict[str, str], login: str, *_: Any) -> Answer:
    slug = f"{at['owner']}/{at['repo']}"
    if slug != f"{hub.owner}/{hub.name}" and hub.forks.get(slug, 1) > 0:
        hub.forks[slug] = hub.forks.get(slug, 1) - 1
        return 404, {"message": "Not Found"}
    return 200, hub.repository(slug, login)


def _fork(hub: FakeGitHub, at: dict[str, str], login: str, *_: Any) -> Answer:
    slug = f"{login}/{at['repo']}"
    hub.forks.setdefault(slug, 2)
    return 202, hub.repository(slug, login)


def _list_pulls(hub: FakeGitHub, _: Any, __: str, query: dict[str, str], ___: Any) -> Answer:
    state, head = query.get("state", "open"), query.get("head")
    found = [p for p in hub.pulls if state == "all" or p["state"] == state]
    found = [p for p in found if not head or p["head"]["label"] == head]
    if query.get("direction") != "asc":
        found.reverse()
    return 200, [hub.listed(pull) for pull in found]


def _new_pull(hub: FakeGitHub, _: Any, login: str, __: Any, body: dict[str, Any]) -> Answer:
    owner, _, branch = body["head"].rpartition(":")
    label = f"{owner or hub.owner}:{branch}"
    if any(p["head"]["label"] == label and p["state"] == "open" for p in hub.pulls):
        said = f"A pull request already exists for {label}."
        return 422, {"message": "Validation Failed", "errors": [{"message": said}]}
    return 201, hub.open_pull(login, body)


def _pull(hub: FakeGitHub, number: str) -> dict[str, Any] | None:
    index = int(number) - 1
    return hub.pulls[index] if 0 <= index < len(hub.pulls) else None


def _one_pull(hub: FakeGitHub, at: dict[str, str], *_: Any) -> Answer:
    found = _pull(hub, at["pull_number"])
    return (200, found) if found else (404, {"message": "Not Found"})


def _change_pull(hub: FakeGitHub, at: dict[str, str], _: str, __: Any, body: Any) -> Answer:
    found = _pull(hub, at["pull_number"])
    if found is None:
        return 404, {"message": "Not Found"}
    found.update(body)
    return 200, found


def _list_comments(hub: FakeGitHub, at: dict[str, str], *_: Any) -> Answer:
    return 200, hub.comments.get(int(at["issue_number"]), [])


def _new_comment(hub: FakeGitHub, at: dict[str, str], login: str, _: Any, body: Any) -> Answer:
    if len(body["body"]) > 65_535:
        return 422, {"message": "Validation Failed", "errors": [{"message": "body is too long"}]}
    comment = hub.description.sample("issue-comment")
    comment.update(id=hub.serial(), body=body["body"], user=hub.user(login))
    hub.comments.setdefault(int(at["issue_number"]), []).append(comment)
    return 201, comment


def _change_comment(hub: FakeGitHub, at: dict[str, str], login: str, _: Any, body: Any) -> Answer:
    for comment in (entry for entries in hub.comments.values() for entry in entries):
        if comment["id"] == int(at["comment_id"]):
            if comment["user"]["login"] != login and login not in hub.writers:
                return 404, {"message": "Not Found"}
            comment["body"] = body["body"]
            return 200, comment
    return 404, {"message": "Not Found"}


def _add_labels(hub: FakeGitHub, at: dict[str, str], login: str, _: Any, body: Any) -> Answer:
    pull = _pull(hub, at["issue_number"])
    if pull is None or login not in hub.writers:
        return 404, {"message": "Not Found"}
    present = {label["name"] for label in pull["labels"]}
    example = {**hub.description.sample("label"), "description": ""}
    pull["labels"] += [{**example, "name": n} for n in body["labels"] if n not in present]
    return 200, pull["labels"]


def _drop_label(hub: FakeGitHub, at: dict[str, str], *_: Any) -> Answer:
    pull = _pull(hub, at["issue_number"])
    if pull is None or all(label["name"] != at["name"] for label in pull["labels"]):
        return 404, {"message": "Label does not exist"}
    pull["labels"] = [label for label in pull["labels"] if label["name"] != at["name"]]
    return 200, pull["labels"]


def _new_status(hub: FakeGitHub, at: dict[str, str], _: str, __: Any, body: Any) -> Answer:
    status = hub.description.sample("status")
    status.update({"target_url": None, **body})
    hub.status_list.setdefault(at["sha"], []).insert(0, status)
    return 201, status


def _list_statuses(hub: FakeGitHub, at: dict[str, str], *_: Any) -> Answer:
    return 200, hub.status_list.get(at["ref"], [])


class _Handler(BaseHTTPRequestHandler):
    hub: FakeGitHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        hub = self.hub
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        size = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(size)
        body = json.loads(raw) if raw else None
        hub.requests.append(f"{self.command} {parts.path}")
        if hub.refusals:
            self._send(*hub.refusals.pop(0))
            return
        if hub.failing and self.command != "GET" and hub.failing in parts.path:
            self._send(502, {}, {"message": "Bad Gateway"})
            return
        self._answer(parts.path, query, body)

    def _answer(self, path: str, query: dict[str, str], body: Any) -> None:
        hub = self.hub
        operation = hub.description.find(self.command, path)
        if operation is None:
            hub.problems.append(f"{self.command} {path} is no operation of the API")
            self._send(404, {}, {"message": "Not Found"})
            return
        said = hub.description.query_problems(operation, query)
        said += hub.description.body_problems(operation, body) if self.command != "GET" else []
        hub.problems += [f"request {self.command} {path}: {problem}" for problem in said]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        login = hub.tokens.get(token, "")
        if self.headers.get("Authorization") and not login:
            self._send(401, {}, {"message": "Bad credentials"})
            return
        if _lacks(hub.rights.get(token), self.command, path):
            hub.problems.append(f"{self.command} {path}: the job has no right to")
            self._send(403, {}, NOT_FOR_JOBS)
            return
        status, answer = _respond(hub, operation, login, query, body)
        if status < 300:
            said = hub.description.answer_problems(operation, status, hub.as_described(answer))
            hub.problems += [f"answer {self.command} {path}: {problem}" for problem in said]
        self._page(path, query, status, answer)

    def _page(self, path: str, query: dict[str, str], status: int, answer: Any) -> None:
        headers = {}
        if isinstance(answer, list) and self.command == "GET":
            size, page = min(int(query.get("per_page", 30)), 3), int(query.get("page", 1))
            if page * size < len(answer):
                rest = "&".join(f"{k}={v}" for k, v in query.items() if k != "page")
                following = f"{self.hub.url}{path}?{rest}&page={page + 1}"
                headers["Link"] = f'<{following}>; rel="next"'
            answer = answer[(page - 1) * size : page * size]
        self._send(status, headers, answer)

    def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve  # noqa: N815


@contextmanager
def serving(hub: FakeGitHub) -> Iterator[FakeGitHub]:
    """The same, on a port of this machine until the block ends. Pages have three entries."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
