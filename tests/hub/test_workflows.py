"""The workflows of a hub, step by step on this machine, with what strangers send.

The forge is held to GitHub's description and to the rights that each job has; Git is served over
loopback HTTP and takes pushes of jobs that may write only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moshi_hub.cli
import moshi_sdk.cli
from moshi_fl.history import EVALUATORS_FILE
from tests.support.actions import JOB, WRITER, Actions, Run
from tests.support.github import FakeGitHub, serving
from tests.support.http_hub import serve
from tests.support.hubs import git
from tests.support.openapi import description
from tests.support.simulator import write_corpus

pytestmark = pytest.mark.slow

CLIS = {"moshi-fl": moshi_sdk.cli.main, "moshi-hub": moshi_hub.cli.main}
LITTLE = ("--steps", "2", "--batch-size", "2")
NIGHT = {"schedule": "17 3 * * *"}
MONTH = {"schedule": "41 4 1 * *"}
RUN_ME = "touch${IFS}PWNED"
BY_HAND = [["moshi-hub", "verify"], ["moshi-hub", "merge"], ["moshi-hub", "publish"]]
NAMES = [
    f"contribute/0/$({RUN_ME})",
    f"contribute/0/`{RUN_ME}`",
    f"contribute/0/';{RUN_ME};'\";{RUN_ME};\"&&{RUN_ME}|{RUN_ME}",
    "contribute/0/<img/src=x/onerror=alert(1)>|__@carol__|#1",
    "contribute/" + "x" * 189,
]
TITLE = (
    f"$({RUN_ME}) `{RUN_ME}`; {RUN_ME}\n\n# Merged by @carol\n"
    "<script>alert(1)</script> ${{ github.token }} | a | b |\n<!-- moshi-fl:verdict -->"
)


@dataclass
class World:
    """A hub on GitHub, its runners, and people."""

    folder: Path
    github: FakeGitHub
    actions: Actions

    @property
    def url(self) -> str:
        return f"{self.github.web}/hub/model"

    @property
    def repository(self) -> Path:
        return self.folder / "served" / "hub" / "model.git"

    def call(self, who: str, command: str, *args: str | Path) -> dict[str, Any]:
        """Someone gives a command on their machine, and it succeeds."""
        out = self.folder / "out.json"
        env = {
            "MOSHI_FL_HOME": str(self.folder / who),
            "GH_TOKEN": f"t-{who}",
            "MOSHI_FL_TOKEN": WRITER,
            "MOSHI_FL_GITHUB_API": self.github.url,
            "MOSHI_FL_HUB": self.url,
        }
        with pytest.MonkeyPatch.context() as patch, out.open("w") as stream:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr("sys.stdout", stream)
            status = CLIS[command]([*map(str, args), "--json"])
        document: dict[str, Any] = json.loads(out.read_text())
        assert status == 0, document
        return document

    def fork(self, owner: str) -> Path:
        path = self.folder / "served" / owner / "model.git"
        if not path.exists():
            git(self.folder, "clone", "--quiet", "--bare", str(self.repository), str(path))
            git(path, "config", "http.receivepack", "true")
            self.github.forks[f"{owner}/model"] = 0
        return path

    def offer(self, owner: str, branch: str, title: str = "A contribution") -> dict[str, Any]:
        """A pull request of a branch with a commit that holds nothing, whatever the name."""
        path = self.fork(owner)
        main = git(path, "rev-parse", "main").strip()
        tree = git(path, "rev-parse", "main^{tree}").strip()
        commit = git(path, "commit-tree", tree, "-p", main, "-m", branch).strip()
        git(path, "update-ref", f"refs/heads/{branch}", commit)
        return self.github.open_pull(
            owner, {"head": f"{owner}:{branch}", "title": title, "body": title, "base": "main"}
        )

    def said(self, pull: dict[str, Any]) -> list[str]:
        return [comment["body"] for comment in self.github.comments.get(pull["number"], [])]

    def labels(self, pull: dict[str, Any]) -> list[str]:
        return [label["name"] for label in pull["labels"]]

    def states(self, pull: dict[str, Any]) -> list[str]:
        return [entry["state"] for entry in self.github.status_list.get(pull["head"]["sha"], [])]

    def check_nothing_ran(self) -> None:
        assert not list(self.folder.rglob("PWNED"))
        assert not Path("PWNED").exists()
        assert self.github.problems == []


@contextmanager
def github_at(folder: Path) -> Iterator[World]:
    """A GitHub with one empty repository, on loopback until the block ends."""
    served = folder / "served"
    hub = served / "hub" / "model.git"
    git(folder, "init", "--quiet", "--bare", "--initial-branch", "main", str(hub))
    git(hub, "config", "http.receivepack", "true")
    (served / "hub" / "model").symlink_to(hub)  # GitHub serves either name
    tokens = {"t-ann": "ann", "t-bob": "bob", "t-carol": "carol"}
    fake = FakeGitHub(description(), tokens=tokens, writers={"carol", JOB})
    fake.commit_of = lambda owner, branch: git(
        served / owner / "model.git", "rev-parse", f"refs/heads/{branch}"
    ).strip()
    with ExitStack() as stack:
        fake.web = stack.enter_context(serve(served, user="x-access-token", password=WRITER))
        stack.enter_context(serving(fake))
        secrets: dict[str, dict[str, str]] = {"evaluators": {}, "publishing": {}}
        yield World(folder, fake, Actions(fake, folder / "runners", secrets))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("github")
    with github_at(folder) as world:
        held_out = write_corpus(folder / "held-out", "while True:\n    total = total + 1\n", 2)
        world.call("carol", "moshi-hub", "init", world.url, "--eval-data", held_out)
        for environment, name, command in (
            ("evaluators", "MOSHI_HUB_POOL_KEY", ("pool", "seal")),
            ("evaluators", "MOSHI_HUB_ANCHOR_KEY", ("keys", "export", "--role", "anchor")),
            ("publishing", "MOSHI_HUB_ONLINE_KEY", ("keys", "export")),
            ("publishing", "MOSHI_HUB_TARGETS_KEY", ("keys", "export", "--role", "targets")),
        ):
            printed = world.call("carol", "moshi-hub", *command)["lines"]
            world.actions.secrets[environment][name] = "\n".join(printed)
        yield world
        world.check_nothing_ran()


def names(runs: list[Run]) -> list[str]:
    return [f"{run.name} {run.conclusion}" for run in runs]


WHOLE = [
    "submit success",
    "verify success",
    "evaluate success",
    "report success",
    "report success",
]


def test_from_a_contribution_to_a_published_round(world: World) -> None:
    data = write_corpus(world.folder / "data")
    world.fork("ann")
    sent = world.call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)
    pull = world.github.pulls[-1]
    assert sent["pull_request"] == pull["html_url"]
    pull["title"] = pull["body"] = TITLE
    runs = world.actions.contribution(pull)
    assert names(runs) == WHOLE, "\n".join(run.said for run in runs)
    (said,) = world.said(pull)
    assert said.startswith("<!-- moshi-fl:verdict -->\n**Accepted**: ")
    assert "| 3 of 3 |" in said
    assert said.count("| Linux") == 3
    assert "Merged" not in said
    assert runs[2].machines == ["gate", "evaluate", "evaluate", "evaluate"]
    assert runs[3].summary.strip() in said
    assert "Accepted** by the gate" in runs[4].summary  # it came late, and took nothing back
    assert world.labels(pull) == ["accepted"]
    assert world.states(pull) == ["success"]

    # The webhook comes twice; a run is run again. Each says the same, in the same place.
    before = (list(world.github.comments[pull["number"]]), world.states(pull))
    assert names(world.actions.contribution(pull)) == WHOLE
    assert (list(world.github.comments[pull["number"]]), world.states(pull)) == before

    night = world.actions.run("merge", "schedule", NIGHT)
    assert night.conclusion == "success", night.said
    proposal = world.github.pulls[-1]
    assert proposal["head"]["ref"] == "round/1"
    assert proposal["user"]["login"] == JOB
    proposed = git(world.repository, "rev-parse", "round/1")
    second = world.actions.run("merge", "schedule", NIGHT)
    assert "Nothing to merge: round 1 is proposed already" in second.said
    assert git(world.repository, "rev-parse", "round/1") == proposed
    assert len([p for p in world.github.pulls if p["head"]["ref"] == "round/1"]) == 1

    # Nobody has merged it: a push of something else publishes nothing.
    early = world.actions.run("merge", "push", {})
    assert "there is nothing to publish" in early.said
    assert "refs/moshi/next/1" in git(world.repository, "for-each-ref")

    git(world.repository, "update-ref", "refs/heads/main", proposed.strip())
    proposal["state"] = "closed"
    waiting = world.actions.run("merge", "schedule", NIGHT)
    assert "round 1 is merged and waits to be published" in waiting.said, waiting.said
    runs = world.actions.follow(world.actions.run("merge", "push", {}))
    assert names(runs) == ["merge success", "pages success"], "\n".join(r.said for r in runs)
    assert "Published round 1" in runs[0].said
    assert pull["state"] == "closed"
    assert world.said(pull)[-1].startswith("<!-- moshi-fl:round -->\nIncluded in round 1")
    assert "there is nothing to publish" in world.actions.run("merge", "push", {}).said
    assert world.call("ann", "moshi-fl", "sync")["round"] == 1
    evaluators = json.loads(git(world.repository, "show", f"main:{EVALUATORS_FILE}"))
    assert len(evaluators["anchors"]) == 1
    refreshed = world.actions.run("merge", "schedule", MONTH)
    assert "Refreshed" in refreshed.said, refreshed.said
    world.check_nothing_ran()


@pytest.mark.parametrize("branch", NAMES, ids=range(len(NAMES)))
def test_hostile_names_are_text(world: World, branch: str) -> None:
    pull = world.offer("bob", branch, TITLE)
    first = world.actions.run(
        "submit", "pull_request", {"pull_request": {"number": pull["number"]}}, head_ref=branch
    )
    judged = follow_to_verify(world, first, pull)
    assert judged.conclusion == "success", judged.said
    said = report_on(world, judged)
    assert said.conclusion == "success", said.said
    (comment,) = world.said(pull)
    assert comment.startswith("<!-- moshi-fl:verdict -->\n**Rejected** by the gate.")
    assert "`wrong-branch`" in comment
    assert "/<img" not in comment
    assert "@carol" not in comment
    assert world.labels(pull) == ["rejected"]
    assert world.states(pull) == ["failure"]
    world.check_nothing_ran()


def follow_to_verify(world: World, first: Run, pull: dict[str, Any]) -> Run:
    facts = {
        "head_sha": pull["head"]["sha"],
        "head_branch": pull["head"]["ref"],
        "event": first.event,
        "conclusion": first.conclusion,
        "name": first.name,
        "id": first.number,
    }
    return world.actions.run("verify", "workflow_run", {"workflow_run": facts})


def report_on(world: World, judged: Run) -> Run:
    return world.actions.run("report", "workflow_run", {"workflow_run": facts_of(judged)})


def facts_of(judged: Run) -> dict[str, Any]:
    """What the event says of a run that main's own code made."""
    return {
        "head_sha": "0" * 40,
        "event": judged.event,
        "conclusion": judged.conclusion,
        "name": judged.name,
        "id": judged.number,
    }


