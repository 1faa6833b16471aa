"""The real commands in processes of their own, which end on their own or are killed at a moment.

A nursery is one process that has imported everything (torch takes seconds) and forks a child for
each command. A child can be told to write down what it changes (files renamed or removed, Git
commands that write), and to die as from ``kill -9`` right before the n-th change, or shortly after.
The product knows nothing of this: Python's own audit events tell.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIS = {"moshi-fl": "moshi_sdk.cli", "moshi-hub": "moshi_hub.cli"}
PRELOADED = (
    *("git", "torch", "moshi_fl.models.char", "moshi_fl.strategies"),
    *("moshi_sdk.contribute", "moshi_sdk.client", "moshi_sdk.audit", "moshi_sdk.sync"),
    *("moshi_hub.create", "moshi_hub.merge", "moshi_hub.heldout"),
)
KILLED = -signal.SIGKILL
KILLED_LATER = -signal.SIGALRM
FILE_CHANGES = {"os.rename", "os.remove", "os.link"}
GIT_CHANGES = {"init", "push", "fetch", "update-ref"}


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: Exit status; minus the signal's number when it was killed.
        out: What it printed.
        err: What it said.
        events: What it did, if it was traced.
    """

    status: int
    out: str
    err: str
    events: tuple[str, ...] = ()

    @property
    def json(self) -> dict[str, Any]:
        """The document that ``--json`` printed."""
        return json.loads(self.out)

    @property
    def was_killed(self) -> bool:
        """Whether it did not end on its own."""
        return self.status in {KILLED, KILLED_LATER}


@dataclass(frozen=True)
class Child:
    """A command that runs."""

    nursery: Nursery
    pid: int
    folder: Path

    def wait(self) -> Ended:
        """Its end."""
        status = self.nursery.ask(wait=self.pid)
        events = self.folder / "events"
        return Ended(
            status,
            (self.folder / "out").read_text(),
            (self.folder / "err").read_text(),
            tuple(events.read_text().splitlines()) if events.exists() else (),
        )

    def kill(self) -> None:
        """End it from outside, at any moment."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """Starts commands; one process, used by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def ask(self, **request: Any) -> int:
        """One request, one number in answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        *command: str | Path,
        home: Path,
        trace: bool = False,
        kill_at: int = 0,
        kill_after: float = 0.0,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Start a command.

        Args:
            command: As typed, beginning with ``moshi-fl`` or ``moshi-hub``.
            home: Its ``MOSHI_FL_HOME``.
            trace: Whether to write down its events.
            kill_at: Die at this event, counted from 1; 0 for never.
            kill_after: Die so many seconds after that event instead of before it.
            env: More variables.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        pid = self.ask(
            argv=[str(word) for word in command],
            env={"MOSHI_FL_HOME": str(home), **(env or {})},
            folder=str(folder),
            trace=trace,
            kill_at=kill_at,
            kill_after=kill_after,
        )
        return Child(self, pid, folder)

    def run(self, *command: str | Path, home: Path, **how: Any) -> Ended:
        """Start a command and wait for its end."""
        return self.start(*command, home=home, **how).wait()

    def close(self) -> None:
        """End the nursery."""
        self._process.communicate()


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery with a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="moshi-fl-nursery-") as folder:
        opened = Nursery(Path(folder))
        try:
            yield opened
        finally:
            opened.close()


class _Trap:
    """Counts events of this process, and ends it at the chosen one."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._left = request["kill_at"]
        self._after = request["kill_after"]
        path = Path(request["folder"], "events")
        self._log = path.open("w") if request["trace"] else None

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not (name := _change(event, args)):
            return
        if self._log:
            self._log.write(name.replace("\n", " ") + "\n")
            self._log.flush()
        self._left -= 1
        if self._left == 0:
            if self._after:
                signal.setitimer(signal.ITIMER_REAL, self._after)  # its signal ends the process
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def _change(event: str, args: tuple[Any, ...]) -> str:
    """What changes something that lasts, in words; whoever dies in between dies as before it."""
    if event == "subprocess.Popen":
        words = [str(word) for word in args[1]]
        words = words[words.index("git") + 1 :] if "git" in words else words
        return "git " + " ".join(words) if words[0] in GIT_CHANGES else ""
    if event not in FILE_CHANGES:
        return ""
    path = str(args[0])
    passing = event == "os.remove" and (not path.startswith("/") or "/.tmp-" in path)
    passing = passing or "/moshi-scratch/" in path or "/work-" in path
    return "" if passing else f"{event} {path}"


def _serve() -> None:
    roots = {name: importlib.import_module(module) for name, module in CLIS.items()}
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _answer(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))
        elif pid := os.fork():
            _answer(pid)
        else:
            _child(request, roots)


def _answer(number: int) -> None:
    os.write(1, b"%d\n" % number)


def _child(request: dict[str, Any], roots: dict[str, Any]) -> None:
    os.environ.update(request["env"])
    for name, target in (("out", 1), ("err", 2)):
        opened = os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, target)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if request["trace"] or request["kill_at"]:
        sys.addaudithook(_Trap(request))
    status = 70
    try:
        command, *args = request["argv"]
        status = roots[command].main(args)
    finally:
        if sys.exc_info()[0]:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
