"""What every test stands on: a home of its own, a Git without the user's settings, one thread."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.children import Nursery

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

ENVIRONMENT = {
    # Git as on a machine where nobody ever configured more than their name. Not by GIT_AUTHOR_NAME:
    # the product keeps such variables from its Git processes, with one more program for each.
    "GIT_CONFIG_GLOBAL": str(Path(__file__).with_name("fixtures") / "gitconfig"),
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    # Read by torch, when it is imported; also holds in the commands that tests start.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "NO_COLOR": "1",
}
# Here, and not when pytest is configured: a conftest below this one may import torch before that.
for name in [n for n in os.environ if n.startswith(("MOSHI_FL_", "GIT_"))]:
    del os.environ[name]
os.environ.update(ENVIRONMENT)

# Git and we ourselves wait for the disk after each write. Nobody pulls the plug of a test, so its
# files lie in memory where there is room and programs may lie; an own TMPDIR says otherwise.
MEMORY = Path("/dev/shm")
ROOM = 2 << 30  # bytes; some hundred MB are in use at a time


def _has_room(folder: Path) -> bool:
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return False
    return shutil.disk_usage(folder).free >= ROOM


if "TMPDIR" not in os.environ and _has_room(MEMORY):
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="moshi-fl-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["MOSHI_FL_HOME"] = os.environ["FLWR_HOME"] = folder.name


@pytest.fixture(autouse=True)
def moshi_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, fresh for each test."""
    home = tmp_path / "moshi-home"
    monkeypatch.setenv("MOSHI_FL_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def commands() -> Iterator[Nursery]:
    """Processes that have imported our commands, which takes seconds, and wait to be given one."""
    from tests.support.children import nursery

    with nursery() as opened:
        yield opened
