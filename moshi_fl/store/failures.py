"""What a failed Git command means to the person who ran it."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moshi_fl.errors import HubError, MoshiError
from moshi_fl.store.process import Result

NO_HUB_THERE = (
    "Check the address: --hub URL, or moshi-fl config set hub URL. "
    "Only a maintainer, to make a new hub: moshi-hub init."
)
"""What whoever meets no hub at an address does next."""
_NO_ROOM = 1 << 14  # bytes
_LAST_WORDS = 600  # characters of Git's own words that are shown
_BOILERPLATE = re.compile(  # which Git adds to whatever else it says of a hub
    r"fatal: Could not read from remote repository\.|and the repository exists\.|"
    r"Please make sure you have the correct access rights"
)

# The first pattern that is found decides; {hub} is the address without passwords.
_TABLE: tuple[tuple[str, str, str], ...] = (
    (
        (
            r"could not read (Username|Password)|Authentication failed|returned error: 40[13]"
            r"|Permission denied|Host key verification failed|terminal prompts disabled"
        ),
        "{hub} refused access",
        "Check your login: Git credential helper, MOSHI_FL_TOKEN, or ssh key and known hosts.",
    ),
    (
        r"couldn't find remote ref (\S+)",
        "{hub} does not have {1}",
        "The hub may have deleted it, or this is not the hub you mean.",
    ),
    (
        (
            r"Repository not found|returned error: 404|does not appear to be a git repository"
            r"|repository '[^']*' (does not exist|not found)|not a git repository"
            r"|not valid: is this a git"
        ),
        "there is no hub at {hub}",
        NO_HUB_THERE,
    ),
    (
        r"dubious ownership",
        "{hub} belongs to another user",
        "If you trust it: git config --global --add safe.directory PATH.",
    ),
    (
        (
            r"Could not resolve host|Connection refused|Failed to connect|Couldn't connect"
            r"|Connection timed out|No route to host|Network is unreachable|Operation timed out"
            r"|Name or service not known|Temporary failure in name resolution"
        ),
        "{hub} cannot be reached",
        "Check the network and the address; work that needs no hub goes on from the cache.",
    ),
    (
        r"certificate|SSL_ERROR|TLS connect error",
        "{hub} has no certificate that this machine trusts",
        "Check the address and the clock; your own authority: git config --global http.sslCAInfo.",
    ),
    (
        r"Operation too slow|curl 28",
        "{hub} stopped answering",
        "Try again later.",
    ),
    (
        r"remote:.*No space left|remote:.*Disk quota",
        "{hub} has no space left",
        "Tell its maintainer.",
    ),
    (
        (
            r"exceeds maximum allowed size|pack exceeds|larger than|file size limit"
            r"|returned error: 413"
        ),
        "{hub} refused the push as too big",
        "Ask its maintainer for the limit (receive.maxInputSize).",
    ),
    (
        r"declined|refusing to|protected branch|GH006|GH013|deletion prohibited|denying",
        "{hub} refused the push",
        "Its rules forbid this; its own words follow.",
    ),
    (
        r"does not support --atomic|signed-by|mismatched algorithms|server does not support",
        "{hub} lacks what moshi-fl needs of a Git server",
        "It needs atomic pushes and SHA-1 repositories.",
    ),
    (
        (
            r"fsck error|bad object|bad tree|missing (tree|blob|commit)|did not send all necessary"
            r"|index-pack (died|failed|abnormal)|invalid index-pack|pack has bad|pack signature"
            r"|sha1 mismatch"
            r"|inflate|early EOF|bad pack|bad line length|protocol error|invalid server response"
            r"|unexpected disconnect|hung up unexpectedly|RPC failed|not valid:|bad band"
            r"|expected flush"
            r"|invalid (packet|ls-refs)|Empty reply|malformed|transfer closed|Recv failure"
        ),
        "{hub} gave a broken answer",
        "Try again; if it persists, the hub or something between you and it is damaged.",
    ),
)


def hub_failure(hub: str, action: str, result: Result, *, timeout: float) -> HubError:
    """The error for a command that talked to the hub.

    Args:
        hub: Its address without passwords.
        action: What was tried, as in ``fetch``.
        result: How it ended.
        timeout: Seconds that it had.
    """
    if result.timed_out:
        return HubError(
            f"{action}: {hub} did not finish within {timeout:g} s.{_words(result)}",
            hint="Try again later, or allow more time.",
        )
    if result.overflowed:
        return HubError(f"{action}: {hub} answers without end.", hint="This is not a usable hub.")
    for pattern, what, hint in _TABLE:
        if found := re.search(pattern, result.words):
            first = found[1] if found.groups() else ""
            told = what.replace("{hub}", hub).replace("{1}", first or "")
            return HubError(f"{action}: {told}.{_words(result)}", hint=hint)
    return HubError(f"{action}: {hub} failed (git status {result.status}).{_words(result)}")


def local_failure(folder: Path, action: str, result: Result) -> MoshiError:
    """The error for a command that worked in our own folder."""
    if disk_full(result.words) or _without_room(folder):
        return _full(folder)
    ended = "did not end in time" if result.timed_out else f"failed (git status {result.status})"
    return MoshiError(f"{action} in {folder} {ended}.{_words(result)}")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about our own files into errors that name the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full(folder) from error
        raise MoshiError(f"{error.filename or folder}: {error.strerror or error}.") from error


def disk_full(words: str) -> bool:
    """Whether our own disk is full, by Git's words; the hub's words come with ``remote:``."""
    own = "\n".join(line for line in words.splitlines() if not line.startswith("remote:"))
    return "No space left on device" in own or "Disk quota exceeded" in own


def _without_room(folder: Path) -> bool:
    # Git does not always say why it could not write.
    return folder.exists() and shutil.disk_usage(folder).free < _NO_ROOM


def _full(folder: Path) -> MoshiError:
    return MoshiError(
        f"No space left on the disk of {folder}.",
        hint="Make room there, or choose another folder; what was complete is kept.",
    )


def _words(result: Result) -> str:
    lines = [line for line in map(str.strip, result.words.splitlines()) if line]
    told = [line for line in lines if not _BOILERPLATE.fullmatch(line)] or lines
    words = " | ".join(told)[-_LAST_WORDS:]
    ending = "" if words.endswith((".", "!", "?")) else "."
    return f" Git said: {words}{ending}" if words else ""
