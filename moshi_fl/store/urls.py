"""Where a hub is: the spellings of its address that we accept, and what of them may be shown."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from moshi_fl.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCP = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]+:(?![:/\\]{2}|\\)")
_HOST = re.compile(r"[A-Za-z0-9_.:-]+\Z")
_HELPER = re.compile(r"[A-Za-z0-9+.-]*::")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_PORTS = {"https": 443, "http": 80}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_HINT = "Use a folder, https://host/hub.git, ssh://host/hub.git or git@host:hub.git."


def redact(text: str) -> str:
    """The text without any ``user:password@`` of a URL in it."""
    return _USERINFO.sub("", text)


def is_local(url: str) -> bool:
    """Whether the address is a folder of this machine (a path or ``file://``)."""
    return url.startswith("file://") or not (
        _SCHEME.match(url) or _HELPER.match(url) or _SCP.match(url)
    )


def normalise_url(url: str | os.PathLike[str]) -> str:
    """The one spelling of a hub's address that Git is given: local paths absolute, others checked.

    Userinfo stays in, so show the result only through ``redact``. Plain ``http://`` is for this
    machine, unless ``MOSHI_FL_ALLOW_HTTP=1``.

    Raises:
        ConfigError: Not an address that we use; ``ext::`` and its kind would run commands.
    """
    text = os.fspath(url)
    if not text or text.startswith("-") or _UNPRINTABLE.search(text) or text != text.strip():
        raise ConfigError(f"{redact(text)!r} is not a hub address.", hint=_HINT)
    if is_local(text):
        return str(local_path(text))
    if _HELPER.match(text):
        raise ConfigError(f"{redact(text)!r}: remote helpers are not used.", hint=_HINT)
    return _checked_remote(text) if _SCHEME.match(text) else text


def local_path(url: str) -> Path:
    """The folder that a local address names."""
    if url.startswith("file://"):
        host, _, path = url.removeprefix("file://").partition("/")
        url = "/" + unquote(path)
        if host not in {"", "localhost"} or not path or _UNPRINTABLE.search(url):
            raise ConfigError("file:// names no folder of this machine.", hint=_HINT)
    # Not resolve(), which would follow links; nor Path.expanduser(), which fails for a ~stranger.
    return Path(os.path.abspath(os.path.expanduser(url)))  # noqa: PTH100, PTH111


def split_login(url: str, token_for: str = "") -> tuple[str, str | None]:
    """The address without userinfo, and the Authorization header that the userinfo stood for.

    A process list shows arguments to everyone on the machine; hence credentials travel in the
    environment. Without userinfo the token of ``MOSHI_FL_TOKEN``, if set, takes its place.

    Args:
        url: The address.
        token_for: Address of the hub that the token is for; empty when it is this one. No other
            server is shown the token: whoever runs it could write to that hub.
    """
    if not url.startswith(("https://", "http://")):
        return url, None
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not user and not password and _server(token_for or url) == _server(url):
        user, password = "x-access-token", os.environ.get("MOSHI_FL_TOKEN", "")
    if not password:
        return (url if parts.username else bare), None
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    return bare, f"Authorization: Basic {login}"


def _server(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port, of an address that takes a token at all."""
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"}:
        return None
    return parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme]


def _checked_remote(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"{redact(url)!r}: {error}.", hint=_HINT) from error
    scheme = parts.scheme.lower()
    if scheme not in {"https", "http", "ssh"}:
        raise ConfigError(f"{redact(url)!r}: {scheme}:// is not used.", hint=_HINT)
    if not _HOST.match(host) or host.startswith("-") or (parts.username or "").startswith("-"):
        raise ConfigError(f"{redact(url)!r}: not a host name.", hint=_HINT)
    if parts.query or parts.fragment:
        raise ConfigError(f"{redact(url)!r}: an address has no ? and no #.", hint=_HINT)
    if scheme == "http" and host not in _LOOPBACK and os.environ.get("MOSHI_FL_ALLOW_HTTP") != "1":
        raise ConfigError(
            f"{redact(url)!r}: plain http would send the model and your password unprotected.",
            hint="Use https://, or set MOSHI_FL_ALLOW_HTTP=1 in a network that you trust.",
        )
    return _rebuilt(parts, scheme)


def _rebuilt(parts: SplitResult, scheme: str) -> str:
    return urlunsplit(parts._replace(scheme=scheme, path=parts.path.rstrip("/")))
