"""A hub that lies: whatever it offers, a reader keeps the model it verified and is told why.

Here the lies are signed: they come from somebody who has all of the hub's keys. What a host
without keys can try is told in ``test_signed_rounds.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moshi_fl.errors import CorruptRecord, HubError, MoshiError, UntrustedHub
from moshi_fl.history import MAIN, MANIFEST_FILE, HubState
from moshi_fl.records import Contribution, File, Manifest, Round, digest, dump, load
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_fl.strategies import find_strategy
from moshi_fl.weights import sha256_bytes, weights_digest
from moshi_hub.merge import Options, merge
from moshi_hub.publish import commit_latest, latest_files
from moshi_sdk.audit import Auditor, Finding
from moshi_sdk.sync import SyncManager
from tests.support.http_hub import Faults, serve
from tests.support.hubs import git, noise
from tests.support.simulator import HubSimulator, write_corpus

LIAR = Author("Liar", "liar@example.org")
replace = msgspec.structs.replace


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    """A hub at round 2, as the reader knows it."""
    hub = HubSimulator.copied(tmp_path)
    hub.rounds(2)
    hub.sync()
    return hub


def state_of(hub: HubSimulator) -> HubState:
    return hub.replica.look()


def offer_rounds(hub: HubSimulator, *rounds: Round, tokenizer: bytes | None = None) -> None:
    """A maintainer's keys sign a ``latest`` that names these rounds, in a well-formed manifest."""
    state = state_of(hub)
    manifest = Manifest(hub=rounds[0].hub, rounds=rounds)
    used = state.tokenizer if tokenizer is None else tokenizer
    files = latest_files(manifest, state.hubfile.encode(), used)
    hub.offer(hub.signed(files, number=manifest.newest.round))


def next_round(hub: HubSimulator, **fields: Any) -> Round:
    """A round that follows the newest by number and digest, with other fields as wanted."""
    newest = state_of(hub).newest
    return replace(newest, round=newest.round + 1, previous=digest(newest), **fields)


def refused(hub: HubSimulator, *words: str) -> None:
    """The reader refuses, is told what and what next, and keeps the verified model."""
    before = hub.person("reader").cached()
    assert before is not None
    with pytest.raises(UntrustedHub) as error:
        hub.sync()
    for word in words:
        assert word in str(error.value)
    assert error.value.hint, str(error.value)
    after = hub.sync(offline=True)
    assert (after.round, after.record) == (before.round, before.record)
    after.load()
    left = [path.name for path in after.path.parent.parent.rglob("*")]
    assert not [name for name in left if name.startswith(("work-", ".tmp-"))]


def test_an_older_latest_is_a_rewound_hub(hub: HubSimulator) -> None:
    offer_rounds(hub, *state_of(hub).manifest.rounds[:-1])
    refused(hub, "rewound", "offers round 1", "round 2 was already seen")


def test_another_round_of_the_same_number_is_a_rewritten_history(hub: HubSimulator) -> None:
    *earlier, newest = state_of(hub).manifest.rounds
    offer_rounds(hub, *earlier, replace(newest, software="moshi-fl 9.9"))
    refused(hub, "rewrote its history", "round 2")


def test_a_longer_history_without_the_known_round_is_refused(hub: HubSimulator) -> None:
    *earlier, newest = state_of(hub).manifest.rounds
    other = replace(newest, software="moshi-fl 9.9")
    later = replace(other, round=3, previous=digest(other))
    offer_rounds(hub, *earlier, other, later)
    refused(hub, "rewrote its history", "round 2")


def test_a_main_that_was_forced_back_is_refused_where_it_is_read(hub: HubSimulator) -> None:
    reader = hub.person("reader")
    seen = reader.fetch_main()
    old = hub.replica.repo.parents(hub.replica.fetch_main())[0]
    git(hub.path, "update-ref", MAIN, old)
    for _ in range(2):  # a refusal must not make the next one forget
        with pytest.raises(UntrustedHub, match="main was rewound"):
            reader.fetch_main()
    git(hub.path, "update-ref", MAIN, seen)
    assert reader.fetch_main() == seen


def test_a_manifest_of_another_hub_is_refused(hub: HubSimulator) -> None:
    rounds = [replace(record, hub="f" * 16) for record in state_of(hub).manifest.rounds]
    for number, record in enumerate(rounds[1:], 1):
        rounds[number] = replace(record, previous=digest(rounds[number - 1]))
    offer_rounds(hub, *rounds)
    refused(hub, "different hubs")


