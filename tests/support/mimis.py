"""The small Mimi of the fixtures, with the weights and numbers of the reference."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.weights import open_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[3] / "shared/fixtures/speech"
"""Fixtures that may not be copied; absent from a clone that stands alone."""


@cache
def small_spec() -> dict[str, Any]:
    """Configuration and shapes under released names."""
    spec: dict[str, Any] = json.loads((FIXTURES / "mimi_small.json").read_text())
    return spec


@cache
def small_tensors() -> dict[str, Tensor]:
    """Inputs and outputs; weights under ``w.``."""
    arrays = open_weights(FIXTURES / "mimi_small.safetensors")
    return {name: torch.tensor(array) for name, array in arrays.items()}


def small_weights() -> dict[str, Tensor]:
    """Weights under released names."""
    return {name: small_tensors()["w." + name] for name in small_spec()["keys"]}


def small_mimi() -> Mimi:
    """A fresh one, for inference."""
    mimi = Mimi(MimiConfig.from_reference(small_spec()["cfg"]))
    load_checkpoint(mimi, small_weights())
    return mimi.eval()
