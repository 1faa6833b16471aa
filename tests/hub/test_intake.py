"""The list of what came first: what is open keeps its place, on this machine and on the next."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from moshi_fl.records import Contribution, Intake, dump
from moshi_fl.replica import Replica
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_hub.intake import INTAKE_FILE, LOCAL_FILE, first_seen, in_order, publish_intake
from moshi_hub.opened import look
from tests.attacks.test_signatures import stolen
from tests.support.simulator import HubSimulator

BY = Author("m", "m@example.org")


def branch(number: int, letter: str) -> str:
    return f"refs/heads/contribute/{number}/{letter * 32}"


def ids(letters: str) -> tuple[str, ...]:
    return tuple(letter * 32 for letter in letters)


def test_what_is_known_stays_in_front_of_what_is_new() -> None:
    branches = [branch(0, letter) for letter in "abcd"]
    assert first_seen([ids("d"), ids("b")], branches) == ids("dbac")
    assert first_seen([], branches) == ids("abcd")


def test_the_hubs_list_goes_first_and_nothing_is_listed_twice() -> None:
    branches = [branch(0, letter) for letter in "abc"]
    assert first_seen([ids("cb"), ids("bc")], branches) == ids("cba")


def test_what_is_no_longer_open_is_forgotten() -> None:
    assert first_seen([ids("xay")], [branch(1, "a")]) == ids("a")


def test_new_ones_have_the_order_of_their_branches() -> None:
    assert first_seen([], [branch(2, "a"), branch(1, "b")]) == ids("ba")


def test_a_branch_that_names_no_contribution_comes_last() -> None:
    odd = "refs/heads/contribute/0/short"
    order = in_order([odd, branch(0, "b"), branch(0, "a")], ids("ba"))
    assert order == (branch(0, "b"), branch(0, "a"), odd)


@pytest.fixture
def copied(hub: HubSimulator) -> tuple[Contribution, Contribution]:
    """A contribution that the maintainer has seen, and a copy with a lower id that came later."""
    original = hub.contribute("ann")
    hub.look()
    copy = stolen(original, "eve")
    hub.push_record(copy)
    return original, copy


def accepted(hub: HubSimulator, machine: str) -> list[str]:
    """What a merger's machine would take."""
    folder = hub.folder / f"work-of-{machine}"
    return [entry.id for entry in look(hub.person(machine), folder).accepted]


def test_the_list_lies_in_the_replica(hub: HubSimulator, copied) -> None:
    hub.look()
    stored = json.loads((hub.replica.folder / LOCAL_FILE).read_text())
    assert stored["seen"] == [record.id for record in copied]
    hub.merge()
    hub.look()
    assert json.loads((hub.replica.folder / LOCAL_FILE).read_text())["seen"] == []


def test_a_machine_that_never_looked_goes_by_the_hubs_list(hub: HubSimulator, copied) -> None:
    original, copy = copied
    assert accepted(hub, "stranger") == [copy.id]  # it has seen both at once
    found = hub.look()
    names, intake = found.snapshot.state.refs, found.arrivals.intake
    assert publish_intake(hub.replica, names, intake, BY)
    assert not publish_intake(hub.replica, names, intake, BY)
    assert accepted(hub, "newcomer") == [original.id]


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"\xff" * 100,
        b" " * (2 << 20),
        dump(Intake(hub="0" * 16, seen=())),
    ],
    ids=["empty", "noise", "huge", "of another hub"],
)
def test_a_list_that_cannot_be_used_holds_up_nobody_and_is_told(
    hub: HubSimulator, copied, content: bytes
) -> None:
    original, _ = copied
    replica = hub.person("eve")
    replica.pull()
    repo = replica.repo
    tree = repo.tree({INTAKE_FILE: repo.put(content)})
    commit = repo.commit(tree, message="x\n", author=BY, when=0)
    repo.push([RefUpdate("refs/moshi/intake", commit, ANY)])
    found = hub.look()
    assert "cannot be used" in found.arrivals.problem
    assert [entry.id for entry in found.accepted] == [original.id]
    publish_intake(hub.replica, found.snapshot.state.refs, found.arrivals.intake, BY)
    assert hub.look().arrivals.problem == ""


def test_the_command_records_it(hub: HubSimulator, copied, capsys, monkeypatch) -> None:
    from moshi_hub.cli import main

    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
    original, copy = copied
    assert main(["verify", "--record", "--hub", hub.url, "--json"]) == 3
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    assert [row["verdict"] for row in verdicts] == ["accepted", "replay"]
    replica = Replica(hub.url, hub.folder / "other")
    replica.pull()
    replica.repo.fetch({"refs/moshi/intake": "refs/test/intake"})
    data = replica.repo.read("refs/test/intake", INTAKE_FILE, limit=10**6)
    assert msgspec.json.decode(data, type=Intake).seen == (original.id, copy.id)
    assert accepted(hub, "newcomer") == [original.id]


@pytest.mark.usefixtures("copied")
def test_a_published_round_leaves_the_list_alone(hub: HubSimulator) -> None:
    found = hub.look()
    publish_intake(hub.replica, found.snapshot.state.refs, found.arrivals.intake, BY)
    outcome = hub.merge()
    assert outcome.leftovers == ""
    assert "refs/moshi/intake" in hub.refs()
    hub.contribute("bob", seed=3)
    assert Path(hub.replica.folder / LOCAL_FILE).exists()
    assert len(hub.look().accepted) == 1
