"""One whole round through the real commands, over each transport."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import moshi_hub.cli
import moshi_sdk.cli
from tests.support.http_hub import serve
from tests.support.hubs import git
from tests.support.simulator import write_corpus

USER, PASSWORD = "ann", "p@ss:w/rd"
CLIS = {"moshi-fl": moshi_sdk.cli.main, "moshi-hub": moshi_hub.cli.main}
LITTLE = ("--steps", "2", "--batch-size", "2")
Call = Callable[..., tuple[int, dict[str, Any], str]]


class Address:
    """How people reach the hub: to read, to push, and with a wrong password."""

    def __init__(self, folder: Path, base: str | None) -> None:
        self.path = folder / "served" / "hub.git"
        self.read = self.push = self.wrong = str(self.path)
        if base:
            host = base.removeprefix("http://")
            self.read = f"http://{host}/hub.git"
            self.push = f"http://{USER}:{quote(PASSWORD, safe='')}@{host}/hub.git"
            self.wrong = f"http://{USER}:guess@{host}/hub.git"


@pytest.fixture(params=["folder", "http"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    (tmp_path / "served").mkdir()
    with ExitStack() as stack:
        base = None
        if request.param == "http":
            base = stack.enter_context(serve(tmp_path / "served", user=USER, password=PASSWORD))
            git(tmp_path, "init", "--quiet", "--bare", str(tmp_path / "served" / "hub.git"))
            git(tmp_path / "served" / "hub.git", "config", "http.receivepack", "true")
        yield Address(tmp_path, base)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Someone gives a command; its exit status, its document, and what it said."""

    def run(who: str, command: str, *args: str | Path) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / who))
        capsys.readouterr()
        status = CLIS[command]([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return run


def test_a_whole_round(address: Address, call: Call, tmp_path: Path) -> None:
    data, other = write_corpus(tmp_path / "data"), write_corpus(tmp_path / "other", files=5)
    status, made, said = call("mona", "moshi-hub", "init", address.push, "--eval-data", other)
    assert status == 0, said
    sent = []
    for who, code in (("ann", data), ("bob", other)):
        call(who, "moshi-fl", "config", "set", "contributor", who)
        args = ("--hub", address.push, "--data", code, *LITTLE)
        status, contribution, said = call(who, "moshi-fl", "contribute", *args)
        assert status == 0, said
        sent.append(contribution["contribution"])
    status, _, said = call("mona", "moshi-hub", "verify", "--hub", address.read)
    assert status == 0, said
    status, merged, said = call("mona", "moshi-hub", "merge", "--hub", address.push, "--publish")
    assert (status, merged["round"], merged["contributions"]) == (0, 1, 2), said
    assert merged["held_out_after"] < merged["held_out_before"]
    status, synced, said = call("reader", "moshi-fl", "sync", "--hub", address.read)
    assert (status, synced["round"], synced["weights"]) == (0, 1, merged["weights"]), said
    status, audited, said = call("reader", "moshi-fl", "audit", "--hub", address.read, "--all")
    assert (status, audited["audited"]) == (0, 1), said
    status, seen, said = call("ann", "moshi-fl", "status", "--hub", address.push)
    assert status == 0, said
    assert [row["state"] for row in seen["contributions"]] == ["in round 1"]
    assert seen["contributions"][0]["contribution"] == sent[0][:12]
    assert PASSWORD not in said
    assert quote(PASSWORD, safe="") not in json.dumps([made, contribution, merged, seen])


@pytest.mark.parametrize("address", ["http"], indirect=True)
def test_a_wrong_password_loses_nothing(address: Address, call: Call, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data")
    assert call("mona", "moshi-hub", "init", address.push)[0] == 0
    args = ("--data", data, *LITTLE, "--seed", "4", "--contributor", "ann")
    status, failed, said = call("ann", "moshi-fl", "contribute", "--hub", address.wrong, *args)
    assert status == 1
    assert "refused access" in failed["error"]["message"]
    assert "Check your login" in failed["error"]["hint"]
    assert said.count("Error: ") == 1
    assert "guess" not in said
    status, _, said = call("ann", "moshi-fl", "contribute", "--hub", address.read, "--resume")
    assert status == 1
    assert "refused access" in said
    again = call("ann", "moshi-fl", "contribute", "--hub", address.push, "--resume")
    assert again[0] == 0, again[2]
    assert "Training" not in again[2]
    key = tmp_path / "ann" / "identity"
    twin = ("twin", "moshi-fl", "contribute", "--hub", address.push, "--key", key)
    early = call(*twin, *args)  # what it would make is not known before it has trained
    assert (early[0], "one per key and round" in early[2]) == (3, True)
    fresh = call(*twin, *args, "--dry-run")
    assert fresh[1]["contribution"] == again[1]["contribution"]
    assert "The hub already had it" in call(*twin, "--resume")[2]
