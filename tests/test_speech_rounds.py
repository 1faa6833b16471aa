"""Whole rounds of the speech family through the real commands, on spoken dialogues."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moshi_hub.cli
import moshi_sdk.cli
from moshi_fl.history import DELTA_FILE
from moshi_fl.models.speech.dialogues import OTHER_FORMAT
from moshi_fl.models.speech.model import ADAPTERS
from moshi_fl.replica import Replica
from moshi_fl.weights import tensors_in
from tests.support.espeak import write_dialogues
from tests.support.hubs import git
from tests.support.releases import write_release

COMMANDS = {"moshi-fl": moshi_sdk.cli.main, "moshi-hub": moshi_hub.cli.main}
PEOPLE = ("ann", "bob", "eve")
Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of three people, each with voices of their own, and of a fourth held out."""
    folder = tmp_path_factory.mktemp("voices")
    for number, name in enumerate((*PEOPLE, "held-out")):
        write_dialogues(folder / name, client=number, count=3, length=4)
        (folder / name / "song.mp3").write_bytes(b"ID3")
    return folder


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Someone gives a command that works; its document, with what it said under ``said``."""

    def run(who: str, command: str, *args: object, status: int = 0) -> dict[str, Any]:
        monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / who))
        capsys.readouterr()
        found = COMMANDS[command]([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert found == status, out + err
        assert "Traceback" not in err
        return json.loads(out) | {"said": err}

    return run


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return tmp_path / "hub.git"


def sent_tensors(hub: Path, home: Path, made: dict[str, Any]) -> set[str]:
    """Names of the tensors that a contribution's delta carries, as they lie on the hub."""
    repo = Replica(str(hub), home).repo
    repo.prepare()
    (ref,) = (r for r in repo.remote_refs() if f"/delta/{made['round']}/" in r)
    commit = repo.fetch({ref: "refs/test/delta"})["refs/test/delta"]
    return set(tensors_in(repo.read(commit, DELTA_FILE, limit=1 << 24), name=DELTA_FILE))


class Impatient(io.StringIO):
    """A screen whose reader presses Ctrl-C when they read that sound is encoded."""

    def write(self, text: str) -> int:
        super().write(text)
        if "encoding sound" in text:
            raise KeyboardInterrupt
        return len(text)


