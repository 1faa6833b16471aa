"""GitHub's REST API: one request at a time, with its limits kept and its refusals explained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

import moshi_fl
from moshi_fl.errors import HubError

VERSION = "2022-11-28"
PAGE = 100  # entries; the API's largest
MAX_PAGES = 1000
LONGEST_WAIT = 90.0  # seconds that a rate limit may cost before it becomes an error
TRIES = 4
TIMEOUT = (10.0, 60.0)  # seconds to connect, and to wait for bytes
MAX_BYTES = 32 << 20  # of one answer
SECONDARY_WAIT = 60.0  # where a secondary limit names no time: "at least one minute"


class ForgeError(HubError):
    """The forge refused or did not answer. ``status`` is its HTTP status, 0 for none."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status = status


@dataclass
class Api:
    """Speaks to one API. Not for two threads at once.

    Args:
        base: Base URL, without a final slash.
        token: Sent as a bearer token; empty: as a stranger.
        wait: Sleeps for seconds when a limit says so.
        clock: Seconds since 1970.
    """

    base: str
    token: str = field(default="", repr=False)
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._session = requests.Session()
        self._session.trust_env = False  # a .netrc would replace the token
        self._session.headers.update(
            {
                "Accept": "application/vnd.github+json",
                "X-GitHub-Api-Version": VERSION,
                "User-Agent": f"moshi-fl/{moshi_fl.__version__}",
            }
        )
        if self.token:
            self._session.headers["Authorization"] = f"Bearer {self.token}"

    def get(self, path: str, **query: str | int) -> Any:
        """Decoded answer of a GET."""
        return self._request("GET", path, query=query).json()

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Decoded answer of a request that changes something; None when it has no body."""
        answer = self._request(method, path, body=body or {})
        return answer.json() if answer.content else None

    def pages(self, path: str, **query: str | int) -> Iterator[Any]:
        """All entries of a list, page by page.

        Raises:
            ForgeError: As for any request; or it has no end.
        """
        url: str | None = path
        query = {"per_page": PAGE, **query}
        for _ in range(MAX_PAGES):
            answer = self._request("GET", url or path, query=query)
            yield from answer.json()
            url, query = answer.links.get("next", {}).get("url"), {}
            if not url:
                return
            if not url.startswith(f"{self.base}/"):
                raise ForgeError(f"{self.base} leads on to another server; not followed.")
        raise ForgeError(f"{path}: more than {MAX_PAGES * PAGE:,} entries.")

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> requests.Response:
        url = path if path.startswith("http") else f"{self.base}/{path.lstrip('/')}"
        waited = 0.0
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                answer = self._once(method, url, query, body)
            except requests.RequestException as error:
                if method != "GET" or last:
                    raise _unreachable(self.base, error) from error
                pause = 2.0**attempt
            else:
                if answer.ok:
                    return answer
                pause = self._pause(answer, method, attempt)
                if last or waited + pause > LONGEST_WAIT:
                    raise refusal(answer, method, path, self.clock(), has_token=bool(self.token))
            waited += pause
            self.wait(pause)
        raise AssertionError("the last try returns or raises")

    def _once(
        self, method: str, url: str, query: Mapping[str, Any] | None, body: Mapping[str, Any] | None
    ) -> requests.Response:
        answer = self._session.request(
            method,
            url,
            params=query,
            json=body,
            timeout=TIMEOUT,
            stream=True,
            allow_redirects=method == "GET",
        )
        size = 0
        parts = []
        for part in answer.iter_content(1 << 16):
            size += len(part)
            if size > MAX_BYTES:
                raise ForgeError(f"{self.base}: an answer of more than {MAX_BYTES >> 20} MiB.")
            parts.append(part)
        answer._content = b"".join(parts)  # noqa: SLF001 - requests has no bounded read
        return answer

    def _pause(self, answer: requests.Response, method: str, attempt: int) -> float:
        """Seconds after which asking again may help; infinitely many when it will not."""
        limit = limited_for(answer, self.clock())
        if limit is not None:
            return limit
        if answer.status_code >= 500 and method == "GET":
            return 2.0**attempt
        return math.inf


def limited_for(answer: requests.Response, now: float) -> float | None:
    """Seconds until a rate limit ends; None when the answer is not about one."""
    if answer.status_code not in {403, 429}:
        return None
    after = answer.headers.get("Retry-After", "")
    if after.isdigit():
        return float(after)
    if answer.headers.get("X-RateLimit-Remaining") == "0":
        reset = answer.headers.get("X-RateLimit-Reset", "")
        return max(1.0, int(reset) - now + 1) if reset.isdigit() else SECONDARY_WAIT
    if answer.status_code == 429 or "secondary rate limit" in message_of(answer).lower():
        return SECONDARY_WAIT
    return None


def message_of(answer: requests.Response) -> str:
    """What the API says went wrong; a stranger's text, shortened."""
    try:
        body = answer.json()
    except ValueError:
        return ""
    if not isinstance(body, dict):
        return ""
    details = body.get("errors")
    said = [body.get("message"), *(details if isinstance(details, list) else [details])]
    said = [part.get("message") or part if isinstance(part, dict) else part for part in said]
    text = "; ".join(str(part) for part in said if part)
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def refusal(
    answer: requests.Response, method: str, path: str, now: float, *, has_token: bool
) -> ForgeError:
    """The error for an answer that is none."""
    status, said = answer.status_code, message_of(answer)
    what = f"{method} {path}: the forge answers {status}{f' ({said})' if said else ''}"
    wait = limited_for(answer, now)
    if wait is not None:
        hint = f"Try again in {wait:,.0f} seconds"
        hint += "." if has_token else ", or set GH_TOKEN: strangers may ask 60 times an hour."
        return ForgeError(f"{what}: too many requests.", hint=hint, status=status)
    return ForgeError(f"{what}.", hint=_hint(answer, status, has_token=has_token), status=status)


def _hint(answer: requests.Response, status: int, *, has_token: bool) -> str:
    if status == 401:
        return "The token is not accepted: it may have expired. gh auth login, or a new GH_TOKEN."
    if status == 403:
        wanted = answer.headers.get("X-Accepted-GitHub-Permissions") or answer.headers.get(
            "X-Accepted-OAuth-Scopes", ""
        )
        needs = f" It needs: {wanted}." if wanted else ""
        return f"The token may not do this.{needs}"
    if status == 404:
        seen = "the token cannot see it" if has_token else "it is private: set GH_TOKEN"
        return f"It does not exist, or {seen}."
    if status == 422:
        return "The forge understood the request and refuses what it asks."
    if status >= 500:
        return "The forge has a problem of its own; try again later."
    return ""


def _unreachable(base: str, error: Exception) -> ForgeError:
    kind = "did not answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
    return ForgeError(
        f"{base} {kind}.", hint="Git alone is enough to contribute: the branch can be pushed."
    )
