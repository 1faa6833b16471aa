"""Which repository on which GitHub a hub's address means, and with which token to speak there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

from moshi_fl.errors import ConfigError

PUBLIC = "github.com"
_SCP = re.compile(r"(?:[^@/]+@)?([A-Za-z0-9.-]+):(.+)")
_PATH = re.compile(r"/?([A-Za-z0-9](?:[A-Za-z0-9-]{0,38}))/([A-Za-z0-9._-]{1,100})/?\Z")
_TOKEN = re.compile(r"[\x21-\x7e]{1,500}\Z")


@dataclass(frozen=True)
class Repository:
    """A repository on a GitHub.

    Attributes:
        host: ``github.com``, or a GitHub Enterprise server with its port, if any.
        owner: User or organisation.
        name: Name without ``.git``.
        api: Base URL of the REST API, without a final slash.
        web: Base URL of its pages, without a final slash.
    """

    host: str
    owner: str
    name: str
    api: str
    web: str

    @property
    def slug(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"

    @property
    def clone_url(self) -> str:
        """Address for Git."""
        return f"{self.web}/{self.slug}.git"

    def compare_url(self, base: str, branch: str, owner: str = "") -> str:
        """Page on which a person opens a pull request by hand."""
        head = f"{owner}:{branch}" if owner and owner != self.owner else branch
        return f"{self.web}/{self.slug}/compare/{base}...{head}?expand=1"


def parse_address(url: str, api: str = "") -> Repository | None:
    """The repository that a hub's address means; None when it is on no GitHub.

    Args:
        url: ``https://host/owner/name(.git)``, ``ssh://git@host/…`` or ``git@host:owner/name``.
        api: Base URL of the REST API of a GitHub Enterprise server; it says nothing about
            addresses on other hosts.

    Raises:
        ConfigError: ``api`` is no URL, or a github.com address names no repository.
    """
    place = _split(url)
    if place is None:
        return None
    scheme, host, path = place
    api = _checked_api(api) if api else ""
    if not _serves(api, host):
        api = ""
    if host.lower() in {PUBLIC, f"www.{PUBLIC}"} and not api:
        host, base, web = PUBLIC, f"https://api.{PUBLIC}", f"https://{PUBLIC}"
    elif api or host.lower() in _enterprise_hosts():
        base = api or f"https://{host}/api/v3"
        web = f"{scheme}://{host}"
    else:
        return None
    found = _PATH.match(path)
    if not found:
        raise ConfigError(
            f"{host}{path} names no repository.", hint=f"{web}/OWNER/NAME   (as in the browser)"
        )
    return Repository(host, found[1], found[2].removesuffix(".git"), base, web)


def _split(url: str) -> tuple[str, str, str] | None:
    if "://" in url:
        parts = urlsplit(url)
        if parts.scheme == "ssh":
            return "https", parts.hostname or "", parts.path
        if parts.scheme in {"https", "http"}:
            return parts.scheme, parts.netloc.rpartition("@")[2], parts.path
        return None
    if url.startswith(("/", ".", "~")):
        return None
    found = _SCP.match(url)
    return ("https", found[1], f"/{found[2]}") if found else None


def _serves(api: str, host: str) -> bool:
    """Whether this is the API of the GitHub on a host; some have it on ``api.`` before its name."""
    name = urlsplit(f"//{host}").hostname or ""
    return urlsplit(api).hostname in {name, f"api.{name}"}


def _enterprise_hosts() -> set[str]:
    """Servers that the environment names, as ``gh`` and GitHub's own runners do."""
    server = urlsplit(os.environ.get("GITHUB_SERVER_URL", "")).netloc
    return {host.lower() for host in (os.environ.get("GH_HOST", ""), server) if host} - {PUBLIC}


def _checked_api(api: str) -> str:
    parts = urlsplit(api)
    if parts.scheme not in {"https", "http"} or not parts.netloc or parts.query:
        raise ConfigError(
            f"{api!r} is no base URL of an API.", hint="https://HOST/api/v3   (GitHub Enterprise)"
        )
    return api.rstrip("/")


def find_token(host: str) -> str:
    """A token for this host; empty when there is none. It is never logged.

    Looked for in ``GH_TOKEN`` and ``GITHUB_TOKEN`` (an Enterprise server: ``GH_ENTERPRISE_TOKEN``
    first), then asked of ``gh auth token``.

    Raises:
        ConfigError: A variable holds what cannot be a token.
    """
    names = ["GH_TOKEN", "GITHUB_TOKEN"]
    if host != PUBLIC:
        names.insert(0, "GH_ENTERPRISE_TOKEN")
    for name in names:
        if token := os.environ.get(name, "").strip():
            if not _TOKEN.match(token):
                raise ConfigError(f"{name} holds no token: one line of printable characters.")
            return token
    return _token_of_gh(host)


def _token_of_gh(host: str) -> str:
    if not shutil.which("gh"):
        return ""
    try:
        done = subprocess.run(
            ["gh", "auth", "token", "--hostname", host],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    token = done.stdout.strip()
    return token if done.returncode == 0 and _TOKEN.match(token) else ""
