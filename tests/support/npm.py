"""Files of packages from the npm registry, which ``npm pack`` brings as archives: nothing is run.

They are kept in ``.cache``. Where npm is absent the tests that need them are skipped, with a line
that says so; under CI they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache"


def tool(name: str) -> str:
    """A program's path; without it the test is skipped, and fails under CI."""
    found = shutil.which(name)
    if found is None:
        why = f"{name} is not installed: this check cannot be made"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return str(found)


def files_of(package: str, version: str, members: Sequence[str]) -> Path:
    """A folder with these members of a package's archive, under their names in it."""
    kept = CACHE / f"{package.strip('@').replace('/', '-')}-{version}"
    if all((kept / member).exists() for member in members):
        return kept
    npm = tool("npm")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, f"{package}@{version}"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            for member in members:
                found = tar.extractfile(member)
                assert found is not None
                fresh = Path(folder) / "fresh"
                fresh.write_bytes(found.read())
                (kept / member).parent.mkdir(parents=True, exist_ok=True)
                fresh.replace(kept / member)  # of two test runs at once, each has a whole file
    return kept
