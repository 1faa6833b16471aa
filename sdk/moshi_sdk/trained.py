"""A model that ``python -m moshi_fl.train`` left in a folder, ready to generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moshi_fl.errors import ConfigError
from moshi_fl.models.family import Task
from moshi_fl.subwords import Subwords, start_of
from moshi_fl.weights import Weights, open_weights

MAX_CONFIG_BYTES = 1 << 20


def load_trained(folder: Path, tokenizer: Path | None) -> tuple[Task, Weights]:
    """Model and weights of a trainer's ``best`` or ``final`` folder.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        tokenizer: The ``tokenizer.json`` that its shards were made with; bytes when None.

    Raises:
        ConfigError: It is no such folder, or its model takes no text.
        CorruptRecord: A file is damaged.
    """
    from moshi_fl.models import get_family

    config = _read_config(folder)
    family = config.pop("family", None)
    if family != "moc":
        raise ConfigError(
            f"{folder} holds a model of family {family!r} over tokens that stand for no text.",
            hint="Models of the family moc can; a char model generates from its hub.",
        )
    data = start_of(tokenizer) if tokenizer else Subwords.bytes_only().to_bytes()
    return get_family(family).load(config, data), open_weights(folder / "model.safetensors")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    hint = "Give the trainer's out_dir/best or out_dir/final."
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON.", hint=hint) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no table.", hint=hint)
    return config
