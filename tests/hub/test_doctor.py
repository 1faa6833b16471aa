from __future__ import annotations

import json
import shutil
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


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    path = tmp_path_factory.mktemp("fresh") / "hub.git"
    assert main(["init", str(path), "--preset", "tiny", "--quiet"]) == 0
    return path


@pytest.fixture
def hub(fresh, tmp_path):
    return shutil.copytree(fresh, tmp_path / "copy.git")


def git(hub, *command):
    subprocess.run(["git", "-C", str(hub), *command], check=True)


def test_a_hub_that_was_just_made_is_healthy(examine, hub):
    status, checks = examine(hub)
    assert status == 0
    assert {row["status"] for row in checks.values()} == {"ok"}
    assert checks["rounds"]["found"].startswith("round 0, made ")


def test_weights_that_are_gone_are_noticed_although_the_records_are_there(examine, hub):
    git(hub, "update-ref", "-d", "refs/moshi/keyframe/0")
    status, checks = examine(hub)
    assert status == 1
    assert checks["rounds"]["status"] == "ok"
    assert "refs/moshi/keyframe/0" in checks["weights"]["found"]


def test_weights_that_were_replaced_are_noticed(examine, hub):
    git(hub, "update-ref", "refs/moshi/keyframe/0", "refs/heads/main")
    assert examine(hub)[1]["weights"]["status"] == "fail"


def test_records_of_something_else_are_no_hub(examine, hub):
    git(hub, "update-ref", "refs/moshi/latest", "refs/heads/main")
    status, checks = examine(hub)
    assert status == 1
    assert checks["rounds"]["status"] == "fail"


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
    git(hub, "config", "core.bigFileThreshold", "10")
    git(hub, "config", "--unset", "gc.auto")
    git(hub, "config", "--unset", "receive.maxInputSize")
    settings = examine(hub)[1]["settings"]
    assert settings["status"] == "warn"
    assert settings["found"] == "differ: core.bigFileThreshold, gc.auto, receive.maxInputSize"
    for command in settings["next"].splitlines()[1:]:
        subprocess.run(command, shell=True, check=True)
    assert examine(hub)[1]["settings"]["status"] == "ok"


def test_a_path_without_a_repository_is_one_clear_failure(examine, tmp_path):
    status, checks = examine(tmp_path)
    assert status == 1
    assert list(checks) == ["ssh-keygen", "hub"]
    assert "there is no hub" in checks["hub"]["found"]
