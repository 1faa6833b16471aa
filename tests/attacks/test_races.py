"""Many at the same moment: nothing is lost, nothing is doubled, nobody sees half of anything."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moshi_fl.errors import Exit
from moshi_fl.records import Contribution
from moshi_fl.strategies import find_strategy
from moshi_fl.weights import weights_digest
from moshi_sdk.audit import Auditor
from moshi_sdk.sync import SyncManager
from tests.support.children import Nursery
from tests.support.http_hub import serve
from tests.support.keys import key_file
from tests.support.simulator import HubSimulator, write_corpus

CROWD = 20


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    return HubSimulator.copied(tmp_path)


def test_twenty_contributors_push_at_the_same_moment(hub: HubSimulator) -> None:
    with serve(hub.path.parent, user="all", password="x") as base:
        hub.url = base.replace("://", "://all:x@") + f"/{hub.path.name}"
        base_round = hub.sync("first")

        def push(number: int) -> Contribution:
            return hub.contribute(f"person{number}", seed=number, on=base_round)

        for number in range(CROWD):  # everyone has a store; what follows is the rush
            hub.person(f"person{number}").repo.prepare()
        with ThreadPoolExecutor(CROWD) as crowd:
            sent = {contribution.id for contribution in crowd.map(push, range(CROWD))}
        assert len(sent) == CROWD
        outcome = hub.merge()
        assert {merged.id for merged in outcome.built.record.contributions} == sent
        reader = hub.sync("reader")
        assert weights_digest(reader.load()) == outcome.built.record.weights
        (finding,) = Auditor(hub.person("reader"), find_strategy=find_strategy).audit(1, 1)
        assert finding.identical


def test_the_same_contribution_twice_at_once_is_one(
    hub: HubSimulator, commands: Nursery, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data")
    argv = ["moshi-fl", "contribute", "--hub", hub.url, "--data", data, "--json"]
    argv += ["--steps", "2", "--batch-size", "2", "--seed", "3", "--contributor", "ann"]
    both = [commands.start(*argv, home=tmp_path / "ann") for _ in range(2)]
    ended = sorted((child.wait() for child in both), key=lambda child: child.status)
    assert ended[0].status == 0, ended[0].err
    if ended[1].status:  # it came while the other was at work
        assert "another process is working on a contribution of this key" in ended[1].err
        assert "--resume" in ended[1].err
    assert len([ref for ref in hub.refs() if "/contribute/" in ref]) == 1
    after = commands.run(*argv, home=tmp_path / "ann")
    assert after.status == 0
    assert after.json["contribution"] == ended[0].json["contribution"]


def test_two_contributors_of_one_machine_train_side_by_side(
    hub: HubSimulator, commands: Nursery, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data")
    argv = ["moshi-fl", "contribute", "--hub", hub.url, "--data", data, "--json"]
    argv += ["--steps", "2", "--batch-size", "2", "--contributor", "ann"]
    keys = [key_file(name) for name in ("ann", "bob")]
    both = [commands.start(*argv, "--key", key, home=tmp_path / "ann") for key in keys]
    for child in both:
        ended = child.wait()
        assert ended.status == 0, ended.err
    assert len([ref for ref in hub.refs() if "/contribute/" in ref]) == 2


def test_two_of_one_key_at_once_are_one_or_the_gate_refuses_the_second(
    hub: HubSimulator, commands: Nursery, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data")
    argv = ["moshi-fl", "contribute", "--hub", hub.url, "--data", data, "--json"]
    argv += ["--steps", "2", "--batch-size", "2", "--key", key_file("ann")]
    both = [commands.start(*argv, "--seed", str(n), home=tmp_path / str(n)) for n in (1, 2)]
    ended = [child.wait() for child in both]
    assert 0 in {one.status for one in ended}
    for one in ended:
        assert one.status in {0, Exit.REJECTED}, one.err
        assert not one.status or "a hub takes one per key and round" in one.err
    assert len([verdict for verdict in hub.look().verdicts if verdict.accepted]) == 1


def test_two_that_replace_the_same_at_once_leave_one(
    hub: HubSimulator, commands: Nursery, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data")
    argv = ["moshi-fl", "contribute", "--hub", hub.url, "--data", data, "--json"]
    argv += ["--steps", "2", "--batch-size", "2", "--key", key_file("ann")]
    first = commands.run(*argv, home=tmp_path / "0").json["contribution"]
    how = ("--replace", "--seed")
    both = [commands.start(*argv, *how, str(n), home=tmp_path / str(n)) for n in (1, 2)]
    ended = [child.wait() for child in both]
    sent = {one.json["contribution"] for one in ended if one.status == 0}
    for one in ended:
        assert not one.status or "nothing was pushed" in one.err or "one per key" in one.err
    (accepted,) = (v.contribution.id for v in hub.look().verdicts if v.accepted)
    assert accepted in sent
    assert first not in [ref.rpartition("/")[2] for ref in hub.refs()]


def test_contributions_that_arrive_while_a_merge_publishes_wait_for_the_next(
    hub: HubSimulator, commands: Nursery
) -> None:
    sent = [hub.contribute("early", seed=0)]
    argv = ["moshi-hub", "merge", "--hub", hub.url, "--publish", "--json"]
    on = hub.sync("first")
    for number in range(1, 4):
        hub.person(f"late{number}").repo.prepare()
    merging = commands.start(*argv, home=hub.home)
    sent += [hub.contribute(f"late{number}", seed=number, on=on) for number in range(1, 4)]
    ended = merging.wait()
    assert ended.status == 0, ended.err
    commands.run(*argv, home=hub.home)  # takes the rest, if there is any
    rounds = hub.sync().state.manifest.rounds
    taken = [merged.id for record in rounds for merged in record.contributions]
    assert sorted(taken) == sorted(contribution.id for contribution in sent)


def test_a_reader_never_sees_half_a_model(hub: HubSimulator, commands: Nursery) -> None:
    hub.sync()
    seen = set()
    for number in range(4):
        hub.contribute("ann", seed=number)
        argv = ["moshi-hub", "merge", "--hub", hub.url, "--publish"]
        merging = commands.start(*argv, home=hub.home)
        syncing = commands.start("moshi-fl", "sync", "--hub", hub.url, home=hub.folder / "reader")
        for _ in range(3):
            snapshot = SyncManager(hub.url, home=hub.folder / "reader").pull()
            assert weights_digest(snapshot.load()) == snapshot.record.weights
            seen.add(snapshot.round)
        assert syncing.wait().status == 0
        assert merging.wait().status == 0
    assert hub.sync().round == 4
    assert len(seen) > 1
