"""One advisory lock per folder, across threads and processes; any death releases it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moshi_fl.errors import HubError
from moshi_fl.store.failures import disk_errors

LOCK_FILE = "moshi.lock"
_POLL = 0.05  # seconds

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FolderLock:
    """Reentrant for one thread; other threads and other processes wait, then get a ``HubError``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._threads = threading.RLock()
        self._depth = 0
        self._fd = -1

    @contextmanager
    def held(self, wait: float) -> Iterator[None]:
        """Hold the lock; ``wait`` is how many seconds to wait for it."""
        deadline = time.monotonic() + wait
        if not self._threads.acquire(timeout=wait):
            raise self._busy()
        try:
            if self._depth == 0:
                self._fd = self._acquire(deadline)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(self._fd)
        finally:
            self._threads.release()

    def _acquire(self, deadline: float) -> int:
        while True:
            fd = self._open()
            if _try_lock(fd) and self._is_current(fd):
                return fd
            os.close(fd)
            if time.monotonic() >= deadline:
                raise self._busy()
            time.sleep(_POLL)

    def _open(self) -> int:
        with disk_errors(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)

    def _is_current(self, fd: int) -> bool:
        # Whoever held the lock before may have dropped the whole folder, and this file with it.
        try:
            return os.path.samestat(os.fstat(fd), self._file.stat())
        except FileNotFoundError:
            return False

    def _busy(self) -> HubError:
        return HubError(
            f"{self._file.parent} is busy: another process is using it.",
            hint="Wait until it has finished, or give this one a folder of its own.",
        )
