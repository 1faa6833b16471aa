"""Runs the jobs of our workflows on this machine, as GitHub's runners would, one after the other.

Of an action it does what the action does to files (artifacts), of a shell step everything: the same
line, in bash, in a home that forgets. It knows the expressions that our workflows use, no others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.github import FakeGitHub

WORKFLOWS = Path(__file__).parents[2] / "hub" / "moshi_hub" / "template" / ".github" / "workflows"
INSTALL = "python -m pip install --requirement .github/requirements.txt"
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")
TOKEN = re.compile(r"'[^']*'|&&|\|\||==|!=|[()]|,|[A-Za-z_][\w.-]*")
WRITER = "job-writer"
JOB = "github-actions[bot]"


@dataclass
class Run:
    """One run of a workflow.

    Attributes:
        number: Its id.
        name: Of its workflow.
        event: What started it: the name of an event.
        conclusion: ``success``, ``failure`` or ``skipped``.
        artifacts: Name to the folder with its files.
        said: What the shell steps printed.
        summary: What they wrote to the job summary.
        machines: The key of its job, for each machine that was started.
    """

    number: int
    name: str
    event: str
    conclusion: str = "skipped"
    artifacts: dict[str, Path] = field(default_factory=dict)
    said: str = ""
    summary: str = ""
    machines: list[str] = field(default_factory=list)


class Actions:
    """The runners of one repository.

    Args:
        github: The forge that the jobs speak to; it also serves Git.
        folder: Where runners work; each job has a folder of its own below.
        secrets: Environment to its secrets.
    """

    def __init__(
        self, github: FakeGitHub, folder: Path, secrets: dict[str, dict[str, str]]
    ) -> None:
        self.github, self.folder, self.secrets = github, folder, secrets
        self.runs: list[Run] = []
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        command = self._bin / "moshi-hub"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moshi_hub "$@"\n')
        command.chmod(0o755)

    def contribution(self, pull: Mapping[str, Any]) -> list[Run]:
        """A contribution's pull request was opened or its branch was pushed: all that follows."""
        head = pull["head"]
        event = {"pull_request": {"number": pull["number"]}}
        return self.follow(
            self.run("submit", "pull_request", event, head_ref=head["ref"]),
            head_sha=head["sha"],
            head_branch=head["ref"],
        )

    def follow(self, first: Run, **facts: str) -> list[Run]:
        """A run and those that its end starts, facts being what its event says."""
        found, main = [first], {"head_sha": "0" * 40, "head_branch": "main"}
        for name in ("verify", "evaluate", "report", "pages"):
            if first.name in triggers(name):
                said = {**main, **facts} if first.event == "pull_request" else main
                said |= {"event": first.event, "conclusion": first.conclusion, "name": first.name}
                again = self.run(
                    name, "workflow_run", {"workflow_run": {**said, "id": first.number}}
                )
                found += self.follow(again)
        return found

    def run(self, name: str, event_name: str, event: Mapping[str, Any], **github: str) -> Run:
        """One workflow, all its jobs."""
        run = Run(len(self.runs) + 1, name, event_name)
        self.runs.append(run)
        document = yaml.load((WORKFLOWS / f"{name}.yml").read_text(), Loader=yaml.BaseLoader)
        needs: dict[str, Any] = {}
        for key, job in document["jobs"].items():
            needed = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
            if any(other not in needs for other in needed):
                continue  # as GitHub does where one was skipped or has failed
            for number, matrix in enumerate(
                job.get("strategy", {}).get("matrix", {}).get("include", [{}])
            ):
                token = (
                    WRITER
                    if job["permissions"].get("contents") == "write"
                    else f"job-{len(self.github.rights)}"
                )
                self.github.tokens[token], self.github.rights[token] = JOB, job["permissions"]
                context = {
                    "github": {
                        "event_name": event_name,
                        "event": event,
                        "server_url": self.github.web,
                        "repository": f"{self.github.owner}/{self.github.name}",
                        "token": token,
                        **github,
                    },
                    "secrets": self.secrets.get(str(job.get("environment", "")), {}),
                    "matrix": matrix,
                    "vars": {},
                    "needs": needs,
                    "steps": {},
                }
                if _condition(job.get("if", "'yes'"), context):
                    run.machines.append(key)
                    work = self.folder / f"{run.number}-{key}-{number}"
                    if self._job(run, job, context, work):
                        said = job.get("outputs", {})
                        outputs = {each: filled(value, context) for each, value in said.items()}
                        needs = {**needs, key: {"outputs": outputs}}
        return run

    def _job(
        self, run: Run, job: Mapping[str, Any], context: Mapping[str, Any], work: Path
    ) -> bool:
        work.mkdir()
        if run.conclusion == "skipped":
            run.conclusion = "success"
        for step in job["steps"]:
            if "uses" in step:
                self._action(run, step, context, work)
            elif not self._shell(run, step, context, work):
                run.conclusion = "failure"
                return False
        return True

    def _action(
        self, run: Run, step: Mapping[str, Any], context: Mapping[str, Any], work: Path
    ) -> None:
        name = step["uses"].split("@")[0]
        given = {key: filled(value, context) for key, value in step.get("with", {}).items()}
        if name == "actions/upload-artifact":
            kept = self.folder / f"artifact-{run.number}-{given['name']}"
            source = work / given["path"]
            if not source.exists():
                assert given["if-no-files-found"] == "warn", given["path"]
                return
            assert given["overwrite"] == "true"  # else a run could not be run again
            kept.mkdir()
            files = sorted(source.iterdir()) if source.is_dir() else [source]
            assert files
            for file in files:
                shutil.copy(file, kept)
            run.artifacts[given["name"]] = kept
        elif name == "actions/download-artifact":
            source_run = self.runs[int(given["run-id"]) - 1]
            assert context["github"]["token"] == given["github-token"]
            wanted = [given["name"]] if "name" in given else list(source_run.artifacts)
            target = work / given["path"]
            for artifact in wanted:
                shutil.copytree(source_run.artifacts[artifact], target, dirs_exist_ok=True)
        else:
            assert name in {
                "actions/checkout",
                "actions/setup-python",
                "actions/upload-pages-artifact",
                "actions/deploy-pages",
            }, name

    def _shell(
        self, run: Run, step: Mapping[str, Any], context: Mapping[str, Any], work: Path
    ) -> bool:
        assert "${{" not in step["run"]  # else GitHub would write a stranger's text into the script
        if step["run"] == INSTALL:
            return True  # what it installs is here
        summary, script, outputs = (work / name for name in ("summary.md", "step.sh", "outputs"))
        outputs.write_text("")
        script.write_text(step["run"] + "\n")
        kept = ("PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LANG", "SYSTEMROOT")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env |= {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(work / "home"),
            "CI": "true",
            "GITHUB_STEP_SUMMARY": str(summary),
            "GITHUB_OUTPUT": str(outputs),
            "MOSHI_FL_GITHUB_API": self.github.url,
            **{name: filled(value, context) for name, value in step.get("env", {}).items()},
        }
        (work / "home").mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", str(script)],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        run.said += done.stdout
        found = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
        context["steps"][step.get("id", "")] = {"outputs": found}
        run.summary += summary.read_text(encoding="utf-8") if summary.exists() else ""
        return done.returncode == 0


