"""Runs inputs in several processes and measures each: exceptions, time, memory, what was said.

An input follows from seed, target and number alone. A process is asked for chunks of numbers; it
interrupts an input after a second of computing, its address space is bounded, and if it dies or
answers no more, its shared memory still says at which input.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.targets import TARGETS, Target

CHUNK = 500
HANG_SECONDS = 1.0  # of computing, for one input
SILENCE_SECONDS = 120.0  # for a whole chunk, on a machine with other work
ADDRESS_SPACE = 8 << 30  # bytes; a hard stop
ALLOWANCE = 4 << 20  # bytes for what does not grow with the input: blocks, tables, the interpreter
TRACED_EVERY = 50  # inputs; the rest is measured by the size of the process
WARM_UP = 40  # inputs of each target before anything is measured
REFRESH = 100  # inputs between two looks at what the process holds


@dataclass
class Tally:
    """What became of a target's inputs."""

    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    traced: int = 0  # bytes at most, of the inputs that were traced
    grown: int = 0  # bytes at most by which the process grew during one input
    words: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Join two."""
        self.inputs += other.inputs
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        self.traced, self.grown = max(self.traced, other.traced), max(self.grown, other.grown)
        self.words += other.words


@dataclass(frozen=True)
class Failure:
    """An input that showed a defect."""

    target: str
    seed: int
    index: int
    what: str

    @property
    def command(self) -> str:
        """What shows it again."""
        return f"python -m tests.fuzz --seed {self.seed} --only {self.target} --index {self.index}"


class Hang(BaseException):
    """Raised into an input that takes too long; no reader may catch it."""


def input_of(target: str, seed: int, index: int) -> Any:
    """The input, the same every time."""
    return TARGETS[target].make(Random(f"{seed}/{target}/{index}"))


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _on_alarm(*_: object) -> None:
    raise Hang


def attempt(target: Target, made: Any, tally: Tally, *, traced: bool) -> str:
    """Run one input and take note of it; what is wrong with it, or nothing."""
    bound = 2 * target.limit + ALLOWANCE
    if traced:
        tracemalloc.start()
    start, before = time.process_time(), _peak()
    problem, word = "", "defect"
    try:
        with _at_most(HANG_SECONDS * (10 if traced else 1)):
            word = target.run(made)
    except Hang:
        problem = f"takes more than {HANG_SECONDS} s of computing"
    except Exception:
        problem = traceback.format_exc(limit=-8)
    seconds, grown = time.process_time() - start, _peak() - before
    if traced:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tally.traced = max(tally.traced, held)
        problem = problem or _too_much(held, bound, "took")
    else:
        tally.slowest, tally.grown = max(tally.slowest, seconds), max(tally.grown, grown)
        problem = problem or _too_much(grown, bound, "made the process grow by")
    tally.inputs += 1
    tally.words[word] += 1
    return problem


def _too_much(found: int, bound: int, what: str) -> str:
    return f"{what} {found:,} bytes; the bound is {bound:,}" if found > bound else ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    """Let the peak start again at what the process holds now; where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _prepare(progress: Any) -> None:
    global _progress  # noqa: PLW0603 - one for each process
    _progress = progress
    signal.signal(signal.SIGVTALRM, _on_alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for name in TARGETS:  # what is imported or allocated once is no input's doing
        for index in range(WARM_UP):
            with contextlib.suppress(Exception):
                TARGETS[name].run(input_of(name, -1, index))
    gc.freeze()


_progress: Any = None


def _run_chunk(chunk: tuple[str, int, int, int, int]) -> tuple[str, Tally, list[Failure]]:
    name, seed, start, stop, slot = chunk
    target, tally, failures = TARGETS[name], Tally(), []
    began = time.perf_counter()
    for index in range(start, stop):
        if _progress is not None:
            _progress[slot] = index
        if index % REFRESH == 0:
            _forget_peak()
        made = input_of(name, seed, index)
        problem = attempt(target, made, tally, traced=index % TRACED_EVERY == 0)
        if problem:
            failures.append(Failure(name, seed, index, problem))
    tally.seconds = time.perf_counter() - began
    return name, tally, failures


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    inputs: int
    seed: int
    jobs: int
    seconds: float = float("inf")
    only: tuple[str, ...] = ()
    most_failures: int = 20

    def chunks(self) -> Iterator[tuple[str, int, int, int, int]]:
        """Chunks of all targets in turn, so that a run cut short has something of each."""
        names = self.only or tuple(TARGETS)
        total = sum(TARGETS[name].weight for name in names)
        wanted = {name: self.inputs * TARGETS[name].weight // total + 1 for name in names}
        done, slot = dict.fromkeys(names, 0), 0
        while left := [name for name in names if done[name] < wanted[name]]:
            name = min(left, key=lambda one: done[one] / wanted[one])
            stop = min(done[name] + CHUNK, wanted[name])
            yield name, self.seed, done[name], stop, slot
            done[name], slot = stop, slot + 1


def run(plan: Plan) -> tuple[dict[str, Tally], list[Failure]]:
    """All inputs, or as many as the time allows; an interrupt ends it with what there is."""
    tallies: dict[str, Tally] = {name: Tally() for name in plan.only or TARGETS}
    failures: list[Failure] = []
    chunks = list(plan.chunks())
    fork = multiprocessing.get_context("fork")
    progress = fork.RawArray("q", [-1] * len(chunks))
    deadline = time.monotonic() + plan.seconds
    with (
        fork.Pool(plan.jobs, _prepare, (progress,)) as pool,
        contextlib.suppress(KeyboardInterrupt),
    ):
        waiting: list[tuple[Any, Any]] = []
        for chunk in chunks:
            if time.monotonic() > deadline or len(failures) >= plan.most_failures:
                break
            waiting.append((chunk, pool.apply_async(_run_chunk, (chunk,))))
            if len(waiting) > 2 * plan.jobs:
                failures += _collect(waiting.pop(0), progress, tallies)
        for pair in waiting:
            failures += _collect(pair, progress, tallies)
    return tallies, failures


def _collect(pair: tuple[Any, Any], progress: Any, tallies: dict[str, Tally]) -> list[Failure]:
    (name, seed, start, _, slot), answer = pair
    try:
        _, tally, found = answer.get(SILENCE_SECONDS)
    except multiprocessing.TimeoutError:
        index = max(progress[slot], start)
        return [Failure(name, seed, index, "the process died, or answers no more")]
    tallies[name].add(tally)
    return list(found)


def save(failures: list[Failure], folder: Path) -> None:
    """Write down each failing input, and the command that runs it again."""
    folder.mkdir(parents=True, exist_ok=True)
    for failure in failures:
        path = folder / f"{failure.target}-{failure.seed}-{failure.index}"
        made = input_of(failure.target, failure.seed, failure.index)
        path.with_suffix(".input").write_bytes(
            made if isinstance(made, bytes) else pickle.dumps(made)
        )
        about = {"command": failure.command, "what": failure.what, "input": repr(made)[:2000]}
        path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


def processes() -> int:
    """As many as there are processors for this one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
