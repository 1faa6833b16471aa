"""One run of ``python -m moshi_fl.train``: data, engine, validation, checkpoints and figures."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from moshi_fl.errors import ConfigError, TrainingError
from moshi_fl.models.family import Observed
from moshi_fl.train.checkpoint import Identity, recipe_identity
from moshi_fl.train.engine import Engine, Report
from moshi_fl.train.folder import RunFolder
from moshi_fl.train.hardware import measured_peak
from moshi_fl.train.logs import Sink, open_sinks, reference_name
from moshi_fl.train.recipe import Recipe
from moshi_fl.train.settings import Settings
from moshi_fl.train.subject import Data, Subject, read_data, shares, subject, windows
from moshi_fl.train.world import World

Say = Callable[[str], None]
Figures = dict[str, float]


@dataclass(frozen=True)
class Ready:
    """Everything that a run needs, checked."""

    settings: Settings
    recipe: Recipe
    what: Subject
    data: Data
    module: nn.Module
    world: World

    @property
    def batch(self) -> int:
        """Sequences per step, in all processes together."""
        return self.recipe.batch_size * self.recipe.accumulation * self.world.size

    def told(self, name: str) -> float:
        """A figure that the module may know about itself; 0 when it does not."""
        method: Callable[[], float] | None = getattr(self.module, name, None)
        return float(method()) if method else 0.0

    @property
    def identity(self) -> Identity:
        """What a checkpoint must agree on; how the batch is shared is not part of it."""
        recipe = recipe_identity(self.recipe)
        del recipe["batch_size"], recipe["accumulation"]
        model = {f"model.{key}": value for key, value in self.what.config.items()}
        data = self.data.training.fingerprint
        return {
            **recipe,
            "batch": self.batch,
            "family": self.settings.family,
            **model,
            "data": data,
        }


def pick_device(name: str) -> str:
    """The device of this process.

    Raises:
        ConfigError: This machine does not have it.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"device = {name!r} is not a device.", hint="--set device=cpu") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    if not there.get(kind, kind == "mps" and torch.backends.mps.is_available()):
        raise ConfigError(f"device {name} is not usable on this machine.", hint="--set device=cpu")
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local else name


def prepare(settings: Settings, device: str, world: World, *, real: bool = True) -> Ready:
    """Check everything; ``real=False`` builds a module without memory for its weights.

    Raises:
        ConfigError: A setting cannot be used.
        DataError: The data cannot be used.
    """
    recipe = settings.recipe(device)
    what = subject(settings.family, settings.model)
    val_dir = Path(settings.val_dir) if settings.val_dir else None
    data = read_data(Path(settings.data_dir), val_dir, settings.val_share, what)
    with torch.random.fork_rng([]), torch.device("cpu" if real else "meta"):
        torch.manual_seed(recipe.seed)
        module = what.build()
    return Ready(settings, recipe, what, data, module.to(device) if real else module, world)