def test_a_new_hub_at_the_old_address_is_refused(hub: HubSimulator, tmp_path: Path) -> None:
    other = HubSimulator(tmp_path / "other")
    other.rounds(3)
    hub.path.rename(tmp_path / "was.git")
    other.path.rename(hub.path)
    refused(hub, "another hub than before")


def test_another_hub_with_the_same_keys_is_refused(hub: HubSimulator) -> None:
    state, other = state_of(hub), "f" * 16
    record = replace(state.manifest.rounds[0], hub=other)
    manifest = Manifest(hub=other, rounds=(record,))
    hubfile = state.hubfile.replace(state.config.hub.id, other).encode()
    files = latest_files(manifest, hubfile, state.tokenizer)
    hub.offer(hub.signed(files, number=0))
    refused(hub, "another hub than before", f"({other}, was {state.config.hub.id})")


def test_a_chain_with_a_gap_is_refused(hub: HubSimulator) -> None:
    first, *_, newest = state_of(hub).manifest.rounds
    offer_rounds(hub, first, newest)
    refused(hub, "chain of rounds is broken", "round 2 does not follow round 0")


def test_an_exchanged_tokenizer_is_refused(hub: HubSimulator) -> None:
    offer_rounds(hub, *state_of(hub).manifest.rounds, tokenizer=b"{}")
    refused(hub, "tokenizer", "round 2")


def test_a_round_that_does_not_give_its_weights_is_refused(hub: HubSimulator) -> None:
    lie = next_round(hub, weights="0" * 64)
    offer_rounds(hub, *state_of(hub).manifest.rounds, lie)
    refused(hub, "round 3 does not give the weights it promises")


def test_an_update_whose_bytes_were_exchanged_is_refused(hub: HubSimulator) -> None:
    hub.contribute("ann", seed=77)
    record = hub.merge().built.record
    place = record.update.location
    exchange(hub, place.ref, {place.files[0].name: noise(place.bytes)})
    refused(hub, place.ref, "its records promise")


def test_an_update_with_one_file_more_is_refused(hub: HubSimulator) -> None:
    files = {"a": b"1", "b": b"2"}
    commit = exchange(hub, "refs/moshi/update/3", files)
    said = File(name="a", bytes=1, sha256=sha256_bytes(b"1"))
    update = state_of(hub).newest.update
    place = replace(update.location, ref="refs/moshi/update/3", commit=commit, files=(said,))
    lie = next_round(hub, update=replace(update, location=place))
    offer_rounds(hub, *state_of(hub).manifest.rounds, lie)
    refused(hub, "refs/moshi/update/3: its files are not those that the records name")


def exchange(hub: HubSimulator, ref: str, files: dict[str, bytes]) -> str:
    """Point a ref to other files."""
    repo = hub.replica.repo
    tree = repo.tree({name: repo.put(data) for name, data in files.items()})
    commit = repo.commit(tree, message="x\n", author=LIAR, when=1)
    repo.push([RefUpdate(ref, commit, ANY)])
    return commit


