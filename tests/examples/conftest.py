"""What the tests of the examples stand on: the folder of the examples, real code to train on."""

from __future__ import annotations

import json as a_package_with_source
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def examples() -> Path:
    return ROOT / "examples"


@pytest.fixture(scope="session")
def library() -> Path:
    """The standard library of this Python: source code that every machine has."""
    return Path(a_package_with_source.__file__).parents[1]