def submitted(world: World, pull: dict[str, Any]) -> Run:
    event = {"pull_request": {"number": pull["number"]}}
    return world.actions.run("submit", "pull_request", event, head_ref=pull["head"]["ref"])


def move(world: World, pull: dict[str, Any], owner: str) -> None:
    """The contributor pushes something else to the branch, by force."""
    path, branch = world.fork(owner), pull["head"]["ref"]
    tree = git(path, "rev-parse", "main^{tree}").strip()
    commit = git(path, "commit-tree", tree, "-m", "moved").strip()
    git(path, "update-ref", f"refs/heads/{branch}", commit)
    pull["head"]["sha"] = commit


def test_a_branch_that_moved_before_it_was_judged_is_refused(world: World) -> None:
    pull = world.offer("bob", "contribute/0/moves-early")
    signal = submitted(world, pull)
    old = {**pull, "head": dict(pull["head"])}
    move(world, pull, "bob")
    judged = follow_to_verify(world, signal, old)
    assert judged.conclusion == "failure"
    assert f"no open contribution has the head {old['head']['sha'][:12]}" in judged.said
    assert judged.artifacts == {}
    assert report_on(world, judged).conclusion == "skipped"
    assert world.said(pull) == []


def test_a_branch_that_moved_before_it_was_reported_is_refused(world: World) -> None:
    pull = world.offer("bob", "contribute/0/moves-late")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    move(world, pull, "bob")
    said = report_on(world, judged)
    assert said.conclusion == "failure"
    assert f"has moved to {pull['head']['sha'][:12]}; the verdict is about" in said.said
    assert "Traceback" not in said.said
    assert world.said(pull) == []
    assert world.states(pull) == []


