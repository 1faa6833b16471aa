"""How long ``--help`` takes: against Python itself and against Flower's command."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Row

RUNS = 15
ROOT = Path(__file__).parents[1]


def wall(*argv: str) -> float:
    """Median wall seconds of a command, after one run that warms the file cache."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "sdk", "hub")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed command is compiled once
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *argv], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def run() -> list[Row]:
    floor = wall("-c", "pass")
    flower = wall("-c", "from flwr.cli.app import app; app()", "--help")
    rows = []
    for command, module in (("moshi-fl", "moshi_sdk.cli"), ("moshi-hub", "moshi_hub.cli")):
        ours = wall("-m", module, "--help")
        rows.append(
            Row(
                what=f"{command} --help",
                ours=f"{ours:.3f} s",
                rival=f"flwr --help {flower:.3f} s",
                ratio=flower / ours,
                target="<= 0.15 s",
                floor=f"python -c pass {floor:.3f} s",
                note=f"median of {RUNS}",
            )
        )
    return rows
