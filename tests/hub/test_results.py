"""What jobs hand to one another: one pinned head, files that nobody trusts, and the comment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

import moshi_hub.cli
from moshi_fl.errors import ConfigError, DataError, HubError, MoshiError
from moshi_fl.forge import BareGit
from moshi_fl.history import contribution_branch
from moshi_fl.records import Contribution, dump, load
from moshi_fl.replica import Replica
from moshi_fl.store import ANY, Author, HubRepo, RefUpdate
from moshi_fl.text import markdown
from moshi_fl.upstream import Origin
from moshi_hub.announce import tell_results
from moshi_hub.comment import one_line, results_text
from moshi_hub.heldout import import_pool, pool_path, retire_pool, store_pool
from moshi_hub.intake import publish_intake
from moshi_hub.keys import VARIABLES, KeyStore, private_pem
from moshi_hub.local import ANCHOR, ANCHOR_KEY, key_folder, local_signer
from moshi_hub.metadata import keys_of
from moshi_hub.pinned import pinned
from moshi_hub.publish import title
from moshi_hub.results import (
    MAX_RESULT_BYTES,
    Broken,
    GateResult,
    Measurement,
    Results,
    read_results,
    verdict_of,
)
from moshi_hub.sealed import POOL_KEY, open_sealed_pool, seal_pool
from moshi_hub.verify import REASONS
from tests.fuzz.examples import example
from tests.support.hubs import git
from tests.support.measurements import measurement
from tests.support.simulator import HubSimulator, random_delta, write_corpus

HOSTILE = "<script>x</script>|`a`\n# @carol #1 www.example.org ![x](y) **b**" * 20
HEAD = "a" * 40


@pytest.fixture
def entry(hub: HubSimulator) -> Contribution:
    return hub.contribute("ann")


def head_of(hub: HubSimulator, entry: Contribution) -> str:
    branch = contribution_branch(entry.round, entry.id)
    return hub.replica.repo.remote_refs(branch)[branch]


@pytest.fixture
def gate(hub: HubSimulator, entry: Contribution) -> GateResult:
    with pinned(hub.replica, head_of(hub, entry)) as one:
        return load(one.as_result(), GateResult, name="verdict.json")


# One head.


def test_a_commit_is_judged_by_itself(hub: HubSimulator, entry: Contribution) -> None:
    hub.contribute("bob", seed=2)
    with pinned(hub.replica, head_of(hub, entry)) as one:
        assert one.verdict.accepted
        assert [c.id for c in one.found.accepted] == [entry.id]


def code_at(hub: HubSimulator, entry: Contribution, who: str = "job") -> str:
    with pinned(hub.person(who), head_of(hub, entry)) as one:
        assert len(one.found.verdicts) == 1
        return one.verdict.findings[0].code if one.verdict.findings else ""


def on_record(hub: HubSimulator) -> None:
    found = hub.look()
    names = found.snapshot.state.refs
    publish_intake(hub.replica, names, found.arrivals.intake, Author("m", "m@x"))


def test_a_commit_is_judged_beside_what_its_key_has_open(hub: HubSimulator) -> None:
    """Every job says the same of the same hub, whatever its machine has seen; so does a merge."""
    first = hub.contribute("ann")
    on_record(hub)
    second, other = hub.contribute("ann", seed=2), hub.contribute("bob", seed=3)
    elsewhere = hub.contribute("ann", seed=4, round=0, base="0" * 64)
    for who in ("one", "two"):
        codes = [code_at(hub, entry, who) for entry in (first, second, other, elsewhere)]
        assert codes == ["", "one-per-round", "", "unknown-base"]
    assert {v.contribution.id for v in hub.look().verdicts if v.accepted} == {first.id, other.id}
    hub.replica.repo.push([RefUpdate(contribution_branch(0, first.id), None, ANY)])  # withdrawn
    assert code_at(hub, second) == ""


def test_of_two_of_a_key_at_the_same_time_every_job_refuses_the_same(hub: HubSimulator) -> None:
    both = sorted((hub.contribute("ann", seed=n) for n in (1, 2)), key=lambda entry: entry.id)
    for who in ("one", "two"):
        assert [code_at(hub, entry, who) for entry in both] == ["", "one-per-round"]
    assert hub.codes() == ["one-per-round"]
    (refused,) = (v for v in hub.look().verdicts if not v.accepted)
    assert f"has contributed {both[0].id} to round 0: withdraw one, or wait" in (
        refused.findings[0].message
    )


def test_what_a_key_has_not_signed_or_the_gate_refuses_takes_nobodys_place(
    hub: HubSimulator,
) -> None:
    """What is not Ann's, or no contribution at all, is there before what she sends."""
    base = hub.sync().load()
    large = hub.contribute("ann", delta=random_delta(base, 1, scale=1e4))
    false = msgspec.structs.replace(large, num_examples=2)
    hub.push_record(false, key="eve")
    hub.push_record(msgspec.structs.replace(false, num_examples=3), data=b"\x00{")
    noise = {"noise": os.urandom(3 << 20)}
    hub.push_record(msgspec.structs.replace(false, num_examples=4), key="ann", extra=noise)
    git(hub.path, "update-ref", "refs/heads/contribute/0/x", hub.main())
    git(hub.path, "update-ref", f"refs/heads/contribute/0/{'0' * 32}", hub.main())
    on_record(hub)
    honest = hub.contribute("ann", seed=2)
    assert code_at(hub, honest) == ""
    assert hub.verdicts()[honest.id].accepted


