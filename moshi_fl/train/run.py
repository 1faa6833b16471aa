"""Training of a module on a corpus, as ``moshi-fl contribute`` and Flower clients do it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from moshi_fl.models.common import train_only
from moshi_fl.models.family import Corpus, Task
from moshi_fl.train.checkpoint import Identity, identity, restore_checkpoint, save_checkpoint
from moshi_fl.train.clock import Clock, Progress, TrainResult
from moshi_fl.train.engine import Engine
from moshi_fl.train.recipe import Recipe

CHECKPOINT_SHARE = 20  # writing checkpoints may take a twentieth of the time
READ_SECONDS = 0.25  # how often the figures of a busy GPU are read


def train(
    module: nn.Module,
    task: Task,
    corpus: Corpus,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 5.0,
    on_step: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train ``module``, which holds the base weights, in place; it ends in evaluation mode.

    Args:
        module: Model with the base weights, float32; moved to the recipe's device.
        task: Gives batches and loss.
        corpus: The data.
        recipe: How to train.
        checkpoint: File to continue from if it exists, and to write; the caller removes it.
        checkpoint_seconds: Shortest time between two checkpoints; 0 writes one after every step.
        on_step: Called for every step, on a GPU some time later; what it raises ends the run.

    Raises:
        TrainingError: The loss or a gradient is not finite (the checkpoint is the last good one),
            or the checkpoint belongs to another run.
        CorruptRecord: The checkpoint is damaged.
        OSError: The checkpoint cannot be written; the one before it stays.
    """
    recipe = recipe.settled()
    train_only(task, module, recipe.trains)
    module.to(recipe.device)
    engine = _engine(module, task, recipe)
    saver = _Saver(checkpoint, checkpoint_seconds, identity(module, corpus, recipe))
    first = saver.restore(engine)
    clock = Clock(first, recipe.steps)
    steps = _steps(task, corpus, recipe, first)
    with engine.active():
        read_at = time.monotonic()
        for step in range(first, recipe.steps):
            engine.step(step, next(steps))
            done, now = step + 1, time.monotonic()
            if not (engine.reads_at_once or now - read_at > READ_SECONDS or done == recipe.steps):
                continue
            read_at = now
            reports = [clock.tick(report) for report in engine.settle()]
            saver.save_if_due(engine, done)
            for progress in reports if on_step else ():
                on_step(progress)  # type: ignore[misc]
        saver.save(engine, recipe.steps)
    return clock.result()


def _engine(module: nn.Module, task: Task, recipe: Recipe) -> Engine:
    if not recipe.private:
        return Engine(module, task.loss, recipe)
    from moshi_fl.train.private import PrivateEngine

    return PrivateEngine(module, task.loss, recipe)


def _steps(task: Task, corpus: Corpus, recipe: Recipe, first: int) -> Iterator[list[Any]]:
    """The batches of each step, from a step on; of a private run, nobody can tell them again."""
    if recipe.private:
        from moshi_fl.train.private import poisson_steps

        yield from poisson_steps(task, corpus, recipe)
    start = first * recipe.accumulation
    batches = task.batches(corpus, recipe.batch_size, seed=recipe.seed, start=start)
    while True:
        yield list(islice(batches, recipe.accumulation))


class _Saver:
    """Writes checkpoints now and then, and reads one back."""

    def __init__(self, path: Path | None, seconds: float, identity: Identity) -> None:
        self._path, self._seconds, self._identity = path, seconds, identity
        self._due = time.monotonic() + seconds

    def save_if_due(self, engine: Engine, step: int) -> None:
        if time.monotonic() >= self._due:
            self.save(engine, step)

    def save(self, engine: Engine, step: int) -> None:
        if not self._path:
            return
        start = time.monotonic()
        save_checkpoint(self._path, engine, step, self._identity)
        end = time.monotonic()
        pause = max(self._seconds, CHECKPOINT_SHARE * (end - start)) if self._seconds else 0.0
        self._due = end + pause

    def restore(self, engine: Engine) -> int:
        if not self._path or not self._path.exists():
            return 0
        return restore_checkpoint(self._path, engine, self._identity)


def calibrate(
    module: nn.Module, task: Task, corpus: Corpus, recipe: Recipe, *, minutes: float
) -> int:
    """How many steps of this recipe fit into so many minutes, by timing a few on a copy."""
    recipe, module = recipe.settled(), copy.deepcopy(module)
    train_only(task, module, recipe.trains)
    engine = _engine(module.to(recipe.device), task, recipe)
    steps = _steps(task, corpus, recipe, 0)
    seconds = []
    with engine.active():
        for _ in range(4):
            start = time.perf_counter()
            engine.step(0, next(steps))
            engine.settle()
            seconds.append(time.perf_counter() - start)
    return max(1, int(minutes * 60 / sorted(seconds[1:])[1]))  # the first one warms up


def steps_for_epochs(corpus: Corpus, batch_size: int, epochs: float) -> int:
    """How many steps of so many windows show the training data so many times."""
    return max(1, math.ceil(epochs * corpus.num_examples / batch_size))
