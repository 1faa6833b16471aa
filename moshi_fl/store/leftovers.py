"""What Git processes leave behind when they are killed, and when it is safe to remove."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

SCRATCH = "moshi-scratch"

STALE_LOCK = 5.0  # seconds; Git holds a ref lock for milliseconds
STALE_PACK = 600.0  # seconds without a new byte; a large push may be checked that long

_TOP_LOCKS = ("HEAD.lock", "config.lock", "index.lock", "packed-refs.lock", "shallow.lock")
_HALF_OBJECTS = ("tmp_*", ".tmp-*", "*.keep", "*.lock")


def clean_store(store: Path) -> None:
    """Remove the leftovers of our own store; the caller holds its lock, so nobody is at work."""
    for leftover in (store / SCRATCH, *_locks(store), *_half_objects(store)):
        _remove(leftover)


def clean_hub(hub: Path) -> None:
    """Remove leftovers from a hub on this machine, where others may be at work without our lock.

    So only what is too old to be in use goes; for a ref lock that is younger, this waits.
    """
    deadline = time.monotonic() + STALE_LOCK
    for lock in list(_locks(hub)):
        # Others may take and release the same lock all the time: then it is never stale.
        while _age(lock) < STALE_LOCK and time.monotonic() < deadline:
            time.sleep(0.05)
        if _age(lock) >= STALE_LOCK:
            _remove(lock)
    for half in _half_objects(hub):
        if half.name.endswith(".keep"):
            continue  # the hub's maintainer may keep packs
        if _age(half) > STALE_PACK:
            _remove(half)


def _locks(repository: Path) -> Iterator[Path]:
    yield from (repository / name for name in _TOP_LOCKS if (repository / name).exists())
    for folder, _, names in os.walk(repository / "refs"):
        yield from (Path(folder, name) for name in names if name.endswith(".lock"))


def _half_objects(repository: Path) -> Iterator[Path]:
    objects = repository / "objects"
    for pattern in _HALF_OBJECTS:
        yield from objects.glob(pattern)
        yield from objects.glob(f"[0-9a-f][0-9a-f]/{pattern}")
        yield from (objects / "pack").glob(pattern)


def _age(path: Path) -> float:
    """Seconds since anything in it changed; endless when it has gone."""
    newest = 0.0
    with contextlib.suppress(FileNotFoundError):  # its owner is just removing it
        newest = path.lstat().st_mtime
        for each in path.rglob("*"):
            newest = max(newest, each.lstat().st_mtime)
    return time.time() - newest


def _remove(path: Path) -> None:
    # What belongs to someone else stays; Git itself will then say what is in the way.
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
