"""Checkpoints: weights and moments in one safetensors file, with the step and whose they are.

That is all there is to keep: batches, dropout and schedule follow from the step's number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moshi_fl.errors import CorruptRecord, TrainingError
from moshi_fl.models.common import weight_tensors
from moshi_fl.models.family import Corpus
from moshi_fl.train.engine import Engine
from moshi_fl.train.recipe import Recipe
from moshi_fl.weights import open_weights, read_header, save_weights, weights_digest

Identity = dict[str, Any]
"""What a checkpoint must agree on to be continued, by name."""

_MARK = "identity"
_MACHINE = ("device", "compile")  # may differ between the parts of a run


def recipe_identity(recipe: Recipe) -> Identity:
    """Everything of a recipe that decides the result, up to rounding."""
    fields = dataclasses.asdict(recipe.settled())
    return {key: value for key, value in fields.items() if key not in _MACHINE}


def identity(module: nn.Module, corpus: Corpus, recipe: Recipe) -> Identity:
    """What a checkpoint of a contribution must agree on: recipe, data and base weights."""
    tensors = weight_tensors(module)
    base = weights_digest({n: t.detach().cpu().float().numpy() for n, t in tensors.items()})
    return {**recipe_identity(recipe), "data": corpus.fingerprint, "base": base}


def checkpoint_state(path: Path) -> tuple[int, Identity]:
    """Steps done and identity (recipe, ``data``, ``base``) of a checkpoint.

    Raises:
        CorruptRecord: Not a checkpoint.
    """
    metadata = read_header(path).metadata
    try:
        return int(metadata["step"]), json.loads(metadata[_MARK])
    except (KeyError, ValueError) as error:
        raise CorruptRecord(f"{path.name}: not a training checkpoint ({error}).") from error


def save_checkpoint(path: Path, engine: Engine, step: int, identity: Identity) -> None:
    """Write a checkpoint; whatever happens, the file is the one before or this one.

    Raises:
        OSError: It cannot be written; names the file.
    """
    tensors = {key: value.detach().cpu().numpy() for key, value in engine.state().items()}
    metadata = {"step": str(step), _MARK: json.dumps(identity, sort_keys=True)}
    save_weights(path, tensors, metadata)


def restore_checkpoint(path: Path, engine: Engine, identity: Identity, *, hint: str = "") -> int:
    """Put a checkpoint into the engine; the step to continue at.

    Raises:
        CorruptRecord: It is damaged.
        TrainingError: It belongs to another run; says which settings differ and how.
    """
    step, theirs = checkpoint_state(path)
    _require_same(path, theirs, json.loads(json.dumps(identity)), hint)
    saved, wanted = open_weights(path), engine.state()
    shapes = {key: tuple(value.shape) for key, value in wanted.items()}
    if {key: value.shape for key, value in saved.items()} != shapes:
        raise CorruptRecord(f"{path.name}: its tensors are not those of this model.")
    for key, tensor in wanted.items():
        tensor.copy_(torch.tensor(saved[key]))
    return step


def _require_same(path: Path, theirs: Identity, ours: Identity, hint: str) -> None:
    theirs = _DEFAULTS | theirs  # it may be older than some settings
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        both = ", ".join(f"{key} ({_both(key, theirs, ours)})" for key in differing)
        raise TrainingError(
            f"the checkpoint {path} is of another run; these differ: {both}.",
            hint=hint or "Resume with the same settings, data and base, or remove that file.",
        )


def _both(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    there, here = (_short(table.get(key)) for table in (theirs, ours))
    return f"{there} there, {here} here"


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.default is not dataclasses.MISSING
}