def test_ctrl_c_while_sound_is_encoded_says_that_what_is_done_stays(
    hub: Path, voices: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("maintainer", "moshi-hub", "init", hub, "--family", "speech", "--preset", "tiny")
    first = voices / "ann" / "dialogue-0.wav"
    argv = ["contribute", "--hub", str(hub), "--dry-run", "--steps", "1", "--data"]
    call("ann", "moshi-fl", *argv, first)
    screen = Impatient()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        assert moshi_sdk.cli.main([*argv, str(voices / "ann")]) == 130
    assert "Hint: the same command again   (files that are encoded stay so" in screen.getvalue()
    assert "encoding" not in call("ann", "moshi-fl", *argv, first)["said"]
    assert "encoding" in call("ann", "moshi-fl", *argv, voices / "ann")["said"]


@pytest.mark.slow
def test_a_whole_round_of_the_tiny_preset(
    hub: Path, voices: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three people with voices of their own train the whole model; what is merged is better."""
    made = call(
        "maintainer", "moshi-hub", "init", hub, "--family", "speech", "--preset", "tiny",
        "--eval-data", voices / "held-out",
    )  # fmt: skip
    assert made["model"] == "speech/tiny"
    assert "recorded dialogues" in git(hub, "show", "main:README.md")
    for name in PEOPLE:
        own = voices / name  # of which one dialogue counts twice
        sent = call(
            name, "moshi-fl", "contribute", "--hub", hub,
            "--data", f"{own / 'dialogue-0.wav'}:2,{own}",
            "--steps", 30, "--contributor", name,
        )  # fmt: skip
        assert sent["loss_after"] < sent["loss_before"] - 1
        (left,) = sent["data"]["left_out"]
        assert left == {"reason": OTHER_FORMAT, "files": 1, "names": ["song.mp3"]}
        assert f"left out: 1 {OTHER_FORMAT} (song.mp3)" in sent["said"]
        assert sent["data"]["files"] == 3
        assert "text perplexity" in sent["said"]
        assert "codebook 1" in sent["said"]
        told = sent["figures"]
        assert {"text_perplexity", "word_perplexity", "codebook_1", "codebook_4"} <= set(told)
        assert told["codebook_1"]["after"] < told["codebook_1"]["before"]
    merged = call("maintainer", "moshi-hub", "merge", "--hub", hub, "--publish")
    assert merged["contributions"] == 3
    assert merged["held_out_after"] < merged["held_out_before"] - 0.5
    report = git(hub, "show", "main:rounds/0001/report.md")
    assert re.search(r"\| text perplexity \| [\d.,]+ \| [\d.,]+ \|\n", report)
    call("maintainer", "moshi-hub", "report", "--hub", hub, "--out", tmp_path / "site")
    page = (tmp_path / "site" / "rounds" / "0001.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in ("text perplexity", "codebook 4"))
    measured = call(
        "maintainer", "moshi-hub", "pool", "measure", "--hub", hub, "--plot",
        tmp_path / "codebooks.svg",
    )  # fmt: skip
    chart = (tmp_path / "codebooks.svg").read_text()
    assert "round 0: text perplexity" in chart
    assert "round 1: text perplexity" in chart
    assert measured["loss"] == pytest.approx(merged["held_out_after"], abs=1e-3)
    before = call("maintainer", "moshi-hub", "pool", "measure", "--hub", hub, "--round", 0)
    assert measured["text_perplexity"] < before["text_perplexity"]
    assert measured["codebook_1"] < before["codebook_1"]
    audited = call("ann", "moshi-fl", "audit", "--hub", hub, "--all")
    assert [row["result"] for row in audited["rounds"]] == ["identical"]
    synced = call("bob", "moshi-fl", "sync", "--hub", hub)
    assert synced["round"] == 1
    call("bob", "moshi-fl", "status", "--hub", hub)
    replica = Replica(str(hub), tmp_path / "maintainer")
    first, last = (replica.pull(number).load() for number in (0, 1))
    kept = [name for name in first if name.startswith("mimi.")]
    assert kept
    assert all(np.array_equal(first[name], last[name]) for name in kept)
    said = call("bob", "moshi-fl", "generate", "", "--hub", hub, "--max-tokens", 30, "--seed", 1)
    assert said["round"] == 1
    refused = call("bob", "moshi-fl", "generate", "Hello", "--hub", hub, status=moshi_fl_failed())
    assert "does not continue a text" in json.dumps(refused)
    capsys.readouterr()
    assert COMMANDS["moshi-fl"](["generate", "Hello", "--hub", str(hub)]) == moshi_fl_failed()
    assert capsys.readouterr().out == ""


def moshi_fl_failed() -> int:
    from moshi_fl.errors import ConfigError

    return int(ConfigError("").exit_code)


@pytest.mark.slow
def test_adapters_alone_and_ttt_layers_alone(
    hub: Path, voices: Path, tmp_path: Path, call: Call
) -> None:
    """Somebody trains the adapters, then the TTT layers; each time that is sent, and nothing else.

    Not even what error feedback has kept of the adapters: it waits until they train again.
    """
    created = call(
        "maintainer", "moshi-hub", "init", hub, "--family", "speech", "--set", "ttt_layers=1",
        "--eval-data", voices / "held-out",
    )  # fmt: skip
    for part, theirs in (
        ("lora", lambda tensor: tensor.endswith(ADAPTERS)),
        ("ttt", lambda tensor: ".self_attn.ttt." in tensor),
    ):
        sent = call(
            "ann", "moshi-fl", "contribute", "--hub", hub, "--data", voices / "ann",
            "--steps", 20, "--contributor", "ann", "--trains", part, "--lr", 0.01,
        )  # fmt: skip
        assert sent["loss_after"] < sent["loss_before"]
        carried = sent_tensors(hub, tmp_path / "reader", sent)
        assert len(carried) > 10
        assert all(map(theirs, carried))
        assert (sent["trained"], sent["tensors"]) == (part, len(carried))
        assert f"topk; {part}: {len(carried)} of 135 tensors" in sent["said"]
        merged = call("maintainer", "moshi-hub", "merge", "--hub", hub, "--publish")
        assert merged["contributions"] == 1
        (row,) = merged["table"]
        assert row["trained"] == f"{part}: {len(carried)} of 135 tensors"
        report = git(hub, "show", f"main:rounds/{merged['round']:04}/report.md")
        assert f"| {row['trained']} |" in report
        assert merged["update"] == sent["delta"] < created["keyframe"] / 20
        assert merged["keyframe"] is None
        assert merged["held_out_after"] < merged["held_out_before"]
    audited = call("ann", "moshi-fl", "audit", "--hub", hub, "--all")
    assert [row["result"] for row in audited["rounds"]] == ["identical"] * 2
    seen = call("ann", "moshi-fl", "status", "--hub", hub)
    assert [row["trained"] for row in seen["contributions"]] == ["ttt", "lora"]


def test_a_part_that_the_model_lacks_is_refused_before_anything_is_read(
    hub: Path, voices: Path, call: Call
) -> None:
    call("maintainer", "moshi-hub", "init", hub, "--family", "speech", "--set", "lora_rank=0")
    refused = call(
        "ann", "moshi-fl", "contribute", "--hub", hub, "--data", voices / "ann",
        "--trains", "lora", status=moshi_fl_failed(),
    )  # fmt: skip
    assert "no part 'lora' to train; parts: all" in json.dumps(refused)


@pytest.mark.slow
def test_imported_files_are_a_hubs_beginning(hub: Path, tmp_path: Path, call: Call) -> None:
    release = write_release(tmp_path / "release")
    made = call("maintainer", "moshi-fl", "import-checkpoint", release, "--out", tmp_path / "out")
    assert made["trains"] == "lora"
    created = call("maintainer", "moshi-hub", "init", hub, "--weights", tmp_path / "out")
    assert created["parameters"] == made["parameters"]
    snapshot = Replica(str(hub), tmp_path / "reader").pull()
    assert snapshot.state.config.training.trains == "lora"
    assert snapshot.state.config.family == "speech"


@pytest.mark.slow
def test_simulated_clients_train_a_part_of_a_model_with_other_settings(
    voices: Path, call: Call
) -> None:
    about = (
        "moshi-fl", "simulate", "--family", "speech", "--data", voices, "--clients", 2,
        "--rounds", 1, "--steps", 3, "--split", "directory",
    )  # fmt: skip
    bytes_up = {
        part: call("ann", *about, "--set", "ttt_layers=1", "--trains", part)["rounds"][1][
            "bytes_up"
        ]
        for part in ("all", "ttt")
    }
    assert bytes_up["ttt"] < bytes_up["all"] / 3
    refused = call("ann", *about, "--trains", "ttt", status=moshi_fl_failed())
    assert "no part 'ttt' to train; parts: all, lora" in json.dumps(refused)
    refused = call("ann", *about, "--set", "ttt_layer=1", status=moshi_fl_failed())
    assert "did you mean 'ttt_layers'?" in json.dumps(refused)


@pytest.mark.slow
def test_simulated_clients_share_dialogues_out(voices: Path, call: Call) -> None:
    found = call(
        "ann", "moshi-fl", "simulate", "--family", "speech", "--data", voices, "--clients", 2,
        "--rounds", 2, "--steps", 10, "--split", "directory",
    )  # fmt: skip
    losses = [row["held_out_loss"] for row in found["rounds"]]
    assert losses[-1] < losses[0] - 0.5
    assert {len(row["data"].split(", ")) for row in found["clients"]} <= {1, 2}