def test_a_branch_that_moved_before_it_was_measured_is_refused(world: World) -> None:
    world.fork("bob")
    data = write_corpus(world.folder / "bobs-data")
    world.call("bob", "moshi-fl", "contribute", "--data", data, *LITTLE)
    pull = world.github.pulls[-1]
    judged = follow_to_verify(world, submitted(world, pull), pull)
    assert judged.conclusion == "success", judged.said
    old = pull["head"]["sha"]
    move(world, pull, "bob")
    measured = world.actions.run("evaluate", "workflow_run", {"workflow_run": facts_of(judged)})
    assert measured.conclusion == "failure"
    assert measured.said.count(f"no open contribution has the head {old[:12]}") == 3
    assert list(measured.artifacts) == ["verdict"]
    night = world.actions.run("merge", "schedule", NIGHT)
    assert "Nothing to merge: 0 contribution(s)" in night.said, night.said
    assert world.said(pull) == []


def test_a_fork_that_is_gone_holds_up_nobody(world: World) -> None:
    pull = world.offer("bob", "contribute/0/" + "a" * 32)
    signal = submitted(world, pull)
    fork = world.fork("bob")
    fork.rename(fork.with_name("gone.git"))
    judged = follow_to_verify(world, signal, pull)
    assert judged.conclusion == "failure"
    assert f"has the head {pull['head']['sha'][:12]}: " in judged.said
    pull["head"]["repo"] = None  # GitHub has noticed
    judged = follow_to_verify(world, signal, pull)
    assert judged.conclusion == "failure"
    assert "or its fork is gone" in judged.said
    night = world.actions.run("merge", "schedule", NIGHT)
    assert night.conclusion == "success", night.said
    assert "Nothing to merge" in night.said
    fork.with_name("gone.git").rename(fork)


