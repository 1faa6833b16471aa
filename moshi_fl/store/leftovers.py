"""What Git processes leave behind when they are killed, and when it is safe to remove."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRATCH = "moshi-scratch"

_TOP_LOCKS = ("HEAD.lock", "config.lock", "index.lock", "packed-refs.lock", "shallow.lock")
_HALF = ("tmp_*", ".tmp-*", "*.keep", "*.lock")


def clean_store(store: Path) -> None:
    """Remove the leftovers of our own store; the caller holds its lock, so nobody is at work."""
    shutil.rmtree(store / SCRATCH, ignore_errors=True)
    for leftover in _leftovers(store):
        _remove(leftover)


def clean_hub(hub: Path, *, older_than: float) -> None:
    """Remove leftovers from a hub on this machine, where others may be at work without our lock.

    Git holds a ref lock for milliseconds, and a push touches its incoming folder all the time; only
    what has not changed for ``older_than`` seconds goes.
    """
    horizon = time.time() - older_than
    for leftover in _leftovers(hub):
        if _last_change(leftover) < horizon:
            _remove(leftover)


def _leftovers(repository: Path) -> Iterator[Path]:
    yield from (repository / name for name in _TOP_LOCKS if (repository / name).exists())
    yield from (repository / "refs").rglob("*.lock")
    objects = repository / "objects"
    for pattern in _HALF:
        yield from objects.glob(pattern)
        yield from objects.glob(f"[0-9a-f][0-9a-f]/{pattern}")
        yield from (objects / "pack").glob(pattern)


def _last_change(path: Path) -> float:
    newest = 0.0
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        try:
            newest = max(newest, each.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return newest


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