def triggers(name: str) -> list[str]:
    """Names of the workflows whose end starts this one."""
    document = yaml.load((WORKFLOWS / f"{name}.yml").read_text(), Loader=yaml.BaseLoader)
    return list(document["on"].get("workflow_run", {}).get("workflows", []))


def filled(text: str, context: Mapping[str, Any]) -> str:
    """A value with its expressions replaced."""
    return EXPRESSION.sub(lambda found: _value(found[1], context), text)


def _value(name: str, context: Mapping[str, Any]) -> str:
    assert re.fullmatch(r"[a-z]+(\.[\w-]+)+", name), name
    found: Any = context
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return ""  # as GitHub does
        found = found[part]
    return str(found)


def _condition(text: str, context: Mapping[str, Any]) -> bool:
    """An ``if`` of names, strings, comparisons, ``startsWith``, and, or."""
    words = list(_python(text, context))
    names = {"startsWith": str.startswith}
    return bool(eval(" ".join(words), {"__builtins__": {}}, names))


def _python(text: str, context: Mapping[str, Any]) -> Iterator[str]:
    assert TOKEN.sub("", text).strip() == "", text
    for token in TOKEN.findall(text):
        if token in {"&&", "||"}:
            yield {"&&": "and", "||": "or"}[token]
        elif token.startswith("'"):
            yield repr(token.strip("'"))
        elif token in {"==", "!=", "(", ")", ",", "startsWith"}:
            yield token
        else:
            yield repr(_value(token, context))
