"""A hub that begins with a model from a folder, or with a preset whose keys were changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moshi_fl.errors import ConfigError, CorruptRecord, MoshiError
from moshi_fl.models import get_family, get_preset
from moshi_fl.models.folder import read_folder
from moshi_fl.replica import Replica
from moshi_fl.store import HubRepo, create_hub
from moshi_fl.weights import save_weights, weights_digest, write_atomic
from moshi_hub.cli import main
from moshi_hub.create import Plan, create, left_as_found
from tests.support.hubs import files_below, git

SMALL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16}


class Interrupted(Exception):
    """Whatever ends the making of a hub."""


def write_model(folder: Path, **changes: Any) -> Path:
    """What the trainer leaves: a moc model of a size that takes no time."""
    preset = get_preset("moc", "tiny")
    model = {**preset.model, **SMALL}
    weights = get_family("moc").load(model, preset.tokenizer).initial_weights(7)
    save_weights(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({"family": "moc", **model, **changes}))
    return folder


def make(folder: Path, **how: Any) -> Any:
    plan = Plan(url=str(folder / "hub.git"), family="char", preset="tiny", name="test", **how)
    return create(plan, folder / "home")


def test_round_0_has_the_weights_of_the_folder(tmp_path: Path) -> None:
    source = write_model(tmp_path / "best")
    snapshot = make(tmp_path, source=source)
    found = read_folder(source)
    assert snapshot.record.weights == weights_digest(found.weights)
    assert snapshot.state.config.family == "moc"
    assert snapshot.state.config.model_table == found.model


def test_a_recipe_in_the_folder_is_the_hubs(tmp_path: Path) -> None:
    source = write_model(tmp_path / "best")
    recipe = {"training": {"steps": 77}, "delta": {"codec": "int8"}}
    (source / "recipe.json").write_text(json.dumps(recipe))
    config = make(tmp_path, source=source).state.config
    assert config.training.steps == 77
    assert config.training.batch_size == get_preset("moc", "tiny").training["batch_size"]
    assert config.delta.codec == "int8"


def test_keys_of_the_model_can_be_set(tmp_path: Path) -> None:
    plan = Plan(
        url=str(tmp_path / "hub.git"),
        family="char",
        preset="tiny",
        name="test",
        model={"n_layer": 1, "d_model": 32},
    )
    table = create(plan, tmp_path / "home").state.config.model_table
    assert table == {**get_preset("char", "tiny").model, "n_layer": 1, "d_model": 32}


@pytest.mark.parametrize("more", [("--family", "moc"), ("--seed", "7")])
def test_what_the_folder_has_settled_cannot_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, str]
) -> None:
    source = write_model(tmp_path / "best")
    words = ["init", str(tmp_path / "hub.git"), "--weights", str(source), *more]
    assert main(words) == 2
    assert f"{more[0]} and --weights exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "hub.git").exists()


def test_the_preset_gives_a_folder_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "home"))
    source, hub = write_model(tmp_path / "best"), str(tmp_path / "hub.git")
    assert main(["init", hub, "--weights", str(source), "--preset", "base"]) == 0
    config = Replica(hub, tmp_path / "reader").pull().state.config
    base = get_preset("moc", "base")
    assert config.model_table == read_folder(source).model
    assert config.training.learning_rate == base.training["learning_rate"]
    assert config.training.learning_rate != get_preset("moc", "tiny").training["learning_rate"]


def _cut(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-3])


def _half(source: Path) -> None:
    weights = {n: a.astype(np.float16) for n, a in read_folder(source).weights.items()}
    save_weights(source / "model.safetensors", weights)


def _spoil(source: Path) -> None:
    weights = {n: a.copy() for n, a in read_folder(source).weights.items()}
    weights[min(weights)].flat[0] = np.inf
    save_weights(source / "model.safetensors", weights)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda s: (s / "config.json").unlink(), "cannot read"),
        (lambda s: (s / "config.json").write_text("[]"), "holds no table"),
        (lambda s: (s / "config.json").write_text("{}"), "names no model family"),
        (lambda s: (s / "config.json").write_text('{"family": "x"}'), "no model family 'x'"),
        (lambda s: (s / "model.safetensors").unlink(), "does not exist"),
        (lambda s: (s / "recipe.json").write_text('{"hub": {}}'), "should have the tables"),
        (lambda s: write_model(s, d_model=32), "instead of float32"),
        (_cut, "bytes of data where the header describes"),
        (_half, "is float16"),
        (_spoil, "holds a value that is not finite"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, harm: Any, said: str) -> None:
    source = write_model(tmp_path / "best")
    harm(source)
    with pytest.raises(MoshiError, match=said) as caught:
        make(tmp_path, source=source)
    assert isinstance(caught.value, ConfigError | CorruptRecord)
    assert not (tmp_path / "hub.git").exists()


def others_below(folder: Path) -> set[str]:
    """Names below a folder, but for what the user's own folder holds."""
    return {name for name in files_below(folder) if not name.startswith("moshi-home")}


