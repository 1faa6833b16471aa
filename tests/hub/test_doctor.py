from __future__ import annotations

import json
import subprocess

import pytest

from moshi_fl.store import create_hub
from moshi_hub.cli import main


@pytest.fixture
def examine(capsys):
    def examine(hub):
        status = main(["doctor", str(hub), "--json"])
        out, _ = capsys.readouterr()
        document = json.loads(out)
        return status, {row["check"]: row for row in document["checks"]}

    return examine


def test_a_new_repository_has_the_settings_but_no_rounds(examine, tmp_path):
    create_hub(tmp_path / "hub.git")
    status, checks = examine(tmp_path / "hub.git")
    assert status == 1
    assert checks["settings"]["status"] == "ok"
    assert checks["main"]["status"] == "fail"
    assert "moshi-hub init" in checks["main"]["next"]
    assert checks["rounds"]["status"] == "fail"


def test_settings_that_differ_are_named_with_the_commands_that_repair_them(examine, tmp_path):
    hub = tmp_path / "my hub.git"
    create_hub(hub)
    git = ["git", "-C", str(hub), "config"]
    subprocess.run([*git, "pack.window", "10"], check=True)
    subprocess.run([*git, "--unset", "gc.auto"], check=True)
    subprocess.run([*git, "--unset", "receive.maxInputSize"], check=True)
    settings = examine(hub)[1]["settings"]
    assert settings["status"] == "warn"
    assert settings["found"] == "differ: pack.window, gc.auto, receive.maxInputSize"
    for command in settings["next"].splitlines()[1:]:
        subprocess.run(command, shell=True, check=True)
    assert examine(hub)[1]["settings"]["status"] == "ok"


def test_a_path_without_a_repository_is_one_clear_failure(examine, tmp_path):
    status, checks = examine(tmp_path)
    assert status == 1
    assert list(checks) == ["hub"]
    assert "there is no hub" in checks["hub"]["found"]
