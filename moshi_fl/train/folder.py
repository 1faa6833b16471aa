"""The trainer's ``out_dir``: checkpoints, the newest by name, and the weights that did best.

``ckpt_N.safetensors`` continues a run; ``latest`` has the name of the newest. ``best/`` and
``final/`` hold weights for use, as ``model.safetensors`` with ``config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moshi_fl.errors import ConfigError, CorruptRecord, HubError, TrainingError
from moshi_fl.models.common import extract_weights
from moshi_fl.models.folder import CONFIG_FILE, WEIGHTS_FILE
from moshi_fl.store.locking import LOCK_FILE, FolderLock
from moshi_fl.train.checkpoint import Identity, restore_checkpoint, save_checkpoint
from moshi_fl.train.engine import Engine
from moshi_fl.weights import save_weights, write_atomic

LATEST = "latest"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path
    keep: int = 0  # newest checkpoints; 0 for all

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other trainers out.

        Raises:
            ConfigError: One is at work in it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(FolderLock(self.path / LOCK_FILE).held(0))
            except HubError as error:
                raise ConfigError(
                    f"another trainer is at work in {self.path}.",
                    hint="Wait until it has ended, or take another folder: --set out_dir=…",
                ) from error
            yield

    def checkpoints(self) -> dict[int, Path]:
        """All there are by their step, in order."""
        found = {}
        for path in self.path.glob("ckpt_*.safetensors"):
            if match := re.fullmatch(r"ckpt_(\d+)\.safetensors", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def newest(self) -> Path | None:
        """The checkpoint to continue from: what ``latest`` names, or else the last there is."""
        pointer = self.path / LATEST
        name = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
        checkpoints = list(self.checkpoints().values())
        named = [path for path in checkpoints if path.name == name]
        return next(iter([*named, *reversed(checkpoints)]), None)

    def clear(self) -> Path | None:
        """Move what an earlier run left into a folder of its own; where that is."""
        names = (LATEST, "metrics.jsonl", "config.json", "best", "best.json", "final")
        old = [*self.checkpoints().values(), *(self.path / name for name in names)]
        old = [path for path in old if path.exists()]
        if not old:
            return None
        number = 1
        while (target := self.path / f"before-{number}").exists():
            number += 1
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        return target

    def save(self, engine: Engine, step: int, identity: Identity) -> Path:
        """Write a checkpoint and then let go of the oldest."""
        path = self.path / f"ckpt_{step}.safetensors"
        save_checkpoint(path, engine, step, identity)
        write_atomic(self.path / LATEST, f"{path.name}\n".encode())
        older = [old for number, old in self.checkpoints().items() if number < step]
        for old in older[: -(self.keep - 1) or None] if self.keep else []:
            old.unlink()
        return path

    def restore(self, path: Path, engine: Engine, identity: Identity) -> int:
        """Put a checkpoint into the engine; the step to continue at."""
        hint = "Train with the settings it was made with, or begin anew with --fresh."
        try:
            return restore_checkpoint(path, engine, identity, hint=hint)
        except CorruptRecord as error:
            others = [other.name for other in self.checkpoints().values() if other != path]
            then = f"goes on from {others[-1]}" if others else "begins anew"
            raise TrainingError(
                f"the checkpoint {path} is damaged: {error}",
                hint=f"Remove it; the same command then {then}.",
            ) from error

    def describe(self, family: str, config: Mapping[str, Any]) -> None:
        """Write down what is trained."""
        write_atomic(self.path / CONFIG_FILE, _json({"family": family, **config}))

    def publish(self, name: str, module: nn.Module) -> None:
        """Weights for use, below ``name``."""
        folder = self.path / name
        save_weights(folder / WEIGHTS_FILE, extract_weights(module))
        write_atomic(folder / CONFIG_FILE, (self.path / CONFIG_FILE).read_bytes())

    def best_loss(self) -> float:
        """Lowest validation loss so far."""
        path = self.path / "best.json"
        if not path.exists():
            return float("inf")
        try:
            return float(json.loads(path.read_bytes())["loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is damaged.", hint="Remove it.") from error

    def note_best(self, step: int, loss: float) -> None:
        """Write down the lowest validation loss."""
        write_atomic(self.path / "best.json", _json({"step": step, "loss": loss}))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