@pytest.mark.parametrize("found", ["nothing", "an empty folder", "a hub"])
def test_a_hub_that_cannot_be_made_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: str
) -> None:
    """Whether it is the held-out data that is of no use, or the model that is too large."""
    hub, empty = tmp_path / "hubs" / "our.git", tmp_path / "empty"
    empty.mkdir()
    if found == "an empty folder":
        hub.mkdir(parents=True)
    elif found == "a hub":
        assert main(["init", str(hub)]) == 0
    before = others_below(tmp_path)
    for wrong in (["--eval-data", str(empty)], ["--family", "speech", "--preset", "moshi-7b"]):
        assert main(["init", str(hub), *wrong]) == 1
        said = capsys.readouterr().err
        assert "already holds" in said or "No usable text" in said or "8.0 billion" in said
        assert others_below(tmp_path) == before
    if found != "a hub":
        assert main(["init", str(hub)]) == 0


def test_a_hub_that_cannot_be_made_leaves_what_came_meanwhile(tmp_path: Path) -> None:
    """Two are made at a time in a folder that is new: one fails when the other is there."""
    ours, theirs = tmp_path / "hubs" / "our.git", tmp_path / "hubs" / "their.git"

    def make_both() -> None:
        with left_as_found(HubRepo(tmp_path / "copy", str(ours)), ours):
            create_hub(ours)
            assert main(["init", str(theirs)]) == 0
            raise Interrupted

    with pytest.raises(Interrupted):
        make_both()
    assert not ours.exists()
    assert "refs/heads/main" in git(theirs, "for-each-ref")


def test_a_part_that_the_model_has_not_is_no_recipe(tmp_path: Path) -> None:
    source = write_model(tmp_path / "best")
    (source / "recipe.json").write_text('{"training": {"trains": "lora"}}')
    with pytest.raises(ConfigError, match="trained whole"):
        make(tmp_path, source=source)
    assert not (tmp_path / "hub.git").exists()


@pytest.mark.skipif(os.name == "nt", reason="there are no modes on Windows")
def test_what_is_for_others_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "page.html", b"x", shared=True)
        write_atomic(tmp_path / "secret", b"x")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("page.html", "secret")]
    assert modes == [0o640, 0o600]


def test_held_out_data_that_gives_too_few_sequences_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.py").write_text("def f(x):\n    return x\n" * 30)
    url = str(tmp_path / "hub.git")
    assert main(["init", url, "--eval-data", str(tmp_path / "held.py")]) == 0
    said = capsys.readouterr().err
    assert "sequences; the settings ask for" in said
    assert main(["pool", "new", "--hub", url, "--eval-data", str(tmp_path / "held.py")]) == 0
    assert "sequences; the settings ask for" in capsys.readouterr().err
