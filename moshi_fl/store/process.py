"""Running Git: the only place that touches GitPython, and of it only ``Git.execute``.

The child gets an environment of ours, an own session, a time limit, a limit on what it may print
and, where asked, on the files it may write. Nothing from outside decides what is executed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass
from functools import cache
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from moshi_fl.errors import MoshiError
from moshi_fl.store.urls import redact
from moshi_fl.text import clean

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from git import Git

MAX_OUTPUT = 64 << 20  # bytes of answer kept in memory
MAX_WORDS = 16 << 10  # bytes of stderr kept, the last ones
_CHUNK = 1 << 18
_PATIENCE = 2.0  # seconds for the last words after the end of the process
# The user's variables that say how to reach a server; any other GIT_* could redirect our store.
_KEPT = re.compile(r"GIT_(SSL_|PROXY_SSL_|SSH|EXEC_PATH|ASKPASS|HTTP_USER_AGENT|PYTHON_)")
# "$0" is the limit in blocks of 512 bytes; the command follows as separate words.
_WITH_FILE_LIMIT = 'ulimit -f "$0" && exec "$@"'


@dataclass(frozen=True)
class Result:
    """What a Git process did."""

    status: int
    out: bytes
    words: str
    timed_out: bool = False
    overflowed: bool = False

    @property
    def lines(self) -> list[str]:
        """Standard output as text lines."""
        return self.out.decode(errors="backslashreplace").splitlines()


@dataclass(frozen=True)
class Task:
    """One Git command: arguments after ``git``, its input, and its limits."""

    argv: Sequence[str]
    env: Mapping[str, str]
    stdin: BinaryIO | None = None
    out: BinaryIO | None = None
    max_output: int = MAX_OUTPUT
    max_file: int | None = None
    timeout: float = 600.0
    keep_environment: bool = False


def run(folder: Path, task: Task) -> Result:
    """Run one Git command to its end, or to its limits.

    Raises:
        MoshiError: Git cannot be started.
    """
    return _follow(_start(folder, task), task)


@cache
def _git_class() -> type[Git]:
    try:
        from git import Git  # a tenth of a second that --help need not pay
    except ImportError as error:
        raise MoshiError("Git cannot be run.", hint="Install git 2.39 or newer.") from error
    return Git


def _start(folder: Path, task: Task) -> subprocess.Popen[bytes]:
    command = ["git", *task.argv]
    if sys.platform != "win32":
        if task.max_file is not None:
            command = ["sh", "-c", _WITH_FILE_LIMIT, str(-(-task.max_file // 512)), *command]
        # GitPython passes everything on, and GIT_QUARANTINE_PATH, say, has no neutral value.
        if not task.keep_environment and (strays := _strays(task.env)):
            command = ["env", *(word for name in strays for word in ("-u", name)), *command]
    handle: Any = _git_class()(folder).execute(
        command,
        istream=task.stdin,
        as_process=True,
        env=task.env,
        start_new_session=True,
    )
    process: subprocess.Popen[bytes] = handle.proc
    handle.proc = None  # its destructor would close what we still read
    return process


def _strays(ours: Mapping[str, str]) -> list[str]:
    inherited = (name for name in os.environ if name.startswith("GIT_"))
    return [name for name in inherited if name not in ours and not _KEPT.match(name)]


def _follow(process: subprocess.Popen[bytes], task: Task) -> Result:
    stdout, stderr = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)
    words = _Tail(stderr)
    timed_out = threading.Event()

    def give_up() -> None:
        timed_out.set()
        _kill(process)  # and whoever else of its session keeps our pipes open

    watchdog = threading.Timer(task.timeout, give_up)
    watchdog.start()
    try:
        words.start()
        out, overflowed = _collect(stdout, task)
        if overflowed:
            _kill(process)
        status = process.wait()
    finally:
        watchdog.cancel()
        if process.poll() is None:
            _kill(process)
            process.wait()
        stdout.close()
        words.finish()
    return Result(status, out, words.text(), timed_out.is_set(), overflowed)


def _collect(stream: IO[bytes], task: Task) -> tuple[bytes, bool]:
    """Standard output, up to the limit; into ``task.out`` where there is one."""
    kept = bytearray()
    size = 0
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
        if size > task.max_output:
            return bytes(kept), True
        if task.out is None:
            kept += chunk
        else:
            task.out.write(chunk)
    return bytes(kept), False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with its children (transports and helpers)."""
    if sys.platform == "win32":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class _Tail(threading.Thread):
    """Drains a stream and keeps its end: a hostile server may send messages for ever."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._kept = bytearray()

    def run(self) -> None:
        read = self._stream.read1  # type: ignore[attr-defined]
        while chunk := read(_CHUNK):
            self._kept += chunk
            del self._kept[:-MAX_WORDS]

    def finish(self) -> None:
        """Wait for the end of the stream; a daemon that ssh left behind may hold it for ever."""
        self.join(_PATIENCE)
        if not self.is_alive():
            self._stream.close()

    def text(self) -> str:
        """What was said last, safe to print: no control characters, no passwords."""
        said = self._kept.decode(errors="replace").replace("\r", "\n")
        return clean(redact(said).strip(), keep="\n")