def test_a_closed_pull_request_is_told_nothing(world: World) -> None:
    pull = world.offer("bob", "contribute/0/closed")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    pull["state"] = "closed"
    said = report_on(world, judged)
    assert said.conclusion == "failure"
    assert "is no open contribution any more" in said.said
    assert world.said(pull) == []


def test_a_pull_request_that_is_no_contribution_starts_nothing(world: World) -> None:
    pull = world.offer("bob", "fix-typo")
    runs = world.actions.contribution(pull)
    assert {run.conclusion for run in runs} == {"skipped"}


@pytest.mark.parametrize("name", ["verify", "evaluate"])
def test_a_pull_requests_own_workflow_of_the_same_name_is_not_believed(
    world: World, name: str
) -> None:
    forged = Run(len(world.actions.runs) + 1, name, "pull_request", "success")
    world.actions.runs.append(forged)
    runs = world.actions.follow(forged)[1:]
    assert runs
    assert {run.conclusion for run in runs} == {"skipped"}


def test_no_evaluator_starts_for_what_the_gate_has_rejected(world: World) -> None:
    pull = world.offer("bob", "contribute/0/rejected")
    runs = world.actions.contribution(pull)
    assert names(runs) == WHOLE, "\n".join(run.said for run in runs)
    evaluate, early, late = runs[2:]
    assert evaluate.machines == ["gate"]
    assert list(evaluate.artifacts) == ["verdict"]
    assert early.said == late.said  # the same is said once more, in the same place
    (said,) = world.said(pull)
    assert "`wrong-branch`" in said
    assert world.states(pull) == ["failure"]


@pytest.mark.parametrize(
    "verdict", [b"", b"[]", b"{}", b'{"findings": 0}', b"accepted=True\n", b"[" * 5000]
)
def test_no_evaluator_starts_on_what_is_no_verdict(world: World, verdict: bytes) -> None:
    pull = world.offer("bob", "contribute/0/odd")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    (judged.artifacts["verdict"] / "verdict.json").write_bytes(verdict)
    found = world.actions.run("evaluate", "workflow_run", {"workflow_run": facts_of(judged)})
    assert found.machines == ["gate"]


