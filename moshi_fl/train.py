"""Local training: batches in, better weights out, resumable at any instant.

A step depends on the weights, the recipe, the corpus and the step's number alone (batches and
dropout are seeded by it), so a checkpoint is the weights, the optimizer's moments and that number,
and a resumed run is the uninterrupted run, bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, CorruptRecord, TrainingError
from moshi_fl.models.common import extract_weights
from moshi_fl.models.family import Corpus, Task
from moshi_fl.optimizer import AdamW, clip_, one_cycle
from moshi_fl.weights import open_weights, read_header, save_weights, weights_digest

PRECISIONS = ("fp32", "bf16")
CHECKPOINT_SHARE = 20  # writing checkpoints may take a twentieth of the time


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Raises:
        ConfigError: A value out of range; names the field.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3  # peak of the one-cycle schedule
    weight_decay: float = 0.01
    gradient_clip: float = 1.0  # joint norm of all gradients
    warmup_fraction: float = 0.05
    precision: str = "fp32"  # bf16: activations and gradients; weights and moments stay float32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("learning_rate", "gradient_clip"):
            value = getattr(self, key)
            _require(0 < value < math.inf, key, value, "must be above 0")
        _require(
            0 <= self.weight_decay < math.inf,
            "weight_decay",
            self.weight_decay,
            "must be 0 or more",
        )
        _require(
            0 <= self.warmup_fraction <= 1,
            "warmup_fraction",
            self.warmup_fraction,
            "must be from 0 to 1",
        )
        _require(self.precision in PRECISIONS, "precision", self.precision, "must be fp32 or bf16")
        _require(0 <= self.seed < 1 << 53, "seed", self.seed, "must be from 0 to 2**53 - 1")


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {value!r} {rule}.")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int  # done so far
    steps: int
    loss: float  # nats per token on this step's batch
    tokens_per_second: float
    seconds_left: float
    learning_rate: float


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    resumed_from: int  # the step it continued at; 0 for a fresh run
    tokens: int  # seen by this call
    loss: float  # mean over the last tenth of the steps of this call, nats per token
    seconds: float


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
        on_step: Called after every step; what it raises ends the run.

    Raises:
        TrainingError: The loss or a gradient is not finite (the checkpoint is the last good one),
            or the checkpoint belongs to another run.
        CorruptRecord: The checkpoint is damaged.
    """
    module.to(recipe.device)
    run = _Run(module, task, recipe)
    saver = _Saver(checkpoint, checkpoint_seconds, identity(module, corpus, recipe))
    first = saver.restore(run)
    clock = _Clock(first, recipe.steps)
    batches = task.batches(corpus, recipe.batch_size, seed=recipe.seed, start=first)
    with run.active():
        for step in range(first, recipe.steps):
            loss, tokens, rate = run.step(step, next(batches))
            progress = clock.tick(step + 1, loss, tokens, rate)
            saver.save_if_due(run, step + 1)
            if on_step:
                on_step(progress)
        saver.save(run, recipe.steps)
    return clock.result()


class _Run:
    """The state that a step changes: float32 weights and the optimizer's moments."""

    def __init__(self, module: nn.Module, task: Task, recipe: Recipe) -> None:
        self.module, self.task, self.recipe = module, task, recipe
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        half = recipe.precision == "bf16"
        self.weights = {n: p.data.clone() if half else p.data for n, p in self.parameters.items()}
        self.optimizer = AdamW(self.weights, weight_decay=recipe.weight_decay)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Training mode; with bf16, the module holds rounded copies of the weights inside."""
        devices = [torch.device(self.recipe.device)] if "cuda" in self.recipe.device else []
        self.module.train()
        self._publish()
        with torch.random.fork_rng(devices):
            try:
                yield
            finally:
                for name, parameter in self.parameters.items():
                    parameter.data, parameter.grad = self.weights[name], None
                self.module.eval()

    def step(self, step: int, batch: Any) -> tuple[float, int, float]:
        """One update; loss before it, number of tokens, learning rate."""
        recipe = self.recipe
        rate, beta1 = one_cycle(
            step, recipe.steps, peak=recipe.learning_rate, warmup_fraction=recipe.warmup_fraction
        )
        torch.manual_seed((recipe.seed * 1_000_003 + step) % (1 << 63))
        loss, tokens = self.task.loss(self.module, batch)
        value = float(loss.detach())
        self._require_finite(value, "loss", step, rate)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients()
        norm = clip_(gradients, recipe.gradient_clip)
        self._require_finite(norm, "gradient's norm", step, rate)
        self.optimizer.step(gradients, step, learning_rate=rate, beta1=beta1)
        self._publish()
        return value, tokens, rate

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self.parameters.values():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            gradients.append(gradient.float())
            parameter.grad = None
        return gradients

    def _publish(self) -> None:
        if self.recipe.precision == "bf16":
            for name, parameter in self.parameters.items():
                parameter.data = self.weights[name].bfloat16()

    def _require_finite(self, value: float, what: str, step: int, rate: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} is {value} at step {step + 1} of {self.recipe.steps}, "
                f"learning rate {rate:.3g}.",
                hint="Try again with a lower learning rate (--lr); nothing was sent.",
            )


def identity(module: nn.Module, corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must agree on to be continued: recipe, data and base, not the device."""
    fields = dataclasses.asdict(recipe)
    del fields["device"]
    base = weights_digest(extract_weights(module))
    return {**fields, "data": corpus.fingerprint, "base": base}


