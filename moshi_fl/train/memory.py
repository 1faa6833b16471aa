"""Memory that one training step frees is kept for the next.

glibc hands large blocks back to the system as soon as they are freed, so that a step on a CPU pays
a page fault for each 4 KiB of its activations again: 125,000 of them, an eighth of the time, for
the step of ``benchmarks/bench_speech_lm.py``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# Of <malloc.h>: names as in mallopt(3), and what holds where nobody asked for anything else.
_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD = -1, 128 * 1024  # bytes free at the top that stay
_MMAP_MAX, _USUAL_MMAP_MAX = -4, 65536  # blocks that may come from the system one by one
_LARGEST = 2**31 - 1

_lock = Lock()
_users = 0


@contextmanager
def kept_memory(device: str = "cpu") -> Iterator[None]:
    """Inside, freed memory stays with this process; at the end it goes back to the system.

    Does nothing where the C library is not glibc, or for another device than a CPU. May be entered
    again inside, and by several threads: the last to leave gives the memory back. Blocks above
    64 MB are kept for the main thread alone; other threads get them from the system each time.
    """
    library = _glibc() if device == "cpu" else None
    if library is None:
        yield
        return
    _count(library, 1)
    try:
        yield
    finally:
        _count(library, -1)


def _count(library: ctypes.CDLL, change: int) -> None:
    global _users  # the allocator is one for the whole process
    with _lock:
        first, _users = not _users, _users + change
        if first:
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _LARGEST)
        elif not _users:
            library.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
            library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD)
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
