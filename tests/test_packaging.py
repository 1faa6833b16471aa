"""What a user installs: the wheel, in an environment of its own, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("moshi_fl", "moshi_sdk", "moshi_hub")
SOURCES = {"moshi_fl": ROOT, "moshi_sdk": ROOT / "sdk", "moshi_hub": ROOT / "hub"}
IMPORT_ALL = """
import importlib, pkgutil, sys
checkout = sys.argv[1]
for name in sys.argv[2:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        package = importlib.import_module(module.name)
        assert not (package.__file__ or "").startswith(checkout), package.__file__
"""


def tracked(folder: Path) -> set[str]:
    """Files of the checkout under a folder, but not what Python makes of them."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        if SOURCES[package] == folder
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def names(built) -> set[str]:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The ``bin`` of a new environment: our wheel, and this one's libraries behind it."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    # A plain path: the other environment's own .pth files, which may name a checkout, stay unread.
    libraries = Path(np.__file__).parents[1]
    Path(site, "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin"


def run_outside(installed: Path, tmp_path: Path, *command: str) -> str:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [installed / command[0], *command[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("command", "listed"), [("moshi-fl", "contribute"), ("moshi-hub", "init")])
def test_the_commands_answer(installed, tmp_path, command, listed):
    assert listed in run_outside(installed, tmp_path, command, "--help")
    assert "0." in run_outside(installed, tmp_path, command, "--version")


def test_every_module_can_be_imported(installed, tmp_path):
    run_outside(installed, tmp_path, "python", "-c", IMPORT_ALL, str(ROOT), *PACKAGES)


def test_the_wheel_holds_every_file_of_the_packages(names):
    missing = set().union(*(tracked(folder) for folder in set(SOURCES.values()))) - names
    assert not missing
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"moshi_hub/template/hub.toml", "moshi_hub/template/README.md"} <= names


def test_the_wheel_holds_nothing_else(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    odd = ("test", "conftest")
    assert not [n for n in names if Path(n).name.startswith(odd) or n.endswith(".pyc")]


def test_the_source_archive_can_be_tested_and_built(built):
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md"}
    assert needed | {"tests/conftest.py", "hub/moshi_hub/template/hub.toml"} <= found
    assert not [name for name in found if ".venv" in name or "__pycache__" in name]
