"""What a hub on GitHub begins with, held to what others know of workflows.

zizmor looks for holes, check-jsonschema for what GitHub would not read, actionlint for expressions
and shell steps that cannot work. The project's own workflows are held to the same.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moshi_fl.forge import parse_address
from moshi_hub.commands.init import next_steps
from moshi_hub.create import FILLED, TEMPLATE, VERBATIM, WORKFLOWS, Plan, pages_of
from tests.support.npm import files_of, tool

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "hub" / "moshi_hub" / "template"
OURS = sorted((FOLDER / ".github" / "workflows").glob("*.yml"))
PROJECTS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ALL = [*OURS, *PROJECTS]
ACTIONLINT = "2.0.6"
# What GitHub offers and this build of actionlint is too old to know.
RUNNERS = {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "windows-2025"}
TOO_NEW = re.compile(r'undefined variable "vars"')


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def workflow(path: Path) -> dict[str, Any]:
    found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert isinstance(found, dict)
    return found


def zizmor(*paths: Path) -> list[dict[str, Any]]:
    program = Path(sys.executable).parent / "zizmor"
    command = [program, "--offline", "--no-config", "--no-exit-codes", "--pedantic"]
    done = subprocess.run(
        [*command, "--format", "json", *paths], capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_zizmor_finds_nothing_above_low() -> None:
    found = zizmor(FOLDER / ".github", ROOT / ".github")
    severities = {entry["determinations"]["severity"] for entry in found}
    assert severities <= {"Informational", "Low"}, [entry["ident"] for entry in found]


def test_zizmor_would_find_a_hole(tmp_path: Path) -> None:
    hole = (FOLDER / ".github/workflows/verify.yml").read_text(encoding="utf-8")
    assert '"$HEAD"' in hole
    bad = tmp_path / "verify.yml"
    bad.write_text(hole.replace('"$HEAD"', "${{ github.event.workflow_run.head_branch }}"))
    severities = {entry["determinations"]["severity"] for entry in zizmor(bad)}
    assert "High" in severities


def check_schema(schema: str, *paths: Path) -> str:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_github_reads_the_workflows_as_they_are_meant() -> None:
    assert check_schema("vendor.github-workflows", *ALL) == ""
    dependabot = [FOLDER / ".github" / "dependabot.yml", ROOT / ".github" / "dependabot.yml"]
    assert check_schema("vendor.dependabot", *dependabot) == ""


def test_a_workflow_that_github_cannot_read_would_be_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text(OURS[0].read_text(encoding="utf-8").replace("runs-on:", "runs_on:"))
    assert "runs_on" in check_schema("vendor.github-workflows", bad)


def actionlint(*paths: Path) -> list[str]:
    package = "package"
    members = ["node.cjs", "actionlint.cjs", "tiny_wasm_exec.js", "main.wasm", "package.json"]
    folder = files_of("actionlint", ACTIONLINT, [f"{package}/{member}" for member in members])
    script = ROOT / "tests" / "support" / "actionlint.cjs"
    command = [tool("node"), script, folder / package, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = []
    for entry in json.loads(done.stdout):
        label = re.match(r'label "([^"]+)" is unknown', entry["message"])
        known = (label and label[1] in RUNNERS) or TOO_NEW.match(entry["message"])
        said += [] if known else [f"{entry['file']}:{entry['line']}: {entry['message']}"]
    return said


def test_actionlint_has_nothing_to_say() -> None:
    assert actionlint(*ALL) == []


def test_actionlint_would_see_a_wrong_expression(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    text = (FOLDER / ".github/workflows/evaluate.yml").read_text(encoding="utf-8")
    bad.write_text(text.replace("matrix.seat", "matrix.chair"))
    assert any('"chair"' in line for line in actionlint(bad))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_nothing_has_more_rights_than_it_says(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {}
    for job in found["jobs"].values():
        assert isinstance(job["permissions"], dict)
        assert int(job["timeout-minutes"]) <= 120


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_action_is_pinned_with_its_version_beside(path: Path) -> None:
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\buses:", line)
    ]
    pinned = re.compile(r" uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
    assert [line for line in lines if not pinned.search(line)] == []


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_shell_steps_are_one_line_and_know_names_from_variables_only(path: Path) -> None:
    for job in workflow(path)["jobs"].values():
        for step in job["steps"]:
            run = step.get("run", "echo")
            assert "\n" not in run.strip()
            assert "${{" not in run
            assert run.split()[0] in {"moshi-hub", "python", "echo"}


def test_only_report_and_merge_write_where_people_read() -> None:
    writers = set()
    for path in OURS:
        for job in workflow(path)["jobs"].values():
            if "write" in set(job["permissions"].values()) - {"id-token"}:
                writers.add(path.stem)
    assert writers == {"report", "merge", "pages"}
    report = workflow(FOLDER / ".github/workflows/report.yml")["jobs"]["report"]
    assert report["permissions"]["contents"] == "read"


def test_the_guide_says_which_workflows_write_and_which_keys_they_have() -> None:
    guide = (ROOT / "hub" / "README.md").read_text(encoding="utf-8")
    table = guide.split("| workflow | starts |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    assert set(rows) == {path.stem for path in OURS}
    for path in OURS:
        text, may = path.read_text(encoding="utf-8"), rows[path.stem]
        assert ("write" in may) == bool(re.search(r": write\b", text)), path.stem
        keys = re.findall(r"secrets\.MOSHI_HUB_(\w+)_KEY", text)
        assert [key for key in keys if key.lower() not in may] == []


def test_keys_are_where_a_person_has_said_yes() -> None:
    for path in OURS:
        for job in workflow(path)["jobs"].values():
            secrets = set(re.findall(r"secrets\.(\w+)", json.dumps(job["steps"])))
            if secrets & {"MOSHI_HUB_ONLINE_KEY", "MOSHI_HUB_TARGETS_KEY"}:
                assert job["environment"] == "publishing"
            elif secrets:
                assert job["environment"] == "evaluators"


def test_a_pull_requests_own_workflow_of_the_same_name_starts_nothing() -> None:
    for name in ("evaluate", "report"):
        for job in workflow(FOLDER / f".github/workflows/{name}.yml")["jobs"].values():
            assert job["if"].startswith("github.event.workflow_run.event == 'workflow_run' &&")


def test_a_pull_request_at_somebodys_commit_cancels_no_run_of_theirs() -> None:
    (path,) = (path for path in OURS if path.stem == "verify")
    group = workflow(path)["concurrency"]["group"]
    for part in ("head_sha", "head_repository.id", "head_branch"):
        assert f"${{{{ github.event.workflow_run.{part} }}}}" in group


def test_the_template_has_no_file_that_nobody_writes() -> None:
    there = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()}
    assert there == {*FILLED, *VERBATIM, "hub.toml"}
    assert {path.stem for path in OURS} == set(WORKFLOWS)


def test_a_hub_on_github_has_its_jobs_and_a_bare_one_has_not() -> None:
    plan = Plan(url="https://github.com/team/code.git", family="char", preset="tiny", name="code")
    assert set(pages_of(plan, plan.url)) == {"README.md"}
    bare = pages_of(plan, plan.url)["README.md"].decode()
    assert "badge" not in bare
    assert "$" not in bare
    there = Plan(**{**vars(plan), "repository": parse_address(plan.url)})
    pages = pages_of(there, there.url)
    assert set(pages) == {*FILLED, *VERBATIM}
    for name in VERBATIM:
        assert pages[name] == (TEMPLATE / name).read_bytes()
    assert (
        b"https://github.com/team/code/actions/workflows/merge.yml/badge.svg" in pages["README.md"]
    )
    assert pages[".github/CODEOWNERS"].decode().splitlines()[-1] == "* @team"
    assert re.fullmatch(rb"moshi-fl==\d\S*\n", pages[".github/requirements.txt"])
    assert not any(b"$" in pages[name] for name in FILLED)


def test_an_organisation_is_told_to_name_a_team_before_its_code_owners_are_demanded() -> None:
    """GitHub skips a line of CODEOWNERS that names an organisation."""
    there = parse_address("https://github.com/team/code.git")
    lines = next_steps(there, measured=True)
    owners = next(n for n, line in enumerate(lines) if "CODEOWNERS" in line)
    assert "@team/TEAM" in lines[owners]
    assert owners < next(n for n, line in enumerate(lines) if "review by its code owners" in line)
    guide = (ROOT / "hub" / "README.md").read_text(encoding="utf-8")
    assert "`* @organisation/team`" in guide.split("demand a review by its code owners")[0]
    assert "@organisation/team" in (FOLDER / ".github/CODEOWNERS").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_secrets_and_variables_of_the_workflows_are_documented(name: str) -> None:
    guide = (ROOT / "hub" / "README.md").read_text(encoding="utf-8")
    text = (FOLDER / f".github/workflows/{name}.yml").read_text(encoding="utf-8")
    for wanted in re.findall(r"(?:secrets|vars)\.(\w+)", text):
        assert f"`{wanted}`" in guide, wanted
