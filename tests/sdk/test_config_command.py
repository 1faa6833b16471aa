from __future__ import annotations

import json
from pathlib import Path

import pytest

from moshi_fl.config import config_path
from moshi_sdk.cli import main


@pytest.fixture
def call(capsys):
    def call(*args):
        status = main(args)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def rows(call) -> dict[str, dict]:
    _, out, _ = call("config", "--json")
    return {row["setting"]: row for row in json.loads(out)["settings"]}


def test_settings_show_their_values_and_origins(call, monkeypatch):
    monkeypatch.setenv("MOSHI_FL_DEVICE", "cpu")
    assert call("config", "set", "threads", "2")[0] == 0
    status, out, err = call("config")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["setting", "value", "origin", "meaning"]
    assert ["device", "cpu", "MOSHI_FL_DEVICE"] in [line[:3] for line in lines]
    assert ["threads", "2", "config.toml,", "line", "1"] in [line[:5] for line in lines]
    assert rows(call)["keep_rounds"]["value"] == 2


def test_a_setting_that_the_hub_decides_has_no_value_of_its_own(call):
    assert rows(call)["precision"]["value"] is None
    call("config", "set", "precision", "fp32")
    assert rows(call)["precision"]["value"] == "fp32"


def test_a_setting_comes_and_goes(call):
    status, _, err = call("config", "set", "data", "code", "/notes")
    assert (status, err) == (0, "✓ Set data\n")
    assert rows(call)["data"]["value"] == [str(Path.cwd() / "code"), "/notes"]
    assert call("config", "unset", "data")[0] == 0
    assert rows(call)["data"]["origin"] == "default"
    assert json.loads(call("config", "unset", "data", "--json")[1]) == {"removed": False}


def test_data_with_weights_means_the_same_in_another_folder(call, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "a,b").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert call("config", "set", "data", "calls.jsonl:2, studio:0.5,/other:3", "a,b", "~/x")[0] == 0
    assert rows(call)["data"]["value"] == [
        f"{here}/calls.jsonl:2,{here}/studio:0.5,/other:3",
        f"{here}/a,b",
        str(Path("~/x").expanduser()),
    ]


def test_a_password_in_the_hub_address_is_not_shown(call):
    call("config", "set", "hub", "https://ada:secret@example.org/hub.git")
    for args in (("config",), ("config", "--json")):
        status, out, _ = call(*args)
        assert status == 0
        assert "example.org/hub.git" in out
        assert "secret" not in out


def test_setting_a_password_does_not_repeat_it(call):
    status, out, err = call("config", "set", "hub", "https://ada:secret@example.org/hub.git")
    assert status == 0
    assert "secret" not in out + err


def test_the_path_of_the_file_is_printed(call):
    assert call("config", "path") == (0, f"path  {config_path()}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("config", "set", "thread", "2"), "Hint: Did you mean threads?"),
        (("config", "set", "threads", "-5"), "No such option"),
        (("config", "set", "threads", "5000"), "threads must be a whole number from 0 to 1024"),
        (("config", "unset", "nothing-like-it"), "unknown setting 'nothing-like-it'"),
    ],
)
def test_mistakes_are_named(call, args, message):
    status, out, err = call(*args)
    assert status in (1, 2)
    assert out == ""
    assert message in err
    assert not config_path().exists()