def test_another_branch_at_the_same_commit_does_not_take_its_verdict(
    hub: HubSimulator, entry: Contribution
) -> None:
    head, own = head_of(hub, entry), contribution_branch(entry.round, entry.id)
    for name in ("--", "zz"):
        git(hub.path, "update-ref", f"refs/heads/contribute/{name}", head)
    with pinned(hub.replica, head) as one:
        assert (one.verdict.branch, one.verdict.accepted) == (own, True)
        assert len(one.found.verdicts) == 3


def test_who_came_first_is_not_forgotten_by_a_look_at_one(hub: HubSimulator) -> None:
    first, second = hub.contribute("ann"), hub.contribute("bob", seed=2)
    order = [c.id for c in hub.look().intake]
    with pinned(hub.replica, head_of(hub, max(first, second, key=lambda c: c.id))):
        pass
    assert [c.id for c in hub.look().intake] == order


def test_what_is_in_a_round_is_not_judged_again(hub: HubSimulator, entry: Contribution) -> None:
    head, branch = head_of(hub, entry), contribution_branch(entry.round, entry.id)
    hub.merge()
    repo = hub.replica.repo
    repo.push([RefUpdate(branch, head, None)])  # the clean-up was killed before it
    with pytest.raises(HubError, match="is in a round already"), pinned(hub.replica, head):
        pass


def test_a_branch_that_moved_between_verify_and_merge_is_not_merged(
    hub: HubSimulator, entry: Contribution
) -> None:
    head, branch = head_of(hub, entry), contribution_branch(entry.round, entry.id)
    other = hub.contribute("bob", seed=9)
    git(hub.path, "update-ref", branch, head_of(hub, other))
    with pytest.raises(HubError, match="has the head"), pinned(hub.replica, head):
        pass
    verdicts = {v.branch: v for v in hub.look().verdicts}
    assert not verdicts[branch].accepted
    outcome = hub.merge()
    assert [m.id for m in outcome.proposal.record.contributions] == [other.id]


def run(*args: str | Path) -> int:
    return moshi_hub.cli.main([*map(str, args)])


