"""What ``pyproject.toml`` declares is what the packages import: nothing missing, nothing idle."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "moshi_fl", ROOT / "sdk" / "moshi_sdk", ROOT / "hub" / "moshi_hub"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported() -> set[str]:
    """Top-level names of everything that the packages import, anywhere in a module."""
    names: set[str] = set()
    for path in (file for package in PACKAGES for file in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {package.name for package in PACKAGES}


def declared(requirements: list[str]) -> dict[str, Requirement]:
    parsed = map(Requirement, requirements)
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return dict(pairs)


def test_every_import_is_declared_and_every_declared_library_is_imported():
    distributions = metadata.packages_distributions()
    used = {canonicalize_name(distributions.get(name, [name])[0]) for name in imported()}
    extras = PROJECT["project"]["optional-dependencies"]
    optional = declared([name for extra in extras.values() for name in extra])
    assert used - set(optional) == set(declared(PROJECT["project"]["dependencies"]))


@pytest.mark.parametrize("group", ["runtime", "test", "oracle", "lint"])
def test_every_declared_library_is_pinned_to_a_version_in_its_range(group):
    groups = PROJECT["dependency-groups"] | {"runtime": PROJECT["project"]["dependencies"]}
    pins = pinned()
    for name, requirement in declared(groups[group]).items():
        assert requirement.specifier.contains(pins[name]), name
