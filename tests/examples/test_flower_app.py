"""The ClientApp under a Flower server: in this process, and under ``flwr run`` where Ray is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

import moshi_fl
import moshi_sdk
from moshi_fl.flower import arrays_in, local_context, train_message
from moshi_fl.models import get_family, get_preset
from moshi_fl.train import Recipe
from moshi_fl.weights import open_weights
from moshi_sdk.client import app, job_config

PRESET = get_preset("char", "tiny")
SMALL = {**PRESET.model, "n_layer": 1, "d_model": 16, "d_ff": 16, "context": 32}


@pytest.fixture
def folder(examples: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(examples / "flower_app"))
    yield examples / "flower_app"
    sys.modules.pop("server_app", None)


@pytest.fixture
def settings(folder: Path) -> dict[str, object]:
    """The app's ``[tool.flwr.app]``."""
    flower = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]
    return dict(flower["app"])


def job(steps: int = 1) -> dict[str, object]:
    recipe = Recipe(steps=steps, batch_size=2)
    return job_config("char", SMALL, PRESET.tokenizer, recipe)


def test_the_app_names_apps_that_exist(settings: dict[str, object]) -> None:
    for name in ("serverapp", "clientapp"):
        module, _, attribute = settings["components"][name].partition(":")
        assert getattr(import_module(module), attribute)


def test_the_server_app_trains_on_all_nodes_and_saves(
    settings: dict[str, object], library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moshi_sdk.grid import LocalGrid

    server = import_module("server_app").app
    task = get_family("char").load(PRESET.model, PRESET.tokenizer)
    corpora = {
        node: task.read([library / name], seed=0) for node, name in ((1, "json"), (2, "wsgiref"))
    }
    out = tmp_path / "model.safetensors"
    run = {**settings["config"], "num-rounds": 2, "steps": 1, "batch-size": 2, "save": str(out)}
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=run)
    server(LocalGrid(corpora, job()), context)
    assert "round 2: loss" in capsys.readouterr().out
    before, after = task.initial_weights(0), open_weights(out)
    assert set(before) == set(after)
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_a_virtual_node_reads_its_own_share_of_the_paths(library: Path) -> None:
    task = get_family("char").load(SMALL, PRESET.tokenizer)
    message = train_message(task.initial_weights(0), job())
    paths = [str(library / "json"), str(library / "wsgiref")]

    def trained(**node: object) -> dict[str, object]:
        return arrays_in(app(message=message, context=local_context(**node)))

    second = trained(data=os.pathsep.join(paths), **{"partition-id": 1, "num-partitions": 2})
    alone = trained(data=paths[1])
    both = trained(data=os.pathsep.join(paths))
    assert all(np.array_equal(second[name], alone[name]) for name in alone)
    assert any(not np.array_equal(second[name], both[name]) for name in both)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: flwr[simulation]")
def test_flwr_run_simulates_the_app(folder: Path, library: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    config = f"steps=1 num-rounds=1 batch-size=2 save='{out}' "
    config += f"data='{library / 'json'}{os.pathsep}{library / 'wsgiref'}'"
    roots = [str(Path(package.__path__[0]).parent) for package in (moshi_fl, moshi_sdk)]
    roots += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(roots),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    argv = ["flwr", "run", str(folder), "local", "--stream", "--run-config", config]
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    finally:
        _end_superlink(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1: loss" in done.stdout
    assert open_weights(out)


def _end_superlink(home: Path) -> None:
    """``flwr run`` leaves a server behind; its log file in our folder tells it from all others."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    )
    for line in listing.stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        if "superlink" in command and str(home) in command:
            os.kill(int(pid), signal.SIGTERM)