def test_a_forged_result_is_refused_in_one_sentence(world: World) -> None:
    pull = world.offer("bob", "contribute/0/forged")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    path = judged.artifacts["verdict"] / "verdict.json"
    path.write_bytes(path.read_bytes().replace(b"wrong-branch", b"<b>no</b>"))
    said = report_on(world, judged)
    assert said.conclusion == "failure"
    assert said.said.startswith("Error: verdict.json: ")
    assert "Traceback" not in said.said
    assert world.said(pull) == []


def test_the_api_goes_down_while_a_verdict_is_said(world: World) -> None:
    pull = world.offer("bob", "contribute/0/unlucky")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    world.github.failing = "statuses"
    down = report_on(world, judged)
    world.github.failing = ""
    assert down.conclusion == "failure"
    assert "not all of it could be said" in down.said
    assert report_on(world, judged).conclusion == "success"
    assert len(world.said(pull)) == 1
    assert world.states(pull) == ["failure"]


def test_a_label_that_cannot_be_made_is_no_failure(world: World) -> None:
    pull = world.offer("bob", "contribute/0/unlabelled")
    judged = follow_to_verify(world, submitted(world, pull), pull)
    world.github.failing = "labels"
    said = report_on(world, judged)
    world.github.failing = ""
    assert said.conclusion == "success", said.said
    assert "Warning: POST" in said.said
    assert (len(world.said(pull)), world.states(pull)) == (1, ["failure"])


def test_jobs_leave_nothing_where_they_must_not_write(world: World) -> None:
    """Only jobs with the right to write could push; all the others would have been refused."""
    refs = git(world.repository, "for-each-ref", "--format=%(refname)").split()
    assert not [ref for ref in refs if "contribute" in ref]
    assert os.environ.get("MOSHI_HUB_ONLINE_KEY") is None


def commands_in(text: str) -> list[list[str]]:
    """Lines of the guide's code blocks that are our commands, in words."""
    lines = re.findall(r"^    (moshi-\S+ .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_guide_leads_from_nothing_to_a_published_round(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new maintainer types what the guide says, in its order, and a secret where it says so."""
    guide = (Path(__file__).parents[2] / "hub" / "README.md").read_text(encoding="utf-8")
    section = guide.split("### On GitHub")[1].split("\n### ")[0]
    first, by_hand = section.split("Without the workflows")
    with github_at(tmp_path_factory.mktemp("guide")) as world:
        held_out = write_corpus(world.folder / "held-out", "while True:\n    n = n + 1\n", 2)
        places = {"https://github.com/team/code": world.url, "~/held-out": str(held_out)}
        printed = {}
        for command, *args in commands_in(first):
            given = [places.get(word, word) for word in args]
            printed[" ".join([command, *args])] = world.call("carol", command, *given)
        told = capsys.readouterr().err
        written = git(world.repository, "ls-tree", "-r", "--name-only", "main").split()
        assert {".github/workflows/verify.yml", ".github/CODEOWNERS", "SECURITY.md"} <= {*written}
        for wanted in ("Environment evaluators", "Environment publishing", "protect main", "Pages"):
            assert wanted in told
        for row in re.findall(r"^   \| (\w+) \| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE):
            environment, name, line = row
            said = printed.get(line) or world.call("carol", *shlex.split(line))
            world.actions.secrets[environment][name] = "\n".join(said["lines"])
        assert {len(found) for found in world.actions.secrets.values()} == {2}
        data = write_corpus(world.folder / "data")
        world.fork("ann")
        world.call("ann", "moshi-fl", "contribute", "--data", data, *LITTLE)
        pull = world.github.pulls[-1]
        assert names(world.actions.contribution(pull)) == WHOLE
        assert world.actions.run("merge", "workflow_dispatch", {}).conclusion == "success"
        assert world.github.pulls[-1]["head"]["ref"] == "round/1"
        assert [words[:2] for words in commands_in(by_hand)] == BY_HAND
        for command, *args in commands_in(by_hand):
            world.call("carol", command, *args)
        assert pull["state"] == "closed"
        assert world.call("ann", "moshi-fl", "sync")["round"] == 1
        world.check_nothing_ran()
