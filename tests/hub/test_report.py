"""What a maintainer reads before publishing a round."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from moshi_fl.forge.github import MAX_BODY
from moshi_fl.history import round_folder
from moshi_fl.text import Size
from moshi_hub.cli import main as hub_command
from moshi_hub.drift import drifts, layer_of, whole
from moshi_hub.merge import Outcome
from moshi_hub.report import Findings, pull_request_body, round_report
from moshi_hub.samples import PROMPTS, Sample, Samples, fenced, sampler, shown
from moshi_hub.trained import trained_parts
from moshi_hub.verify import Finding, Verdict
from moshi_sdk.cli import main as sdk_command
from tests.support.simulator import HubSimulator, random_delta


def findings_of(outcome: Outcome, **more: object) -> Findings:
    proposal = replace(outcome.proposal, update_files=())  # the working folder is gone
    return Findings(proposal, outcome.open_round.verdicts, outcome.waiting, **more)


def report_on(hub: HubSimulator, number: int, branch: str = "main") -> str:
    repo = hub.replica.repo
    ref = f"refs/heads/{branch}"
    commit = repo.fetch({ref: "refs/test/report"})["refs/test/report"]
    return repo.read(commit, f"{round_folder(number)}/report.md", limit=1 << 20).decode()


# How far each layer moves.


def test_drift_is_the_change_of_each_layer_in_parts_of_its_norm(hub: HubSimulator) -> None:
    old = dict(hub.sync().load())
    delta = random_delta(old, 3)
    new = {name: old[name] + delta[name] for name in old}
    found = {entry.layer: entry for entry in drifts(old, new)}
    assert len({layer_of(name) for name in old}) == len(found) > 2
    for layer, entry in found.items():
        names = [name for name in old if layer_of(name) == layer]
        was = np.concatenate([old[name].ravel() for name in names]).astype(np.float64)
        now = np.concatenate([new[name].ravel() for name in names]).astype(np.float64)
        moved = np.linalg.norm(now - was)
        assert entry.parameters == was.size
        assert entry.change == pytest.approx(moved, rel=1e-9)
        assert entry.relative == pytest.approx(moved / np.linalg.norm(was), rel=1e-9)
    total = np.sqrt(sum(float(np.sum((new[n] - old[n]).astype(np.float64) ** 2)) for n in old))
    assert whole(list(found.values())).change == pytest.approx(total, rel=1e-6)


def test_rows_that_a_vocabulary_gained_are_no_drift() -> None:
    old = {"embedding.weight": np.ones((2, 3), np.float32)}
    new = {"embedding.weight": np.ones((5, 3), np.float32)}
    assert [entry.change for entry in drifts(old, new)] == [0.0]


def test_layers_come_in_the_order_of_their_numbers() -> None:
    weights = {f"blocks.{n}.w": np.ones(2, np.float32) for n in (10, 9, 0)}
    assert [e.layer for e in drifts(weights, weights)] == ["blocks.0", "blocks.9", "blocks.10"]


# What the model says.


def test_samples_are_the_same_whenever_they_are_taken(hub: HubSimulator) -> None:
    hub.rounds(1)
    snapshot = hub.sync()
    old = (hub.sync(number=0).load(), snapshot.state.tokenizer)
    new = (snapshot.load(), snapshot.state.tokenizer)
    take = sampler()
    first = take(snapshot.state.config, old, new)
    assert first == take(snapshot.state.config, old, new)
    assert [entry.prompt for entry in first.entries] == list(PROMPTS)
    assert all(entry.before and entry.after for entry in first.entries)
    assert any(entry.before != entry.after for entry in first.entries)


def test_samples_end_when_their_time_is_over(hub: HubSimulator) -> None:
    snapshot = hub.sync()
    model, ticks = (snapshot.load(), snapshot.state.tokenizer), itertools.count()
    take = sampler(["a", "b", "c"], patience=20.0, clock=lambda: float(next(ticks)))
    found = take(snapshot.state.config, model, model)
    assert [entry.prompt for entry in found.entries] == ["a"]
    assert found.entries[0].after.endswith("…")
    assert "did not come within 20 s" in found.note


def test_a_model_that_cannot_speak_after_the_round_is_said_to(hub: HubSimulator) -> None:
    snapshot = hub.sync()
    good = dict(snapshot.load())
    broken = good | {"fc_out.bias": np.full_like(good["fc_out.bias"], np.nan)}
    tokenizer = snapshot.state.tokenizer
    found = sampler()(snapshot.state.config, (good, tokenizer), (broken, tokenizer))
    assert found.entries == ()
    assert "after it: the model's logits are not finite" in shown(found, 9)


def test_nothing_that_a_model_says_leaves_its_block() -> None:
    hostile = "```\n# Accepted\n````\n\u202e<img src=x>\x1b[2J"
    text = fenced(hostile)
    fence = text.split("text\n")[0]
    assert fence == "`````"
    assert text.count(fence) == 2
    assert "\u202e" not in text
    assert "\x1b" not in text
    whole_text = shown(Samples((Sample("def ", hostile, "x"),)), 5)
    assert whole_text.count("`````") == 2


# The report as a whole.


def test_a_report_says_what_was_trained_whatever_is_installed_here(hub: HubSimulator) -> None:
    """It follows from the tensors in the delta; their part's name takes the model's family."""
    weights = hub.sync().load()
    some = {name: part for name, part in random_delta(weights, 3).items() if "blocks.0" in name}
    entry = hub.contribute("ann", delta=some)
    outcome = hub.merge(publish=False)
    said = f"all: {len(some)} of {len(weights)} tensors"
    assert outcome.open_round.trained == {entry.id: said}
    report = report_on(hub, 1, "round/1")
    assert f"| {said} |" in report
    assert "| blocks.0 |" in report
    assert "| blocks.1 |" not in report
    assert re.search(r"^\d other layers did not move\.$", report, re.MULTILINE)
    elsewhere = msgspec.structs.replace(hub.sync().state.config, model={"family": "unheard-of"})
    assert trained_parts(elsewhere, b"", {"x": tuple(some), "y": ()}) == {
        "x": f"{len(some)} tensors"
    }


def test_a_report_shows_what_goes_in_and_what_does_not(hub: HubSimulator) -> None:
    ann, bob = hub.contribute("ann"), hub.contribute("b|o<b>", seed=2)
    hub.contribute("eve", delta=random_delta(hub.sync().load(), 5, scale=1e6))
    outcome = hub.merge(publish=False, exclude=(bob.id,))
    text = report_on(hub, 1, "round/1")
    accepted, rest = text.split("## Left out by the maintainer")
    left, rest = rest.split("## Rejected")
    assert ann.id[:12] in accepted
    assert bob.id[:12] not in accepted
    assert "| unmeasured | - |" in accepted
    assert bob.id[:12] in left
    assert r"b|o\<b\>" in left or r"b\|o\<b\>" in left
    assert "over-norm" in rest
    assert "Drift by layer" in rest
    assert r"| blocks.0 |" in rest
    assert "<details>" in rest
    assert f"all deltas: {Size(ann.delta.bytes)}" in rest
    assert "`moshi-fl audit --round 1`" in rest  # a path is nobody else's business
    assert outcome.proposal.record.weights in rest


def test_a_report_with_a_thousand_strangers_fits_a_pull_request(hub: HubSimulator) -> None:
    hub.contribute("ann")
    outcome = hub.merge(publish=False)
    proposal, entry = outcome.proposal, outcome.proposal.contributions
    (merged,), (record,) = proposal.record.contributions, entry.values()
    ids = [f"{number:032x}" for number in range(1000)]
    many = replace(
        proposal,
        update_files=(),
        record=msgspec.structs.replace(
            proposal.record,
            contributions=tuple(msgspec.structs.replace(merged, id=name) for name in ids),
        ),
        contributions=dict.fromkeys(ids, msgspec.structs.replace(record, contributor="*" * 200)),
    )
    refused = [
        Verdict(f"refs/heads/contribute/0/{name}", None, (Finding("unreadable", "|" * 500),))
        for name in ids
    ]
    samples = Samples((Sample("x", "`" * 400, "`" * 400),) * 3)
    found = Findings(many, refused, [record] * 1000, [record] * 1000, samples=samples)
    assert len(round_report(found)) > MAX_BODY
    body = pull_request_body(found)
    assert 10_000 < len(body) <= MAX_BODY
    assert "`rounds/0001/report.md` on this branch is whole" in body
    (left,) = set(re.findall(r"… and (\d+) more\.", body))
    assert 800 < int(left) < 1000
    assert "moshi-fl audit --round 1" in body


def test_a_short_report_goes_into_the_pull_request_as_it_is(hub: HubSimulator) -> None:
    hub.contribute("ann")
    found = findings_of(hub.merge(publish=False), address="https://git.example.org/hub.git")
    assert pull_request_body(found) == round_report(found)
    assert "moshi-fl audit --hub https://git.example.org/hub.git --round 1" in round_report(found)


def test_the_command_of_a_proposed_report_recomputes_the_round(
    hub: HubSimulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it is published, and after."""
    hub.rounds(1)
    hub.contribute("ann")
    hub.merge(publish=False)
    (line,) = re.findall(r"recompute it: `(.*)`", report_on(hub, 2, "round/2"))
    command = [*shlex.split(line)[1:], "--hub", hub.url, "--json"]
    assert sdk_command(command) == 0
    assert '"proposed": true' in capsys.readouterr().out
    assert hub_command(["publish", "--hub", hub.url]) != 0  # another home has no keys
    hub.contribute("bob", seed=9)
    hub.merge()
    capsys.readouterr()
    assert sdk_command(command) == 0
    assert '"proposed": false' in capsys.readouterr().out


def test_a_round_that_nobody_proposed_cannot_be_audited(
    hub: HubSimulator, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("1", "5"):
        assert sdk_command(["audit", "--hub", hub.url, "--round", number]) == 1
        said = capsys.readouterr().err
        assert "the hub has only round 0" in said
        assert "Hint: moshi-fl audit " in said
        assert "Auditing" not in said, "no bar of what has not begun"


def test_the_command_shows_samples_of_prompts_that_are_asked_for(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSHI_FL_HOME", str(hub.home))
    hub.contribute("ann")
    assert hub_command(["merge", "--hub", hub.url, "--prompt", "print("]) == 0
    text = report_on(hub, 1, "round/1")
    assert "## Samples" in text
    assert text.count("print(") == 2
