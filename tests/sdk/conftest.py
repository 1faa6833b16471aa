"""A hub for each test."""

from pathlib import Path

import pytest

from tests.support.simulator import HubSimulator


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    """A fresh hub with a tiny char model, at round 0."""
    return HubSimulator.copied(tmp_path)
