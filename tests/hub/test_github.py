"""A hub on GitHub: contributions from forks, verdicts as comments, rounds as pull requests.

Git is served over loopback HTTP; the API is held to GitHub's published description of it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moshi_hub.cli
import moshi_sdk.cli
from moshi_fl.records import dump, load
from moshi_hub.results import GateResult, Measurement
from tests.support.children import Child, Nursery
from tests.support.github import FakeGitHub, serving
from tests.support.http_hub import serve
from tests.support.hubs import git
from tests.support.measurements import measurement
from tests.support.openapi import description
from tests.support.simulator import write_corpus

CLIS = {"moshi-fl": moshi_sdk.cli.main, "moshi-hub": moshi_hub.cli.main}
PAIR = ("carol", "bob")
LITTLE = ("--steps", "2", "--batch-size", "2")
Call = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def github(tmp_path: Path) -> Iterator[FakeGitHub]:
    served = tmp_path / "served"
    hub = served / "hub" / "model.git"
    git(tmp_path, "init", "--quiet", "--bare", str(hub))
    git(hub, "config", "http.receivepack", "true")
    tokens = {"t-ann": "ann", "t-bob": "bob", "t-carol": "carol"}
    fake = FakeGitHub(description(), tokens=tokens, writers={"carol"})
    fake.commit_of = lambda owner, branch: git(
        served / owner / "model.git", "rev-parse", f"refs/heads/{branch}"
    ).strip()
    with serve(served) as base, serving(fake):
        fake.web = base
        yield fake
    assert fake.problems == []


@pytest.fixture
def call(
    github: FakeGitHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """Someone gives a command; its exit status, its document, and what it said."""
    monkeypatch.setenv("MOSHI_FL_GITHUB_API", github.url)
    monkeypatch.setenv("MOSHI_FL_HUB", f"{github.web}/hub/model.git")

    def run(who: str, command: str, *args: str | Path) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / who))
        monkeypatch.setenv("GH_TOKEN", f"t-{who}")
        capsys.readouterr()
        status = CLIS[command]([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return run


def fork(github: FakeGitHub, owner: str, tmp_path: Path) -> Path:
    path = tmp_path / "served" / owner / "model.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(tmp_path / "served/hub/model.git"), str(path))
    git(path, "config", "http.receivepack", "true")
    github.forks[f"{owner}/model"] = 0
    return path


def test_a_round_from_forks(github: FakeGitHub, call: Call, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data")
    status, _, said = call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")
    assert status == 0, said
    fork(github, "ann", tmp_path)
    status, sent, said = call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)
    assert status == 0, said
    assert sent["pull_request"] == github.pulls[0]["html_url"]
    assert "contribute" not in git(tmp_path / "served/hub/model.git", "for-each-ref")
    status, judged, said = call("carol", "moshi-hub", "verify", "--comment")
    assert status == 0, said
    (row,) = judged["verdicts"]
    assert (row["pull_request"], row["login"], row["verdict"]) == (1, "ann", "accepted")
    (comment,) = github.comments[1]
    assert comment["body"].startswith("<!-- moshi-fl:verdict -->\n**Accepted**")
    assert "not among the keys that ann publishes" in comment["body"]
    github.keys["ann"] = [Path(tmp_path, "ann", "identity.pub").read_text().strip()]
    assert call("carol", "moshi-hub", "verify", "--comment")[0] == 0
    (comment,) = github.comments[1]
    assert "a key that ann publishes here" in comment["body"]
    assert [label["name"] for label in github.pulls[0]["labels"]] == ["accepted"]
    status, merged, said = call("carol", "moshi-hub", "merge", "--publish")
    assert (status, merged["contributions"]) == (0, 1), said
    assert github.pulls[0]["state"] == "closed"
    assert "Included in round 1" in github.comments[1][-1]["body"]
    status, seen, said = call("ann", "moshi-fl", "status")
    assert [entry["state"] for entry in seen["contributions"]] == ["in round 1"], said


def test_a_second_one_of_a_key_from_its_fork_is_refused_and_can_take_the_firsts_place(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git", "--no-github")[0] == 0
    path = fork(github, "ann", tmp_path)
    words = ("moshi-fl", "contribute", "--data", write_corpus(tmp_path / "data"), *LITTLE)
    assert call("ann", *words)[0] == 0
    first = github.pulls[0]["head"]
    status, _, said = call("ann", *words, "--seed", "2")
    assert (status, "one per key and round" in said) == (3, True), said
    # She hides the first while she sends another, and puts it back: both have pull requests.
    branch = git(path, "for-each-ref", "--format=%(refname)", "refs/heads/contribute").strip()
    git(path, "update-ref", "-d", branch)
    assert call("ann", *words, "--seed", "2")[0] == 0
    git(path, "update-ref", branch, first["sha"])
    verdicts = []
    for pull in github.pulls:
        out = tmp_path / "verdict.json"
        head = ("--head", pull["head"]["sha"])
        assert call("carol", "moshi-hub", "verify", *head, "--out", out)[0] == 0
        gate = load(out.read_bytes(), GateResult, name="verdict.json")
        verdicts.append([finding.code for finding in gate.findings])
        out.unlink()
    assert sorted(verdicts) == [[], ["one-per-round"]]
    assert call("ann", *words, "--seed", "3", "--replace")[0] == 0
    left = git(path, "for-each-ref", "refs/heads/contribute").splitlines()
    assert len(left) == 1


def test_the_gate_takes_back_nothing_that_evaluators_said(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git", "--no-github")[0] == 0
    fork(github, "ann", tmp_path)
    data, results = write_corpus(tmp_path / "data"), tmp_path / "results"
    assert call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    (pull,), head = github.pulls, github.pulls[0]["head"]["sha"]
    label = {**github.description.sample("label"), "description": "", "name": "disputed"}
    pull["labels"] = [label]
    assert call("carol", "moshi-hub", "verify", "--comment")[0] == 0
    assert [entry["name"] for entry in pull["labels"]] == ["accepted"]
    results.mkdir()
    verdict = results / "verdict.json"
    assert call("carol", "moshi-hub", "verify", "--head", head, "--out", verdict)[0] == 0
    gate = load(verdict.read_bytes(), GateResult, name="verdict.json")
    for seat in ("1", "2"):
        (results / f"{seat}.json").write_bytes(dump(harmful(gate, seat)))
    assert call("carol", "moshi-hub", "comment", "--results", results)[0] == 0
    said = (github.comments[1][0]["body"], list(github.status_list[head]), list(pull["labels"]))
    assert "it makes the model worse" in said[0]
    assert call("carol", "moshi-hub", "verify", "--comment")[0] == 0
    assert (github.comments[1][0]["body"], github.status_list[head], pull["labels"]) == said


def harmful(gate: GateResult, seat: str) -> Measurement:
    """What an evaluator hands on of a contribution that makes the model worse."""
    return measurement(gate, seat, after=2_626_412, gain=-10_000, outcome="reject")


def test_a_round_is_proposed_as_a_pull_request(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    data = write_corpus(tmp_path / "data")
    assert call("carol", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    status, proposed, said = call("carol", "moshi-hub", "merge")
    assert status == 0, said
    pull = github.pulls[1]
    assert proposed["pull_request"] == pull["html_url"]
    assert pull["head"]["ref"] == "round/1"
    assert pull["body"].startswith("# Round 1")
    status, published, said = call("carol", "moshi-hub", "publish")
    assert (status, published["round"]) == (0, 1), said
    assert github.pulls[0]["state"] == "closed"


def test_a_maintainer_excludes_one_and_the_same_pull_request_says_so(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    held_out = write_corpus(tmp_path / "held-out", text="def f(x):\n    return x\n")
    url = f"{github.web}/hub/model.git"
    assert call("carol", "moshi-hub", "init", url, "--eval-data", held_out)[0] == 0
    data = write_corpus(tmp_path / "data")
    assert call("carol", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    fork(github, "bob", tmp_path)
    status, sent, said = call("bob", "moshi-fl", "contribute", "--data", data, *LITTLE)
    assert status == 0, said
    assert call("carol", "moshi-hub", "merge")[1]["contributions"] == 2
    pull = github.pulls[2]
    first, bob = pull["body"], sent["contribution"]
    for part in (
        "| credit |",
        "## Samples",
        "Drift by layer",
        "held-out loss **",
        "Evaluation of 2",
    ):
        assert part in first
    (command,) = re.findall(r"recompute it: `(.*)`", first)
    status, audited, said = call("bob", *shlex.split(command))
    assert (status, audited["audited"]) == (0, 1), said
    status, proposed, said = call("carol", "moshi-hub", "merge", "--exclude", bob[:10])
    assert (status, proposed["contributions"]) == (0, 1), said
    assert proposed["pull_request"] == pull["html_url"]
    assert len(github.pulls) == 3
    assert pull["title"] == "Round 1: 1 contribution"
    assert bob[:12] in pull["body"].split("## Left out by the maintainer")[1].split("##")[0]
    pull["state"] = "closed"
    status, proposed, said = call("carol", "moshi-hub", "merge", "--exclude", bob[:10])
    assert (status, proposed["pull_request"]) == (0, github.pulls[3]["html_url"]), said
    status, published, said = call("carol", "moshi-hub", "publish")
    assert (status, published["round"]) == (0, 1), said
    assert [entry["state"] for entry in github.pulls[:2]] == ["closed", "open"]


def test_a_region_contributes_by_a_pull_request_from_its_fork(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    """Ann runs a region on her own machine; the hub above is Carol's, on GitHub."""
    url, region = f"{github.web}/hub/model.git", tmp_path / "region.git"
    assert call("carol", "moshi-hub", "init", url)[0] == 0
    status, _, said = call("ann", "moshi-hub", "init", region, "--upstream", url)
    assert status == 0, said
    data, here = write_corpus(tmp_path / "data"), ("--hub", region)
    assert call("bob", "moshi-fl", "contribute", *here, "--data", data, *LITTLE)[0] == 0
    assert call("ann", "moshi-hub", "merge", *here, "--publish")[0] == 0
    fork(github, "ann", tmp_path)
    status, sent, said = call("ann", "moshi-hub", "upward", *here, "--upstream", url, "--publish")
    assert status == 0, said
    (pull,) = github.pulls
    assert (sent["pull_request"], sent["rounds"]) == (pull["html_url"], 1)
    assert pull["head"]["label"].startswith("ann:contribute/0/")
    assert "| contributor | region |" in pull["body"]
    status, merged, said = call("carol", "moshi-hub", "merge", "--publish")
    assert (status, merged["contributions"]) == (0, 1), said
    assert pull["state"] == "closed"
    status, taken, said = call("ann", "moshi-hub", "upward", *here, "--upstream", url, "--publish")
    assert (status, taken["taken"], taken["weights"]) == (0, 1, merged["weights"]), said


