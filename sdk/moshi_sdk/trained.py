"""A model that lies in a folder, as the trainer or an import left it, ready to generate."""

from __future__ import annotations

from pathlib import Path

from moshi_fl.errors import ConfigError
from moshi_fl.models.family import Task
from moshi_fl.models.folder import read_folder
from moshi_fl.subwords import Subwords, start_of
from moshi_fl.weights import Weights


def load_trained(folder: Path, tokenizer: Path | None = None) -> tuple[Task, Weights]:
    """Model and weights of a trainer's ``best`` or ``final`` folder, or of an import.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        tokenizer: The tokenizer file that it belongs to; where None, the folder's, or bytes.

    Raises:
        ConfigError: It is no such folder, or its model takes no text.
        CorruptRecord: A file is damaged.
    """
    from moshi_fl.models import get_family

    found = read_folder(folder)
    if found.tokenizer is None and found.family != "moc":
        raise ConfigError(
            f"{folder} holds a model of family {found.family!r} over tokens that stand for no "
            "text.",
            hint="Models of the family moc can; a char model generates from its hub.",
        )
    data = start_of(tokenizer) if tokenizer else found.tokenizer or Subwords.bytes_only().to_bytes()
    return get_family(found.family).load(found.model, data), found.weights
