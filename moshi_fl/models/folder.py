"""A model in a folder: what the trainer leaves, what an import writes, what a hub can begin with.

``config.json`` has the family and its ``[model]`` table, ``model.safetensors`` the weights. There
may be a tokenizer, and a recipe: the tables ``training``, ``delta`` and ``evaluation`` for a hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.family import Preset, Task
from moshi_fl.weights import Weights, not_finite, open_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"
RECIPE_FILE = "recipe.json"
TABLES = ("training", "delta", "evaluation")
MAX_CONFIG_BYTES = 1 << 20
_SHOWN = 3


@dataclass(frozen=True)
class ModelFolder:
    """A folder's files, read but for the weights.

    Attributes:
        path: Where.
        family: Name of the model family.
        model: Its ``[model]`` table.
        tokenizer: The tokenizer file, where there is one.
        recipe: Tables for a hub, where there is a recipe.
    """

    path: Path
    family: str
    model: Mapping[str, Any]
    tokenizer: bytes | None
    recipe: Mapping[str, Mapping[str, Any]]

    @property
    def weights(self) -> Weights:
        """The weights, memory-mapped.

        Raises:
            ConfigError: There are none.
            CorruptRecord: They are damaged.
        """
        path = self.path / WEIGHTS_FILE
        if not path.is_file():
            raise ConfigError(f"{path} does not exist.", hint=_HINT)
        return open_weights(path)

    def over(self, preset: Preset) -> Preset:
        """A preset with this model, and with what the recipe says."""
        return Preset(
            model=self.model,
            training={**preset.training, **self.recipe.get("training", {})},
            delta={**preset.delta, **self.recipe.get("delta", {})},
            evaluation={**preset.evaluation, **self.recipe.get("evaluation", {})},
            tokenizer=preset.tokenizer if self.tokenizer is None else self.tokenizer,
            server_learning_rate=preset.server_learning_rate,
        )


def read_folder(path: Path) -> ModelFolder:
    """Read a folder's small files.

    Raises:
        ConfigError: It is no such folder.
    """
    model = read_table(path / CONFIG_FILE, hint=_HINT)
    family = model.pop("family", None)
    if not isinstance(family, str):
        raise ConfigError(f"{path / CONFIG_FILE} names no model family.", hint=_HINT)
    tokenizer, recipe = path / TOKENIZER_FILE, path / RECIPE_FILE
    tables = read_table(recipe, hint=_HINT) if recipe.exists() else {}
    if not all(key in TABLES and isinstance(table, dict) for key, table in tables.items()):
        raise ConfigError(f"{recipe} should have the tables {', '.join(TABLES)}.")
    return ModelFolder(
        path, family, model, tokenizer.read_bytes() if tokenizer.exists() else None, tables
    )


def require_weights_of(task: Task, weights: Weights) -> None:
    """Whether weights are those of a task's model; the model is not made for it.

    Raises:
        CorruptRecord: A tensor is missing, unknown, not finite, or of another shape or type.
    """
    from moshi_fl.models.common import abridged, shapes_of_model

    own = shapes_of_model(task.build)
    problems = [f"{name} is missing" for name in sorted(own.keys() - weights.keys())]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - own.keys())]
    for name in sorted(own.keys() & weights.keys()):
        found = weights[name]
        if found.shape != own[name] or found.dtype.str != "<f4":
            wanted = f"float32 {list(own[name])}"
            problems.append(f"{name} is {found.dtype} {list(found.shape)} instead of {wanted}")
    if not problems and (bad := not_finite(weights)):
        problems = [f"{bad} holds a value that is not finite"]
    if problems:
        raise CorruptRecord(
            f"the weights do not fit: {abridged(problems, _SHOWN)}.",
            hint="Leave out what makes it another model, such as --set, or give another folder.",
        )


_HINT = "Give the trainer's out_dir/best or out_dir/final, or what moshi-fl import-checkpoint made."


def read_table(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        ConfigError: It cannot be read, or it is none.
    """
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON.", hint=hint) from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds no table.", hint=hint)
    return table
