from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from moshi_fl.config import ensure_home
from moshi_fl.store import create_hub
from moshi_sdk.cli import main


@pytest.fixture
def examine(capsys):
    def examine(*args):
        status = main(["doctor", "--json", *args])
        out, _ = capsys.readouterr()
        document = json.loads(out)
        return status, {row["check"]: row for row in document["checks"]}

    return examine


def test_a_healthy_machine_without_a_hub(examine):
    status, checks = examine()
    assert status == 0
    assert set(checks) >= {"python", "git", "torch", "flower", "home", "disk", "clock", "hub"}
    assert {row["status"] for name, row in checks.items() if name != "hub"} <= {"ok", "warn"}
    assert checks["hub"]["status"] == "warn"
    assert checks["hub"]["next"] == "moshi-fl config set hub URL"


def test_who_signs_is_shown_and_a_machine_that_cannot_sign_is_told(examine, monkeypatch):
    _, checks = examine()
    assert checks["signing"]["found"].startswith("SHA256:")
    monkeypatch.setattr("moshi_fl.signing.SSH_KEYGEN", "ssh-keygen-that-is-not-there")
    status, checks = examine()
    assert status == 1
    assert checks["signing"]["status"] == "fail"
    assert "Install OpenSSH" in checks["signing"]["next"]


def test_a_missing_hub_fails_and_says_why(examine, tmp_path):
    status, checks = examine("--hub", str(tmp_path / "nothing"))
    assert status == 1
    assert checks["hub"]["status"] == "fail"
    assert "there is no hub" in checks["hub"]["found"]
    assert "config set hub URL" in checks["hub"]["next"]


def test_a_hub_without_rounds_is_told_from_a_missing_one(examine, tmp_path):
    create_hub(tmp_path / "hub.git")
    _, checks = examine("--hub", str(tmp_path / "hub.git"))
    assert checks["hub"]["found"] == "the hub answers, but has no main branch."
    assert "config set hub URL" in checks["hub"]["next"]


def test_a_home_that_others_can_read_is_a_warning(examine):
    ensure_home().chmod(0o755)
    status, checks = examine()
    assert status == 0
    assert checks["home"]["status"] == "warn"
    assert "chmod 700" in checks["home"]["next"]


def test_what_a_killed_process_left_is_found_when_it_is_old(examine):
    store = ensure_home() / "hubs" / "hub" / "git"
    store.mkdir(parents=True)
    for name in ("shallow.lock", ".tmp-123-pack-456.pack"):
        (store / name).write_text("")
        os.utime(store / name, (0, 0))
    (store / "young.lock").write_text("")
    _, checks = examine()
    assert checks["leftovers"]["found"] == "2 stale lock or temporary files"
    assert "shallow.lock" in checks["leftovers"]["next"]
    assert "young.lock" not in checks["leftovers"]["next"]


def test_a_broken_settings_file_is_one_failed_check(examine):
    (ensure_home() / "config.toml").write_text("threads = many\n")
    status, checks = examine()
    assert status == 1
    assert checks["home"]["status"] == "fail"
    assert "config.toml" in checks["home"]["found"]
    assert checks["git"]["status"] == "ok"


def test_a_machine_without_git_is_told_what_to_install(examine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, checks = examine()
    assert status == 1
    assert checks["git"]["status"] == "fail"
    assert "Install Git" in checks["git"]["next"]


def test_for_people_the_next_steps_follow_the_table():
    done = subprocess.run(
        [sys.executable, "-m", "moshi_sdk", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == ["check", "status", "found"]
    assert "Hint: hub: moshi-fl config set hub URL" in done.stderr
