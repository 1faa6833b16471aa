"""Where the trainer's figures go: ``metrics.jsonl``, TensorBoard, W&B."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moshi_fl.errors import ConfigError
from moshi_fl.weights import write_atomic

if TYPE_CHECKING:
    from moshi_fl.train.settings import Settings

Figures = Mapping[str, float]


class Sink(Protocol):
    """Takes figures."""

    def write(self, step: int, figures: Figures) -> None:
        """Take the figures of a step, counted from 1."""
        ...

    def close(self) -> None:
        """Make sure that all have arrived."""
        ...


class JsonLines:
    """A file with one JSON object per line; a resumed run drops what it is about to do again."""

    def __init__(self, path: Path, first: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= first)
        write_atomic(path, kept.encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Figures) -> None:
        """See ``Sink``."""
        finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See ``Sink``."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was being written when the process died


class TensorBoard:
    """Event files below ``out_dir/tensorboard``."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first + 1)

    def write(self, step: int, figures: Figures) -> None:
        """See ``Sink``."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See ``Sink``."""
        self._writer.close()


class WandB:
    """A run at Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, settings: Settings, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity or None,
                name=settings.wandb_run_name or None,
                dir=str(folder),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B does not start: {error}.",
                hint="wandb login, or WANDB_MODE=offline, or leave it out: --set wandb_project=",
            ) from error

    def write(self, step: int, figures: Figures) -> None:
        """See ``Sink``."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """See ``Sink``."""
        self._run.finish()


def open_sinks(
    settings: Settings, folder: Path, first: int, config: Mapping[str, Any]
) -> tuple[list[Sink], list[str]]:
    """All sinks that are asked for and there, and what to say about those that are not."""
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", first)]
    notes = []
    if settings.tensorboard and find_spec("tensorboard"):
        sinks.append(TensorBoard(folder / "tensorboard", first))
    elif settings.tensorboard:
        notes.append("no TensorBoard files: pip install tensorboard")
    if settings.wandb_project and find_spec("wandb"):
        sinks.append(WandB(settings, folder, config))
    elif settings.wandb_project:
        notes.append("wandb_project is set, but W&B is not installed: pip install wandb")
    return sinks, notes


def reference_name(name: str) -> str:
    """The reference's name of a figure of ``Observed``."""
    head, *rest = name.split("/")
    if head == "expert_use" and len(rest) == 2:
        return f"experts/util_layer{rest[0]}/e{rest[1]}"
    named = {"loss_main": "loss/main", "loss_aux": "loss/aux", "drop_fraction": "experts/drop_rate"}
    return named.get(name, f"experts/{name}")