def checkpoint_state(path: Path) -> tuple[int, dict[str, Any]]:
    """Steps done and identity (recipe, ``data``, ``base``) of a checkpoint.

    Raises:
        CorruptRecord: Not a checkpoint.
    """
    metadata = read_header(path).metadata
    try:
        return int(metadata["step"]), json.loads(metadata["identity"])
    except (KeyError, ValueError) as error:
        raise CorruptRecord(f"{path.name}: not a training checkpoint ({error}).") from error


class _Saver:
    """Writes checkpoints now and then, and reads one back."""

    def __init__(self, path: Path | None, seconds: float, identity: dict[str, Any]) -> None:
        self._path, self._seconds, self._identity = path, seconds, identity
        self._due = time.monotonic() + seconds

    def save_if_due(self, run: _Run, step: int) -> None:
        if self._path and time.monotonic() >= self._due:
            self.save(run, step)

    def save(self, run: _Run, step: int) -> None:
        if not self._path:
            return
        start = time.monotonic()
        tensors = {key: value.detach().cpu().numpy() for key, value in _tensors(run).items()}
        metadata = {"step": str(step), "identity": json.dumps(self._identity, sort_keys=True)}
        save_weights(self._path, tensors, metadata)
        end = time.monotonic()
        pause = max(self._seconds, CHECKPOINT_SHARE * (end - start)) if self._seconds else 0.0
        self._due = end + pause

    def restore(self, run: _Run) -> int:
        """Put the checkpoint, if there is one, into the run; the step to continue at."""
        if not self._path or not self._path.exists():
            return 0
        step, theirs = checkpoint_state(self._path)
        differing = [key for key in self._identity if theirs.get(key) != self._identity[key]]
        if differing:
            raise TrainingError(
                f"the checkpoint {self._path} is of another run: {', '.join(differing)} differ.",
                hint="Resume with the same settings, data and base, or remove that file.",
            )
        saved, wanted = open_weights(self._path), _tensors(run)
        shapes = {key: tuple(value.shape) for key, value in wanted.items()}
        if {key: value.shape for key, value in saved.items()} != shapes:
            raise CorruptRecord(f"{self._path.name}: its tensors are not those of this model.")
        for key, tensor in wanted.items():
            tensor.copy_(torch.tensor(saved[key]))
        return step


def _tensors(run: _Run) -> dict[str, Tensor]:
    groups = {"weight": run.weights, "mean": run.optimizer.mean, "square": run.optimizer.square}
    return {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}


class _Clock:
    """Speed, time left and the final figures."""

    def __init__(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._start = time.monotonic()
        self._tokens = 0
        self._losses: list[float] = []

    def tick(self, step: int, loss: float, tokens: int, rate: float) -> Progress:
        self._tokens += tokens
        self._losses.append(loss)
        elapsed = max(time.monotonic() - self._start, 1e-9)
        left = elapsed / (step - self._first) * (self._steps - step)
        return Progress(step, self._steps, loss, self._tokens / elapsed, left, rate)

    def result(self) -> TrainResult:
        recent = self._losses[-max(1, len(self._losses) // 10) :]
        loss = sum(recent) / len(recent) if recent else math.nan
        seconds = time.monotonic() - self._start
        return TrainResult(self._steps, self._first, self._tokens, loss, seconds)


def calibrate(
    module: nn.Module, task: Task, corpus: Corpus, recipe: Recipe, *, minutes: float
) -> int:
    """How many steps of this recipe fit into so many minutes, by timing a few on a copy."""
    run = _Run(copy.deepcopy(module).to(recipe.device), task, recipe)
    batches = task.batches(corpus, recipe.batch_size, seed=recipe.seed)
    seconds = []
    with run.active():
        for _ in range(4):
            start = time.perf_counter()
            run.step(0, next(batches))
            seconds.append(time.perf_counter() - start)
    return max(1, int(minutes * 60 / sorted(seconds[1:])[1]))  # the first one warms up


def steps_for_epochs(corpus: Corpus, batch_size: int, epochs: float) -> int:
    """How many steps show the training data so many times."""
    return max(1, math.ceil(epochs * corpus.num_examples / batch_size))