def test_a_fork_that_moved_after_it_was_shown_is_not_taken(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    path = fork(github, "ann", tmp_path)
    data = write_corpus(tmp_path / "data")
    assert call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    branch = github.pulls[0]["head"]["ref"]
    git(path, "update-ref", f"refs/heads/{branch}", git(path, "rev-parse", "main").strip())
    status, judged, said = call("carol", "moshi-hub", "verify")
    assert (status, judged["verdicts"]) == (0, []), said


def test_an_address_outside_of_the_forge_is_not_asked(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    fork(github, "ann", tmp_path)
    data = write_corpus(tmp_path / "data")
    assert call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.pulls[0]["head"]["repo"]["clone_url"] = str(tmp_path / "served" / "ann" / "model.git")
    assert call("carol", "moshi-hub", "verify")[1]["verdicts"] == []


def test_without_the_forge_the_hub_itself_is_still_judged(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    data = write_corpus(tmp_path / "data")
    assert call("carol", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.refusals += [(500, {}, {})] * 3 + [(401, {}, {"message": "Bad credentials"})]
    status, judged, said = call("carol", "moshi-hub", "verify")
    assert (status, len(judged["verdicts"])) == (0, 1)
    assert "pull requests from forks are not seen" in said


def test_the_api_is_away_while_a_round_is_published(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    fork(github, "ann", tmp_path)
    data = write_corpus(tmp_path / "data")
    assert call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.failing = "/"
    status, merged, said = call("carol", "moshi-hub", "merge", "--publish")
    assert (status, merged["round"]) == (0, 1), said
    assert "not all is cleaned up" in said
    assert github.pulls[0]["state"] == "open"
    github.failing = ""
    status, _, said = call("carol", "moshi-hub", "publish", "--if-merged")
    assert status == 0, said
    assert github.pulls[0]["state"] == "closed"
    (comment,) = github.comments[1]
    assert "Included in round 1" in comment["body"]
    status, _, said = call("carol", "moshi-hub", "publish", "--if-merged")
    assert status == 0, said
    assert github.comments[1] == [comment]


def test_what_a_round_took_is_not_called_a_replay(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    fork(github, "ann", tmp_path)
    data = write_corpus(tmp_path / "data")
    assert call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.failing = "/"
    assert call("carol", "moshi-hub", "merge", "--publish")[0] == 0
    github.failing = ""
    assert call("carol", "moshi-hub", "verify", "--comment")[0] == 3
    (comment,) = github.comments[1]
    assert "Included in round 1" in comment["body"]
    assert github.pulls[0]["labels"] == []


def test_a_round_that_could_not_be_shown_is_shown_by_the_next_timer(
    github: FakeGitHub, call: Call, tmp_path: Path
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    data = write_corpus(tmp_path / "data")
    assert call("carol", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.failing = "pulls"
    status, _, said = call("carol", "moshi-hub", "merge", "--if-ready")
    assert status == 0
    assert "proposed, but not shown" in said
    assert len(github.pulls) == 1
    hub = tmp_path / "served/hub/model.git"
    github.failing = ""
    theirs = fork(github, "bob", tmp_path)  # with the branch round/1, as it is on the hub
    github.open_pull("bob", {"head": "bob:round/1", "title": "mine", "base": "main"})
    assert git(theirs, "rev-parse", "round/1") == git(hub, "rev-parse", "round/1")
    for _ in range(2):
        status, _, said = call("carol", "moshi-hub", "merge", "--if-ready")
        assert (status, "is proposed already" in said) == (0, True)
    _, stranger, shown = github.pulls
    assert (stranger["title"], shown["head"]["label"]) == ("mine", "hub:round/1")
    assert shown["title"] == "Round 1: 1 contribution"
    assert shown["body"].startswith("# Round 1")


def test_two_maintainers_propose_at_once(
    github: FakeGitHub, call: Call, tmp_path: Path, commands: Nursery
) -> None:
    assert call("carol", "moshi-hub", "init", f"{github.web}/hub/model.git")[0] == 0
    data = write_corpus(tmp_path / "data")
    assert call("carol", "moshi-fl", "contribute", "--data", data, *LITTLE)[0] == 0
    github.writers.add("bob")
    shutil.copytree(tmp_path / "carol" / "keys", tmp_path / "bob" / "keys")
    hub = ("--hub", f"{github.web}/hub/model.git", "--json")

    def start(who: str, name: str) -> Child:
        env = {"MOSHI_FL_GITHUB_API": github.url, "GH_TOKEN": f"t-{who}"}
        return commands.start("moshi-hub", name, *hub, home=tmp_path / who, env=env)

    both = [start(who, "merge") for who in PAIR]
    ended = [child.wait() for child in both]
    assert sorted(end.status for end in ended) in ([0, 0], [0, 1]), [end.err for end in ended]
    for end in ended:
        assert "Traceback" not in end.err
        assert end.status == 0 or "another merge published first" in end.err
    served = tmp_path / "served/hub/model.git"
    shown = [pull for pull in github.pulls if pull["head"]["ref"] == "round/1"]
    assert len(shown) == 1
    both = [start(who, "publish") for who in PAIR]
    ended = [child.wait() for child in both]
    assert sorted(end.status for end in ended) == [0, 1], [end.err for end in ended]
    assert "Traceback" not in ended[0].err + ended[1].err
    assert git(served, "log", "--oneline", "main").count("\n") == 2
    status, seen, _ = call("carol", "moshi-fl", "status")
    assert (status, [entry["state"] for entry in seen["contributions"]]) == (0, ["in round 1"])
