"""A hub's own repository: a bare one with settings made for weights."""

from __future__ import annotations

from pathlib import Path

from moshi_fl.errors import MoshiError
from moshi_fl.store.failures import disk_errors, local_failure
from moshi_fl.store.process import Task, run
from moshi_fl.store.settings import HUB_SETTINGS, environment

MAX_PUSH_BYTES = 1 << 30
MANY_PACKS = 64


def create_hub(path: Path, *, max_push_bytes: int = MAX_PUSH_BYTES) -> None:
    """Create a bare repository for a hub, or give an existing one the settings of a hub.

    Args:
        path: Its folder; created, with parents, where absent.
        max_push_bytes: The largest push that it takes.

    Raises:
        MoshiError: The folder holds something else, or cannot be written.
    """
    path = Path(path).absolute()
    is_repository = (path / "HEAD").is_file() and (path / "objects").is_dir()
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if not is_repository and any(path.iterdir()):
            raise MoshiError(
                f"{path} is not empty and no bare Git repository.",
                hint="Choose an empty or new folder for the hub.",
            )
    _git(path, "init", "--quiet", "--bare", "--template=", "--initial-branch=main")
    for key, value in {**HUB_SETTINGS, "receive.maxInputSize": str(max_push_bytes)}.items():
        _git(path, "config", key, value)


def tidy_hub(path: Path, *, packs: int = MANY_PACKS) -> bool:
    """Put a local hub's many small packs into few, once there are too many, and say whether it did.

    Every push leaves a pack, and a fetch looks into all of them. Objects that nothing needs any
    more go after an hour: a push that is still under way may need younger ones.

    Raises:
        MoshiError: Git could not do it; the hub is as it was.
    """
    if len(list((path / "objects" / "pack").glob("*.pack"))) <= packs:
        return False
    _git(path, "repack", "-A", "-d", "-q", "--unpack-unreachable=1.hour.ago")
    _git(path, "prune", "--expire=1.hour.ago")
    return True


def hub_settings(path: Path) -> dict[str, str]:
    """The settings in a bare repository's own config, keys in lower case.

    Raises:
        MoshiError: Not a repository, or one that Git will not read.
    """
    result = run(path, Task(["config", "--local", "--list", "-z"], environment(path)))
    if result.status != 0:
        raise local_failure(path, "reading the settings", result)
    entries = result.out.decode(errors="backslashreplace").split("\0")
    return {key: value for key, _, value in (entry.partition("\n") for entry in entries) if key}


def _git(path: Path, *argv: str) -> None:
    env = environment(path) | {"GIT_DEFAULT_HASH": "sha1"}
    result = run(path, Task(argv, env))
    if result.status != 0:
        raise local_failure(path, f"git {argv[0]} in the hub", result)
