"""A family that the core has never heard of, installed like any package, goes through a round."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models import get_family, get_preset, known_families
from moshi_fl.models.family import Sampling
from moshi_hub.cli import main as hub_command
from moshi_sdk.cli import main as command


@pytest.fixture(scope="session")
def package(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed by pip into a folder of its own, without any network."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(examples / "new_family")], check=True, capture_output=True)
    return target


@pytest.fixture(autouse=True)
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(package))
    yield
    sys.modules.pop("bytes_mlp", None)


def run(capsys: pytest.CaptureFixture[str], main: object, *args: object) -> dict[str, object]:
    capsys.readouterr()
    status = main([str(arg) for arg in args] + ["--json"])  # type: ignore[operator]
    out = capsys.readouterr().out
    assert status == 0, out
    return json.loads(out)


def test_the_core_does_not_know_the_family_by_itself() -> None:
    core = Path(sys.modules["moshi_fl"].__path__[0])
    assert not [path for path in core.rglob("*.py") if re.search("bytes.mlp", path.read_text())]
    assert "bytes-mlp" in known_families()


def test_a_whole_round_with_it(
    tmp_path: Path,
    library: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = tmp_path / "hub.git"
    made = run(
        capsys, hub_command, "init", hub, "--family", "bytes-mlp", "--eval-data", library / "json"
    )
    assert made["model"] == "bytes-mlp/tiny"
    for package in ("http", "email"):
        with monkeypatch.context() as person:
            person.setenv("MOSHI_FL_HOME", str(tmp_path / package))
            run(
                capsys, command, "contribute", "--hub", hub, "--data", library / package,
                "--steps", 20, "--contributor", package,
            )  # fmt: skip
    merged = run(capsys, hub_command, "merge", "--hub", hub, "--publish")
    assert merged["contributions"] == 2
    assert merged["held_out_after"] < merged["held_out_before"] - 1
    audited = run(capsys, command, "audit", "--hub", hub, "--all")
    assert [row["result"] for row in audited["rounds"]] == ["identical"]
    made = run(capsys, command, "generate", "def ", "--hub", hub, "--max-tokens", 20, "--seed", 1)
    assert made["text"]


def test_a_batch_needs_no_batch_before_it(library: Path) -> None:
    task = get_family("bytes-mlp").load({}, get_preset("bytes-mlp", "tiny").tokenizer)
    corpus = task.read([library / "json"], seed=0)
    batches = task.batches(corpus, 4, seed=7)
    third = [next(batches) for _ in range(3)][2]
    assert torch.equal(third, next(task.batches(corpus, 4, seed=7, start=2)))


def test_a_pool_gives_one_loss_for_each_window(library: Path) -> None:
    task = get_family("bytes-mlp").load({}, get_preset("bytes-mlp", "tiny").tokenizer)
    corpus = task.read([library / "json"], seed=0)
    pool = task.pool(corpus, 5, seed=0, held_out=True)
    assert pool == task.pool(corpus, 5, seed=0, held_out=True)
    losses = task.evaluate(task.build(), pool, torch.device("cpu"))
    assert losses.shape == (5,)
    assert np.all(losses > 0)
    with pytest.raises(CorruptRecord):
        task.evaluate(task.build(), pool[:-1], torch.device("cpu"))


def test_equal_seeds_continue_a_text_equally_and_stop_where_told() -> None:
    task = get_family("bytes-mlp").load({}, get_preset("bytes-mlp", "tiny").tokenizer)
    module = task.build()
    text = "".join(task.generate(module, "é", Sampling(max_tokens=200, seed=3)))
    assert text == "".join(task.generate(module, "é", Sampling(max_tokens=200, seed=3)))
    stop = text[len(text) // 2]
    cut = "".join(task.generate(module, "é", Sampling(max_tokens=200, seed=3, stop=(stop,))))
    assert cut == text[: text.index(stop)]


def test_settings_and_tokenizer_are_checked() -> None:
    family = get_family("bytes-mlp")
    tokenizer = get_preset("bytes-mlp", "tiny").tokenizer
    with pytest.raises(ConfigError, match="unknown key 'contxt'"):
        family.load({"contxt": 3}, tokenizer)
    with pytest.raises(ConfigError, match="context = 0"):
        family.load({"context": 0}, tokenizer)
    with pytest.raises(CorruptRecord):
        family.load({}, b"{}")