def test_an_exchanged_keyframe_is_refused_by_a_newcomer(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    exchange(hub, "refs/moshi/keyframe/0", {"index.json": b"{}"})
    with pytest.raises(UntrustedHub, match=r"refs/moshi/keyframe/0 is .* its records promise"):
        hub.sync("newcomer")
    assert hub.person("newcomer").rounds_at_hand() == []


def test_enormous_promises_take_no_disk_and_no_memory(hub: HubSimulator) -> None:
    update = state_of(hub).newest.update
    huge = tuple(replace(file, bytes=10**15) for file in update.location.files)
    place = replace(update.location, files=huge)
    lie = next_round(hub, parameters=10**15, update=replace(update, location=place))
    offer_rounds(hub, *state_of(hub).manifest.rounds, lie)
    with pytest.raises(MoshiError, match=r"no room for round 3: it takes .* PB") as error:
        hub.sync()
    assert "MOSHI_FL_HOME" in error.value.hint
    hub.sync(offline=True).load()


def test_a_model_of_enormous_size_is_refused_by_a_newcomer(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    offer_rounds(hub, replace(state_of(hub).newest, parameters=10**9))
    with pytest.raises(UntrustedHub, match="round 0") as error:
        hub.sync("newcomer")
    assert "weights" in str(error.value)


@pytest.mark.parametrize("size", [(8 << 20) + 1, 40 << 20])
def test_a_manifest_beyond_the_limit_is_not_read(hub: HubSimulator, size: int) -> None:
    state = state_of(hub)
    parts = {"hub.toml": state.hubfile.encode(), "tokenizer.json": state.tokenizer}
    hub.offer({MANIFEST_FILE: noise(size), **parts})
    refused(hub, "bytes")


def test_a_latest_without_its_parts_is_refused(hub: HubSimulator) -> None:
    hub.offer({"readme": b"hello"})
    refused(hub, "manifest.json")


@pytest.mark.parametrize("mode", ["120000", "160000", "100755"])
def test_a_manifest_that_is_no_plain_file_is_refused(hub: HubSimulator, mode: str) -> None:
    blob = git(hub.path, "hash-object", "-w", "--stdin", stdin=b"/etc/passwd").strip()
    oid = hub.main() if mode == "160000" else blob
    kind = "commit" if mode == "160000" else "blob"
    tree = git(hub.path, "mktree", stdin=f"{mode} {kind} {oid}\t{MANIFEST_FILE}\n".encode()).strip()
    commit = git(hub.path, "commit-tree", tree, stdin=b"x").strip()
    git(hub.path, "update-ref", "refs/moshi/latest", commit)
    refused(hub, MANIFEST_FILE)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_file_name_that_leads_elsewhere_is_no_record(hub: HubSimulator, name: str) -> None:
    record = state_of(hub).newest
    place = record.update.location
    bad = replace(place, files=(replace(place.files[0], name=name),))
    data = dump(replace(record, update=replace(record.update, location=bad)))
    with pytest.raises(CorruptRecord, match=r"\$\.update\.location\.files\[0\]\.name"):
        load(data, Round, name="round.json")


# A merger that lies.


def audit(hub: HubSimulator, number: int) -> Finding:
    replica = hub.person("auditor")
    (finding,) = Auditor(replica, find_strategy=find_strategy).audit(number, number)
    return finding


def lying_strategy(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[..., Any]:
    """Looks strategies up like the real thing, but what they give is changed."""

    class Lying:
        def __init__(self, honest: Any) -> None:
            self._honest = honest

        def aggregate(self, updates: Any, shapes: Any) -> Any:
            return change(dict(self._honest.aggregate(updates, shapes))).items()

    return lambda name, options: Lying(find_strategy(name, options))


def publish_with(hub: HubSimulator, finder: Callable[..., Any]) -> Round:
    """Publish a round made by a lying merger; their own copy of the hub refuses it afterwards."""
    options = Options(publish=True)
    outcome = merge(hub.replica, options, evaluator=lambda _: None, find_strategy=finder)
    assert "does not give the weights it promises" in outcome.leftovers
    return hub.person("witness").look().newest


def test_a_model_that_is_not_the_mean_is_refused_and_the_audit_names_the_round(
    hub: HubSimulator,
) -> None:
    hub.contribute("ann", seed=5)
    double = lying_strategy(lambda step: {name: 2 * value for name, value in step.items()})
    assert publish_with(hub, double).round == 3
    refused(hub, "round 3 does not give the weights it promises")
    finding = audit(hub, 3)
    assert finding.identical is False
    assert finding.round == 3
    assert "published" in finding.problem


def test_a_false_keyframe_convinces_a_newcomer_but_not_the_audit(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    hub.edit_settings('keyframes = "auto"', 'keyframes = "every-round"')
    hub.contribute("ann", seed=5)
    hub.contribute("bob", seed=6)
    only_one = lying_strategy(lambda step: {name: value / 2 for name, value in step.items()})
    lied = publish_with(hub, only_one)
    newcomer = hub.sync("newcomer")
    assert weights_digest(newcomer.load()) == lied.weights
    finding = audit(hub, 1)
    assert finding.identical is False
    assert "recomputed" in finding.problem


def test_weights_of_contributions_that_break_the_rule_are_named(hub: HubSimulator) -> None:
    favoured = hub.contribute("ann", seed=5)
    hub.contribute("bob", seed=6)
    hub.merge(publish=False)
    proposal = proposed(hub)
    record = replace(
        proposal,
        contributions=tuple(
            replace(merged, weight=merged.weight * 9) if merged.id == favoured.id else merged
            for merged in proposal.contributions
        ),
    )
    publish_instead(hub, record)
    finding = audit(hub, 3)
    assert finding.identical is False
    assert favoured.id[:12] in finding.problem
    assert "by the rule" in finding.problem


def test_a_contribution_that_the_record_drops_is_missed(hub: HubSimulator) -> None:
    dropped = hub.contribute("ann", seed=5)
    hub.contribute("bob", seed=6)
    hub.merge(publish=False)
    proposal = proposed(hub)
    kept = tuple(merged for merged in proposal.contributions if merged.id != dropped.id)
    publish_instead(hub, replace(proposal, contributions=kept))
    assert audit(hub, 3).identical is False


def proposed(hub: HubSimulator) -> Round:
    """The record of the proposed round."""
    text = git(hub.path, "show", "refs/moshi/next/3:manifest.json").encode()
    return load(text, Manifest, name="manifest", limit=1 << 23).newest


def publish_instead(hub: HubSimulator, record: Round) -> None:
    """Publish the proposed round with another record."""
    state, repo = state_of(hub), hub.replica.repo
    branch = hub.refs()["refs/heads/round/3"]
    repo.fetch({"refs/heads/round/3": "refs/lie"}, max_bytes=1 << 24)
    tree = repo.tree({"rounds/0003/round.json": repo.put(dump(record))}, base=branch)
    main = repo.commit(tree, parents=(hub.main(),), message="x\n", author=LIAR, when=1)
    manifest = Manifest(hub=record.hub, rounds=(*state.manifest.rounds, record))
    files = latest_files(manifest, state.hubfile.encode(), state.tokenizer)
    latest = commit_latest(repo, manifest, hub.signed(files, number=record.round), LIAR)
    repo.push([RefUpdate(MAIN, main, ANY), RefUpdate("refs/moshi/latest", latest, ANY)])


def test_a_contribution_that_the_merger_rewrote_is_found(hub: HubSimulator) -> None:
    real = hub.contribute("ann", seed=5)
    hub.merge()
    repo, main = hub.replica.repo, hub.replica.fetch_main()
    path = f"rounds/0003/contributions/{real.id}.json"
    text = load(repo.read(main, path, limit=1 << 20), Contribution, name=path)
    forged = dump(replace(text, contributor="someone else"))
    tree = repo.tree({path: repo.put(forged)}, base=main)
    commit = repo.commit(tree, parents=(main,), message="x\n", author=LIAR, when=1)
    repo.push([RefUpdate(MAIN, commit, main)])
    finding = audit(hub, 3)
    assert finding.identical is False
    assert real.id in finding.problem


# A hub that is there, but makes no sense.


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def web(hub: HubSimulator, faults: Faults) -> Iterator[str]:
    with serve(hub.path.parent, faults=faults) as base:
        yield f"{base}/{hub.path.name}"


@pytest.mark.parametrize(
    "fault",
    [
        {"garbage": b"\x00\xff<html>It works!</html>" * 99},
        {"garbage": b""},
        {"status": 500},
        {"status": 302},
        {"cut_after": 40},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_hub_that_makes_no_sense_leaves_the_reader_with_the_last_model(
    web: str, faults: Faults, tmp_path: Path, fault: dict[str, Any]
) -> None:
    manager = SyncManager(web, home=tmp_path / "reader", timeout=20)
    online = manager.pull()
    for name, value in fault.items():
        setattr(faults, name, value)
    offline = manager.pull()
    assert (offline.online, offline.round) == (False, online.round)
    assert offline.checked == pytest.approx(online.checked, abs=2)
    assert offline.problem.startswith("fetch: ")
    with pytest.raises(HubError, match="On this machine there is no round of it either") as error:
        SyncManager(web, home=tmp_path / "stranger", timeout=20).pull()
    assert error.value.hint


def test_a_hub_that_hangs_is_given_up(web: str, faults: Faults, tmp_path: Path) -> None:
    manager = SyncManager(web, home=tmp_path / "reader", timeout=20)
    manager.pull()
    faults.stall = threading.Event()
    hasty = SyncManager(web, home=tmp_path / "reader", timeout=0.5)
    assert "did not finish within 0.5 s" in hasty.pull().problem
    faults.stall.set()
    assert manager.pull().online


def test_the_command_says_why_and_how_old(
    web: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from moshi_sdk.cli import main

    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "reader"))
    data = write_corpus(tmp_path / "data")
    assert main(["sync", "--hub", web]) == 0
    faults.status = 503
    capsys.readouterr()
    assert main(["sync", "--hub", web]) == 0
    said = capsys.readouterr().err
    assert "503" in said
    assert "last seen" in said
    assert " ago" in said
    argv = ["--hub", web, "--data", str(data), "--steps", "1", "--seed", "3"]
    assert main(["contribute", *argv]) == 1
    said = capsys.readouterr().err
    assert "from the cache" in said
    assert said.count("Error: ") == 1
    faults.status = None
    assert main(["contribute", "--hub", web, "--resume"]) == 0
