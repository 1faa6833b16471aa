"""Git settings and environment, ours alone: of the user's only what is needed to reach a server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moshi_fl.store.process import Task, run
from moshi_fl.store.urls import is_local

_TEXT = str(1 << 16)  # bytes; records are smaller, weights are larger

HUB_SETTINGS: Mapping[str, str] = {
    # Records are sent as differences from each other, compressed: a clone of main stays small.
    # Weights would not gain; searching them for differences costs the server CPU minutes.
    "core.bigFileThreshold": _TEXT,
    "transfer.unpackLimit": "1",
    "transfer.fsckObjects": "true",
    "uploadpack.allowFilter": "true",
    "gc.auto": "0",
    "receive.autogc": "false",
    # Many contributors push at the same moment: wait for each other instead of failing.
    "core.filesRefLockTimeout": "10000",
    "core.packedRefsTimeout": "10000",
}

CLIENT_SETTINGS: Mapping[str, str] = {
    **HUB_SETTINGS,
    # Larger files get a pack of their own when they are stored; such a pack is sent as it is.
    "core.bigFileThreshold": "1048576",
    "core.looseCompression": "0",
    "maintenance.auto": "false",
    "core.hooksPath": os.devnull,
    "core.logAllRefUpdates": "false",
    "core.symlinks": "false",
    "fetch.fsckObjects": "true",
    "submodule.recurse": "false",
    "commit.gpgSign": "false",
    "push.gpgSign": "false",
    "protocol.version": "2",
    "http.lowSpeedLimit": "1",
}

_USER_PREFIXES = ("credential.", "http.")
_USER_KEYS = {"core.sshcommand", "ssh.variant", "safe.directory"}
_SSH = "ssh -oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4"
# The server side of a hub on this machine runs as us, but with the config of the hub. So that the
# config runs nothing: no hooks, no checkout, no command for alternates, no fetching from elsewhere.
_LOCAL_SERVER = (
    f"GIT_ALLOW_PROTOCOL=none git -c core.hooksPath={os.devnull} -c core.alternateRefsCommand=true "
    "-c receive.denyCurrentBranch=refuse -c gc.auto=0 -c receive.autogc=false "
    "-c uploadpack.allowFilter=true "
    "-c core.filesRefLockTimeout=10000 -c core.packedRefsTimeout=10000"
)
REMOTE = "hub"

Pairs = list[tuple[str, str]]


def environment(store: Path) -> dict[str, str]:
    """The environment of every Git process on a store."""
    return {
        "GIT_DIR": str(store),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": str(store / "client.gitconfig"),
        "GIT_CONFIG_COUNT": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "https:ssh:file",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_LITERAL_PATHSPECS": "1",
        "GCM_INTERACTIVE": "never",
        "SSH_ASKPASS_REQUIRE": "never",
    }


def hub_settings(url: str, login: str | None, timeout: float) -> Pairs:
    """The remote called ``REMOTE``: its address without userinfo, and how to talk to it."""
    pairs = [(f"remote.{REMOTE}.url", url)]
    if is_local(url):
        pairs += [
            (f"remote.{REMOTE}.uploadpack", f"{_LOCAL_SERVER} upload-pack"),
            (f"remote.{REMOTE}.receivepack", f"{_LOCAL_SERVER} receive-pack"),
        ]
    if login:
        pairs.append((f"http.{url}.extraHeader", login))
    pairs.append(("core.bigFileThreshold", _TEXT))
    return [*pairs, ("http.lowSpeedTime", str(max(1, min(60, int(timeout)))))]


def whole_files_up_to(size: int) -> Pairs:
    """Ask the hub to leave out larger files, so that they cost no traffic and no unpacking.

    The setting lives as long as the command: the store never becomes a partial clone, so nothing
    is fetched later behind our back.
    """
    return [
        (f"remote.{REMOTE}.promisor", "true"),
        (f"remote.{REMOTE}.partialCloneFilter", f"blob:limit={size + 1}"),
    ]


def network_environment(url: str, user: Pairs, ours: Pairs) -> dict[str, str]:
    """What is added for commands that talk to the hub at ``url``."""
    pairs = [*(pair for pair in user if pair[0].startswith(_USER_PREFIXES)), *ours]
    ssh = dict(user).get("core.sshcommand")
    env = {"GIT_CONFIG_COUNT": str(len(pairs))}
    for number, (key, value) in enumerate(pairs):
        env |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    if url.startswith("http://"):
        env["GIT_ALLOW_PROTOCOL"] = "https:ssh:file:http"
    if "GIT_SSH_COMMAND" not in os.environ and "GIT_SSH" not in os.environ:
        env["GIT_SSH_COMMAND"] = ssh or _SSH
    # One allocation, not the process: a crafted delta could ask for terabytes.
    env["GIT_ALLOC_LIMIT"] = "1g"
    return env


def user_settings(store: Path) -> Pairs:
    """The user's own settings for credentials, proxies, certificates and ssh, in their order."""
    task = Task(["config", "--list", "-z"], {"GIT_DIR": str(store)}, keep_environment=True)
    entries = run(store, task).out.decode(errors="surrogateescape").split("\0")
    pairs = [(key, value) for key, _, value in (entry.partition("\n") for entry in entries)]
    return [
        (key, value) for key, value in pairs if key.startswith(_USER_PREFIXES) or key in _USER_KEYS
    ]


def config_text(settings: Mapping[str, str], *, safe: Iterable[str] = ()) -> str:
    """A Git config file."""
    lines = []
    for key, value in [*settings.items(), *(("safe.directory", folder) for folder in safe)]:
        section, _, name = key.partition(".")
        lines.append(f"[{section}]\n\t{name} = {_quoted(value)}\n")
    return "".join(lines)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
