"""The quickstarts run as they are, with fewer steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import moshi_fl
import moshi_hub
import moshi_sdk


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Both commands on PATH, as a plain user has them; code from this checkout."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("moshi-fl", "moshi_sdk"), ("moshi-hub", "moshi_hub")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        script.chmod(0o755)
    roots = dict.fromkeys(
        str(Path(package.__path__[0]).parent) for package in (moshi_fl, moshi_sdk, moshi_hub)
    )
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(roots)}


def labels_in_readme(readme: Path) -> set[str]:
    """What the lines of output in the README's tour begin with, up to the first gap or figure."""
    blocks = re.findall(r"^```\n\$ .*?\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    found = {re.match(r"(?:✓ )?[A-Za-z]+(?: [a-z]+)*\b", line) for line in lines}
    return {match[0] for match in found if match}


@pytest.mark.slow
def test_the_shell_quickstart_makes_a_round_and_audits_it(
    examples: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = examples / "quickstart.sh"
    environment |= {"STEPS": "2", "KEEP": str(tmp_path / "kept")}
    done = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 round(s) recomputed, bit for bit" in done.stderr
    assert re.search(r"1 +2 +identical", done.stdout)
    assert (tmp_path / "kept" / "hub.git" / "HEAD").is_file()
    shown = done.stdout + done.stderr
    for label in labels_in_readme(examples.parent / "README.md"):
        assert re.search(rf"^{re.escape(label)}\b", shown, re.MULTILINE), label


def test_the_python_quickstart_makes_a_round_and_audits_it(
    examples: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(examples / "quickstart.py"), "--steps", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "audit of round 1: identical" in done.stdout
    losses = re.search(r"round 1: held-out loss ([\d.]+) to ([\d.]+)", done.stdout)
    assert losses
    assert float(losses[2]) < float(losses[1])