@dataclass
class Run:
    """A run at work."""

    ready: Ready
    folder: RunFolder
    say: Say
    engine: Engine = field(init=False)
    sinks: list[Sink] = field(default_factory=list)
    peak: float = 0.0
    best: float = math.inf

    def __post_init__(self) -> None:
        ready = self.ready
        module = ready.module
        self.engine = Engine(module, ready.what.loss, ready.recipe, ready.world)

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.ready.world.rank == 0

    def go(self, *, fresh: bool, resume: bool) -> int:
        """Train to the end; how many steps are done.

        Raises:
            KeyboardInterrupt: Somebody wants it to end; a checkpoint is written.
        """
        ready = self.ready
        try:
            with ready.world.together():
                first = self._begin(fresh, resume)
            with _stopping() as stop, self.engine.active():
                self._train(first, stop)
        finally:
            for sink in self.sinks:
                sink.close()
        with ready.world.together():
            if self.leads:
                self.folder.publish("final", ready.module)
        return ready.recipe.steps

    def _begin(self, fresh: bool, resume: bool) -> int:
        ready, folder = self.ready, self.folder
        moved = folder.clear() if fresh and self.leads else None
        if moved:
            self.say(f"the earlier run is in {moved} now")
        path = None if fresh else folder.newest()
        if resume and not path:
            raise ConfigError(f"there is no checkpoint in {folder.path}.", hint="Without --resume.")
        first = folder.restore(path, self.engine, ready.identity) if path else 0
        if path:
            self.say(f"continuing from {path} (step {first:,})")
        if self.leads:
            folder.describe(ready.settings.family, ready.what.config)
            self.sinks, notes = open_sinks(
                ready.settings, folder.path, first, {**ready.identity, "out_dir": str(folder.path)}
            )
            for note in notes:
                self.say(note)
        self.best = folder.best_loss()
        recipe = ready.recipe
        if ready.told("flops_per_token"):
            self.peak = ready.settings.peak_flops or measured_peak(recipe.device, recipe.precision)
        return first

    def _train(self, first: int, stop: list[bool]) -> None:
        ready, settings = self.ready, self.ready.settings
        batches = windows(ready.data.training, ready.batch, seed=ready.recipe.seed, start=first)
        size, world, steps = ready.recipe.batch_size, ready.world, ready.recipe.steps
        window = _Window(first)
        for step in range(first, steps):
            with world.together():
                batch = next(batches)
            self._compiled_step(step, shares(batch, size, world.rank, world.size), step == first)
            done, ends = step + 1, step + 1 == steps
            stopped = world.total(int(stop[0])) > 0
            logs = done % settings.log_interval == 0 or ends
            saves = done % settings.save_interval == 0 or ends or stopped
            validates = done % settings.val_interval == 0 or ends
            if not (logs or saves or validates):
                continue
            reports = self.engine.settle()
            window.take(reports)
            if logs:
                self._log(done, window)
            if validates and ready.data.held_out and not stopped:
                self._validate(done)
            if saves:
                self._save(done)
            if stopped:
                raise KeyboardInterrupt

    def _compiled_step(self, step: int, batches: list[Any], is_first: bool) -> None:
        if not (is_first and self.ready.recipe.compile):
            self.engine.step(step, batches)
            return
        from torch._dynamo.exc import TorchDynamoException

        try:
            self.engine.step(step, batches)
        except TorchDynamoException as error:
            raise TrainingError(
                f"the model does not compile here: {str(error).splitlines()[0]}",
                hint="--set compile_model=false",
            ) from error

    def _save(self, done: int) -> None:
        with self.ready.world.together():
            if self.leads:
                self.folder.save(self.engine, done, self.ready.identity)

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        """Mean loss on the same held-out batches each time; every process does its share."""
        ready, world = self.ready, self.ready.world
        assert ready.data.held_out is not None
        size = ready.recipe.batch_size
        batches = windows(ready.data.held_out, size * world.size, seed=0, start=0)
        count = ready.settings.val_batches
        total = torch.zeros((), device=ready.recipe.device)
        ready.module.eval()
        with world.together():
            for batch in islice(batches, count):
                (share,) = shares(batch, size, world.rank, world.size)
                total += ready.what.held_out_loss(ready.module, share)[0].float()
        ready.module.train()
        world.add_up_([total])
        loss = float(total) / (count * world.size)
        self._emit(done, {"loss/validation": loss})
        self.say(f"step {done:,}  validation loss {loss:.4f}")
        if loss < self.best:
            self.best = loss
            with world.together():
                if self.leads:
                    self._publish_best(done, loss)

    def _publish_best(self, done: int, loss: float) -> None:
        rounded = {name: p.data for name, p in self.engine.parameters.items()}
        for name, parameter in self.engine.parameters.items():
            parameter.data = self.engine.weights[name]
        try:
            self.folder.publish("best", self.ready.module)
            self.folder.note_best(done, loss)
        finally:
            for name, parameter in self.engine.parameters.items():
                parameter.data = rounded[name]

    def _emit(self, done: int, figures: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(done, figures)

    def _log(self, done: int, window: _Window) -> None:
        if not self.leads:
            window.restart(done)
            return
        figures = self._figures(done, window)
        window.restart(done)
        self._emit(done, figures)
        self.say(line(done, self.ready.recipe.steps, figures))

    def _figures(self, done: int, window: _Window) -> Figures:
        ready, report = self.ready, window.last
        speed, seconds = window.speed(done)
        module = ready.module
        observed = module.statistics() if isinstance(module, Observed) else {}
        figures = {reference_name(name): value for name, value in observed.items()}
        main = figures.get("loss/main", report.loss)
        figures |= {
            "loss/total": report.loss,
            "perplexity": math.exp(min(main, 20.0)),
            "lr": report.learning_rate,
            "grad_norm": report.gradient_norm,
            "grad_norm_clipped": min(report.gradient_norm, ready.recipe.gradient_clip),
            "epoch": done * ready.batch / ready.data.training.num_examples,
            "throughput/tok_per_s_global": speed,
            "throughput/tok_per_s_per_gpu": speed / ready.world.size,
            "timing/sec_per_step_window": seconds,
            "timing/eta_sec": seconds * (ready.recipe.steps - done),
            "meta/total_trainable_params": sum(p.numel() for p in module.parameters()),
        }
        if active := ready.told("active_parameters"):
            figures["meta/active_params_per_token"] = active
            figures["meta/active_params_ratio"] = active / figures["meta/total_trainable_params"]
        if work := ready.told("flops_per_token"):
            figures["mfu"] = speed * work / (self.peak * ready.world.size)
        if "cuda" in ready.recipe.device:
            figures["mem/current_gib"] = torch.cuda.memory_allocated() / 2**30
            figures["mem/max_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return figures


class _Window:
    """The steps since the last line of figures."""

    last: Report

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start, self._tokens = step, time.monotonic(), 0

    def take(self, reports: list[Report]) -> None:
        self._tokens += sum(report.tokens for report in reports)
        self.last = reports[-1]

    def speed(self, step: int) -> tuple[float, float]:
        """Tokens per second, and seconds per step."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return self._tokens / seconds, seconds / max(step - self._step, 1)


def line(done: int, steps: int, figures: Mapping[str, float]) -> str:
    """One line for people."""
    parts = [f"step {done:,}/{steps:,}", f"loss {figures['loss/total']:.4f}"]
    if "loss/aux" in figures:
        parts.append(f"main {figures['loss/main']:.4f} aux {figures['loss/aux']:.4f}")
    parts += [
        f"ppl {figures['perplexity']:.1f}",
        f"lr {figures['lr']:.2e}",
        f"grad {figures['grad_norm']:.2f}→{figures['grad_norm_clipped']:.2f}",
        f"{figures['throughput/tok_per_s_global']:,.0f} tokens/s",
    ]
    for name, label in (("mfu", "MFU"), ("experts/drop_rate", "drops")):
        parts += [f"{label} {figures[name]:.1%}"] if name in figures else []
    if "experts/gate_mean" in figures:
        parts.append(f"gate {figures['experts/gate_mean']:.2f}")
    return "  ".join([*parts, f"{figures['timing/eta_sec'] / 60:,.0f} min left"])


@contextmanager
def _stopping() -> Iterator[list[bool]]:
    """A flag that Ctrl-C or a polite end sets; a second one ends the process at once."""
    flag = [False]
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        flag[0] = True
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