def test_the_jobs_steps_on_a_bare_hub(
    hub: HubSimulator,
    entry: Contribution,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
    monkeypatch.setenv("MOSHI_FL_HUB", hub.url)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    held_out = write_corpus(tmp_path / "held-out", "for x in range(3):\n    print(x)\n")
    assert run("pool", "new", "--eval-data", held_out) == 0
    results = tmp_path / "results"
    results.mkdir()
    verdict = results / "verdict.json"
    assert run("verify", "--head", head_of(hub, entry), "--out", verdict) == 0
    for seat in ("1", "2"):
        out = results / f"measure-{seat}.json"
        assert run("attest", "--verdict", verdict, "--out", out, "--seat", seat) == 0
    assert run("comment", "--results", results) == 0
    out, err = capsys.readouterr()
    assert "There is no pull request: said here only" in err
    assert "| 2 of 2 |" in out
    assert f"moshi-hub attest {entry.id[:12]} --local --hub {hub.url}" in out
    assert summary.read_text().strip() in out
    assert run("attest", "--verdict", verdict, "--out", out_of(results), "--seat", "a b") == 2
    assert run("verify", "--head", "abc", "--out", verdict) == 2
    assert run("verify", "--head", HEAD, "--out", verdict) == 1


def out_of(folder: Path) -> Path:
    return folder / "measure-3.json"


def test_a_rejected_contribution_is_told_and_not_measured(
    hub: HubSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
    monkeypatch.setenv("MOSHI_FL_HUB", hub.url)
    entry = hub.contribute("ann", base="0" * 64)
    verdict, out = tmp_path / "verdict.json", tmp_path / "measure-1.json"
    assert run("verify", "--head", head_of(hub, entry), "--out", verdict) == 0
    assert run("attest", "--verdict", verdict, "--out", out) == 0
    assert not out.exists()
    assert "nothing to measure" in capsys.readouterr().err
    assert run("comment", "--results", tmp_path) == 0
    assert "**Rejected** by the gate.\n\n- `unknown-base`" in capsys.readouterr().out


def test_a_round_is_called_by_what_it_took(hub: HubSimulator) -> None:
    hub.contribute("ann")
    record = hub.merge().proposal.record
    assert title(record) == "Round 1: 1 contribution"
    origin = Origin(hub="f" * 16, round=4, weights=record.weights)
    record = msgspec.structs.replace(
        record, strategy=origin.strategy, contributions=(), archive=None, verdicts=None, update=None
    )
    assert title(record) == f"Round 1: round 4 of hub {origin.hub}"


# Hostile files.


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def act(table: dict[str, Any]) -> None:
        table[name] = value

    return act


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "another hub": change("hub", "f" * 16),
    "an unknown field": change("extra", 1),
    "an abbreviated head": change("head", "abc"),
    "a number that is none": change("pull_request", -1),
    "a code that nobody has": change("findings", [{"code": "because", "message": "x"}]),
    "a code with markup": change("findings", [{"code": "<b>", "message": "x"}]),
    "endless findings": change("findings", [{"code": "copy", "message": "x"}] * 11),
    "an endless message": change("findings", [{"code": "copy", "message": "x" * 501}]),
    "an endless branch": change("branch", "x" * 201),
    "a norm in words": change("norm", "large"),
    "no contribution": change("contribution", None),
    "half a contribution": change("contribution", {"format": 1}),
    "another format": change("format", 2),
    "another kind": change("kind", "order"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_verdict_is_refused_in_one_sentence(
    what: str, gate: GateResult, tmp_path: Path
) -> None:
    table = json.loads(dump(gate))
    WRONG[what](table)
    data = json.dumps(table, sort_keys=True, indent=2).encode() + b"\n"
    refuse(tmp_path, gate, data)


def refuse(folder: Path, gate: GateResult, data: bytes) -> str:
    (folder / "verdict.json").write_bytes(data)
    with pytest.raises(MoshiError) as caught:
        read_results(folder, gate.hub)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


RAW = {
    "nothing": b"",
    "no JSON": b"\xff\xfe{",
    "a list": b"[]",
    "an abyss": b"[" * 60_000,
    "a large number": b'{"kind": ' + b"9" * 60_000 + b"}",
    "too much": b" " * (MAX_RESULT_BYTES + 1),
}


@pytest.mark.parametrize("what", RAW)
def test_bytes_that_are_no_result(what: str, gate: GateResult, tmp_path: Path) -> None:
    refuse(tmp_path, gate, RAW[what])


def test_a_second_spelling_is_refused(gate: GateResult, tmp_path: Path) -> None:
    assert "canonical" in refuse(tmp_path, gate, dump(gate) + b" ")


def test_links_and_folders_are_not_followed(gate: GateResult, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(dump(gate))
    results = tmp_path / "results"
    results.mkdir()
    (results / "verdict.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MoshiError, match="no plain file"):
        read_results(results, gate.hub)
    (results / "verdict.json").unlink()
    (results / "verdict.json").mkdir()
    with pytest.raises(MoshiError, match="no plain file"):
        read_results(results, gate.hub)


def test_results_that_do_not_belong_together(gate: GateResult, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_bytes(dump(gate))
    path = tmp_path / "measure-1.json"
    for fields in ({"head": HEAD}, {"hub": "f" * 16}, {"contribution": "f" * 32}):
        path.write_bytes(dump(measurement(gate, "1", **fields)))
        with pytest.raises(MoshiError, match="measured something else"):
            read_results(tmp_path, gate.hub)
    path.write_bytes(dump(measurement(gate, "1")))
    (tmp_path / "measure-2.json").write_bytes(dump(measurement(gate, "1")))
    with pytest.raises(MoshiError, match="by the same evaluator"):
        read_results(tmp_path, gate.hub)
    (tmp_path / "measure-2.json").unlink()
    assert len(read_results(tmp_path, gate.hub).measured) == 1
    (tmp_path / "again.json").write_bytes(dump(gate))
    with pytest.raises(HubError, match="holds 2 verdicts"):
        read_results(tmp_path, gate.hub)
    for number in range(40):
        (tmp_path / f"{number}.json").write_bytes(dump(gate))
    with pytest.raises(MoshiError, match="more than 32"):
        read_results(tmp_path, gate.hub)


def test_whatever_is_well_formed_can_be_said(tmp_path: Path) -> None:
    """A record may be made up from end to end: a key that is none, no files, endless numbers."""
    random, said = Random(7), 0
    forge = BareGit(HubRepo(tmp_path / "git", "https://example.org/hub"))
    results = tmp_path / "results"
    results.mkdir()
    for _ in range(300):
        made = msgspec.convert(example(GateResult, random, full=True), GateResult)
        made = msgspec.structs.replace(
            made,
            pull_request=0,
            findings=random.choice([(), (Broken(code="copy", message=HOSTILE[:500]),)]),
            norm=random.choice([None, 1e308, -1e-308]),
            signed=random.random() < 0.3,
        )
        (results / "verdict.json").write_bytes(dump(made))
        try:
            found = read_results(results, made.hub)
            text, *_ = tell_results(forge, found, "ann", "https://example.org/hub")
        except MoshiError:  # one sentence, and nothing was said
            continue
        said += 1
        assert len(text) < 65_536
    assert 50 < said < 300


# What they say together.


def seen(gate: GateResult, *measured: Measurement) -> Results:
    return Results(gate, measured)


def test_evaluators_agree_when_every_number_is_the_same(gate: GateResult) -> None:
    one, two, three = (measurement(gate, seat) for seat in "123")
    odd = measurement(gate, "3", losses="d" * 64, gain=-100, outcome="reject")
    assert seen(gate).outcome == "accepted"
    assert seen(gate, one, two, three).outcome == "credit"
    found = seen(gate, odd, one, two)
    assert (len(found.agreeing), found.outcome) == (2, "credit")
    assert one_line(found) == "helps: 2 of 3 evaluators agree"
    assert seen(gate, one, odd).outcome == "disputed"
    worse = [measurement(gate, seat, gain=-5_000, outcome="reject") for seat in "12"]
    assert seen(gate, *worse).outcome == "rejected"
    assert one_line(seen(gate, *worse)).startswith("no-gain")


def test_the_verdict_comes_first_and_the_numbers_next(gate: GateResult) -> None:
    found = seen(gate, *(measurement(gate, seat) for seat in "123"))
    text = results_text(found, verdict_of(gate), "Signed by X.", "https://example.org/hub")
    lines = text.splitlines()
    assert lines[0] == "**Accepted**: it makes the model better."
    assert lines[2].startswith("| loss before | after | change (95 % interval) | attestations |")
    assert lines[4].startswith(
        "| 2.616412 | 2.610100 | -0.006312 (-0.008076 to -0.004548) | 3 of 3 |"
    )
    assert gate.trained == "all: 15 of 15 tensors"
    assert "| trained |" in lines[2]
    assert markdown(gate.trained) in lines[4]
    assert "Signed by X." in lines
    assert text.index("Signed by X.") < text.index("<details>")
    assert text.rstrip().endswith("</details>")


def test_a_dispute_shows_no_numbers_as_if_they_were_settled(gate: GateResult) -> None:
    odd = measurement(gate, "2", losses="d" * 64)
    text = results_text(seen(gate, measurement(gate, "1"), odd), verdict_of(gate))
    assert text.startswith("**Disputed**")
    assert "| attestations |" in text
    assert "loss before" not in text


def test_the_longest_comment_is_short_enough_and_says_nothing_by_itself(gate: GateResult) -> None:
    entry = msgspec.structs.replace(
        gate.contribution, contributor=HOSTILE[:200], software=HOSTILE[:200]
    )
    broken = tuple(Broken(code=code, message=HOSTILE[:500]) for code in list(REASONS)[:10])
    gate = msgspec.structs.replace(gate, contribution=entry, findings=broken, branch=HOSTILE[:200])
    gate = msgspec.structs.replace(gate, trained=HOSTILE[:200])
    measured = [
        measurement(gate, f"s{n}", system=HOSTILE[:200], software=HOSTILE[:200]) for n in range(31)
    ]
    text = results_text(
        seen(gate, *measured), verdict_of(gate), "x" * 300, "https://x/" + "y" * 900
    )
    assert len(text) < 65_536
    assert all(line.count("\n") == 0 for line in text.splitlines())
    for raw in (" <script>", "@carol", "#1", "**b**", "![", "www."):
        assert raw not in text.replace("**Rejected**", "")
    assert text.count("<details>") == text.count("</details>") == 1


# Secrets.


def test_a_sealed_pool_is_opened_with_its_key_only(
    hub: HubSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = hub.replica.look()
    held_out = write_corpus(tmp_path / "held-out")
    store_pool(hub.replica, state.config, state.tokenizer, [held_out])
    pool = pool_path(hub.replica).read_bytes()
    job = hub.person("job")
    assert open_sealed_pool(job) is False
    monkeypatch.setenv(POOL_KEY, "AAAA")
    with pytest.raises(ConfigError, match="holds no key"):
        open_sealed_pool(job)
    monkeypatch.setenv(POOL_KEY, "A" * 43 + "=")
    with pytest.raises(DataError, match="no sealed pool is on the hub"):
        open_sealed_pool(job)
    monkeypatch.delenv(POOL_KEY)
    key = seal_pool(hub.replica, state.refs, state.config.hub.id, "carol")
    everything = sealed_bytes(hub)
    assert pool not in everything
    monkeypatch.setenv(POOL_KEY, "A" * 43 + "=")
    with pytest.raises(DataError, match="is not the key"):
        open_sealed_pool(job)
    assert not pool_path(job).exists()
    monkeypatch.setenv(POOL_KEY, key)
    assert open_sealed_pool(job) is True
    assert pool_path(job).read_bytes() == pool
    assert seal_pool(hub.replica, state.refs, state.config.hub.id, "carol") == key
    assert sealed_bytes(hub) != everything  # the same key, another nonce


def test_a_retired_pool_is_measured_on_no_more(
    hub: HubSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, repo = hub.replica.look(), hub.replica.repo
    refs, name = state.refs, state.config.hub.id
    store_pool(hub.replica, state.config, state.tokenizer, [write_corpus(tmp_path / "held-out")])
    pool = pool_path(hub.replica).read_bytes()
    monkeypatch.setenv(POOL_KEY, seal_pool(hub.replica, refs, name, "carol"))
    retired = retire_pool(hub.replica, refs, "carol")
    assert set(repo.remote_refs(refs.sealed_pool, refs.pool(retired))) == {refs.pool(retired)}
    job = hub.person("job")
    with pytest.raises(DataError, match="no sealed pool is on the hub"):
        open_sealed_pool(job)
    pool_path(hub.replica).write_bytes(pool)  # somebody who has it still seals it again
    seal_pool(hub.replica, refs, name, "dave")
    with pytest.raises(DataError, match="was retired: it is public"):
        open_sealed_pool(job)
    assert not pool_path(job).exists()


def sealed_bytes(hub: HubSimulator) -> bytes:
    repo, ref = hub.replica.repo, hub.replica.look().refs.sealed_pool
    commit = repo.fetch({ref: "refs/test/sealed"})["refs/test/sealed"]
    return repo.read(commit, "held-out.pool.aes", limit=1 << 24)


def test_a_job_signs_with_keys_from_variables(
    hub: HubSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = hub.desk().root
    ours = KeyStore(hub.home, hub.replica.look().config.hub.id)
    stranger = KeyStore(tmp_path / "elsewhere", "f" * 16)
    for role, variable in VARIABLES.items():
        (key,) = keys_of(root, {"online": "timestamp"}.get(role, role))
        assert stranger.signer(key) is None
        (stored,) = [found for found in ours.stored() if found.role == role]
        monkeypatch.setenv(variable, private_pem(ours.load(stored)))
        assert stranger.where(key) == f"${variable}"
        assert stranger.signer(key).public_key.keyid == key.keyid


def test_a_job_evaluates_with_the_anchors_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = local_signer(tmp_path / "carol", "hub", ANCHOR)
    assert local_signer(tmp_path / "job", "hub", ANCHOR).public_key != anchor.public_key
    monkeypatch.setenv(ANCHOR_KEY, anchor.key_path.read_text())
    again = local_signer(tmp_path / "next-job", "hub", ANCHOR)
    assert again.public_key == anchor.public_key
    assert sys.platform == "win32" or again.key_path.stat().st_mode & 0o077 == 0
    assert local_signer(tmp_path / "next-job", "hub", "1").public_key != anchor.public_key


def test_an_anchors_key_that_was_not_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        ANCHOR_KEY, local_signer(tmp_path / "carol", "hub", ANCHOR).key_path.read_text()
    )
    path = key_folder(tmp_path / "job", "hub", ANCHOR) / "identity"

    def die(source: Path, _target: Path) -> Path:
        assert source.read_text().strip() == os.environ[ANCHOR_KEY].strip()
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", die)  # the moment before the key has its name
        with pytest.raises(KeyboardInterrupt):
            local_signer(tmp_path / "job", "hub", ANCHOR)
    assert not path.exists()
    local_signer(tmp_path / "job", "hub", ANCHOR)
    assert path.read_text().strip() == os.environ[ANCHOR_KEY].strip()


def test_an_anchors_key_in_a_variable_must_be_the_one_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (local_signer(tmp_path / who, "hub", ANCHOR) for who in ("carol", "job"))
    monkeypatch.setenv(ANCHOR_KEY, theirs.key_path.read_text().replace("\n", "\r\n"))
    assert local_signer(tmp_path / "job", "hub", ANCHOR).public_key == theirs.public_key
    with pytest.raises(ConfigError, match=f"{ANCHOR_KEY} is another key than the one in") as told:
        local_signer(tmp_path / "carol", "hub", ANCHOR)
    assert str(ours.key_path.parent) in told.value.hint
    assert local_signer(tmp_path / "carol", "hub", "1").public_key != ours.public_key


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_nobody_else_can_read_a_pool(
    hub: HubSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn, brought from the hub, exported and imported; under the widest umask."""
    before = os.umask(0)
    try:
        state = hub.replica.look()
        held_out = write_corpus(tmp_path / "held-out")
        store_pool(hub.replica, state.config, state.tokenizer, [held_out])
        key = seal_pool(hub.replica, state.refs, state.config.hub.id, "carol")
        monkeypatch.setenv(POOL_KEY, key)
        assert open_sealed_pool(hub.person("job"))
        monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
        assert run("pool", "export", str(tmp_path / "exported"), "--hub", hub.url) == 0
        (tmp_path / "sent").write_bytes((tmp_path / "exported").read_bytes())
        import_pool(hub.person("eve"), tmp_path / "sent")
    finally:
        os.umask(before)
    here = [pool_path(who) for who in (hub.replica, hub.person("job"), hub.person("eve"))]
    for path in (*here, tmp_path / "exported"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_timer_ends_well_when_there_is_nothing_to_do(
    hub: HubSimulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
    monkeypatch.setenv("MOSHI_FL_HUB", hub.url)
    assert run("merge") == 1
    assert run("merge", "--if-ready") == 0
    assert run("publish", "--if-merged", "--sign") == 0
    hub.contribute("ann")
    assert run("merge", "--if-ready") == 0
    proposed = branch_of(hub.replica)
    assert run("merge", "--if-ready") == 0
    assert branch_of(hub.replica) == proposed
    capsys.readouterr()
    assert run("publish", "--if-merged") == 0
    assert "nothing to publish" in capsys.readouterr().err
    bob = hub.contribute("bob", seed=2)
    assert run("merge", "--if-ready") == 0
    assert branch_of(hub.replica) != proposed
    assert run("merge", "--exclude", bob.id[:12]) == 0
    without = branch_of(hub.replica)
    assert run("merge", "--if-ready") == 0  # what a maintainer decided stays decided
    assert branch_of(hub.replica) == without
    eve = hub.contribute("eve", seed=3)
    assert run("merge", "--if-ready") == 0
    assert branch_of(hub.replica) != without
    taken = hub.replica.repo.entries(branch_of(hub.replica), "rounds/0001")
    assert any(eve.id in found.path for found in taken)
    assert not any(bob.id in found.path for found in taken)
    assert hub.replica.repo.remote_refs("refs/moshi/intake")
    (main,) = hub.replica.repo.remote_refs("refs/heads/main").values()
    hub.replica.repo.push([RefUpdate("refs/heads/main", branch_of(hub.replica), main)])
    assert run("merge", "--if-ready") == 0
    assert "waits to be published" in capsys.readouterr().err
    assert run("publish", "--if-merged", "--sign") == 0
    assert hub.sync().round == 1
    assert run("publish", "--if-merged", "--sign") == 0


def branch_of(replica: Replica) -> str:
    repo = replica.repo
    return repo.fetch({"refs/heads/round/1": "refs/test/round"})["refs/test/round"]
