"""What a hub on GitHub costs in a month, from what one contribution and one round cost here.

Bytes, seconds and calls are measured: bytes and seconds on a hub of the ``base`` model, calls on a
GitHub of loopback that is held to the published description (it needs npm, once). The rest is
arithmetic, in ``scale.py``: change ``PLANS`` to your own case, and give the line of JSON that a run
prints to ``python -m benchmarks.bench_scale FILE``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import msgspec

from benchmarks.common import Row, print_table
from benchmarks.fabricate import Fabricated, contribute, fabricated_delta
from benchmarks.scale import (
    EVALUATORS,
    PLANS,
    REGIONS,
    Limits,
    Measured,
    Plan,
    costs,
    largest_model,
    largest_month,
    most_in_a_round,
)
from moshi_fl.history import round_folder
from moshi_fl.records import dump
from moshi_fl.rules import shapes_of
from moshi_fl.snapshot import encode_step
from moshi_hub.heldout import pool_path, store_pool
from moshi_hub.opened import look

FEW, MANY = 2, 8  # contributions of a round: what they differ by is what one costs
SEQUENCES = 8  # measured; the evaluation's own number is reckoned from it
ROOT = Path(__file__).parents[1]


# Measuring.


def cpu() -> float:
    """CPU seconds of this process and those it started."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


def measure() -> Measured:
    """Two rounds of one hub of the base model, and the calls of two small ones on GitHub."""
    with tempfile.TemporaryDirectory(prefix="moshi-fl-bench-") as name:
        folder = Path(name)
        hub = Fabricated(folder)
        hub.create("base")
        evaluate = evaluation_seconds(hub)
        few, many = (one_round(hub, count) for count in (FEW, MANY))
        steps = (many[key] - few[key] for key in range(5))
        text, record, verify, merged, delta = (step / (MANY - FEW) for step in steps)
        step, keyframe = step_bytes(hub)
        return Measured(
            parameters=hub.maintainer.look().newest.parameters,
            sent=delta + text,
            delta=delta,
            text=text,
            round_text=few[0] - FEW * text,
            record=record,
            step=step,
            keyframe=keyframe,
            verify=verify,
            merge=max(0.0, merged - verify),
            evaluate=evaluate,
            calls=count_calls(folder),
        )


def one_round(hub: Fabricated, count: int) -> tuple[float, float, float, float, float]:
    """Bytes on main and in the record, seconds to judge and to merge, bytes of the deltas."""
    state = hub.contributors.look()
    shapes = shapes_of(hub.maintainer.pull().load())
    for index in range(count):
        contribute(hub.contributors, state, shapes, name=f"c{index}", seed=hub.seed)
    maintainer = hub.maintainer
    with maintainer.workspace() as folder:
        start = cpu()
        look(maintainer, folder)
        verify = cpu() - start
    start = cpu()
    outcome = hub.round(0)
    merged = cpu() - start
    assert outcome.built is not None
    record = outcome.built.record
    assert len(record.contributions) == count
    assert record.update is not None
    deltas = sum(entry.delta.bytes for entry in outcome.proposal.contributions.values())
    return (
        float(text_bytes(hub, record.round)),
        float(len(dump(record))),
        verify,
        merged,
        float(deltas),
    )


def text_bytes(hub: Fabricated, number: int) -> int:
    """Bytes of a round's folder on main, compressed as Git compresses objects."""
    repo, main = hub.maintainer.repo, hub.maintainer.fetch_main()
    paths = [e.path for e in repo.entries(main) if e.path.startswith(round_folder(number))]
    return sum(len(zlib.compress(data)) for data in repo.read_many(main, paths, limit=1 << 20))


def step_bytes(hub: Fabricated) -> tuple[float, float]:
    """Bytes of a step that changes every weight, and of a keyframe."""
    replica = hub.maintainer
    newest = replica.pull()
    old = newest.load()
    change = fabricated_delta(shapes_of(old), [1])
    with replica.workspace() as folder:
        new = {name: old[name] + change[name] for name in old}
        step = sum(file.bytes for file in encode_step(old, new, folder))
    first = replica.chain(newest.state, 0)[0]
    assert first.keyframe is not None
    return float(step), float(first.keyframe.bytes)


def evaluation_seconds(hub: Fabricated) -> float:
    """CPU seconds of all evaluators for one contribution, reckoned from a few sequences."""
    from moshi_hub.measure import BaseModel, Desk, Meter

    replica = hub.maintainer
    snapshot = replica.pull()
    config, tokenizer = snapshot.state.config, snapshot.state.tokenizer
    store_pool(replica, config, tokenizer, [ROOT / "moshi_fl"])
    desk = Desk(config, pool_path(replica), {0: BaseModel(snapshot.path, tokenizer)}, {}, Path())
    meter = Meter(desk, config.evaluation.precision)
    meter.base_losses(0, [0])
    start = cpu()
    meter.base_losses(0, list(range(SEQUENCES)))
    each = (cpu() - start) / SEQUENCES
    pool_path(replica).unlink()  # the rounds that follow are not evaluated
    return EVALUATORS * each * (config.evaluation.sequences + config.evaluation.private_sequences)


# Counting calls.

WRITES = ("POST", "PATCH", "PUT", "DELETE")


def count_calls(folder: Path) -> dict[str, tuple[float, float]]:
    """Calls by what they are for; what two hubs differ by is what one contribution costs."""
    from tests.support.openapi import CACHE

    if shutil.which("npm") is None and not CACHE.exists():
        print("  calls are not counted: npm is not here", file=sys.stderr)
        return {}
    one, three = (counted(folder / f"github-{count}", count) for count in (1, 3))
    each = {
        what: ((three[what][0] - one[what][0]) / 2, (three[what][1] - one[what][1]) / 2)
        for what in one
    }
    fixed = [
        tuple(a - b for a, b in zip(one[what], each[what], strict=True))
        for what in ("verify", "merge", "publish")
    ]
    return {**each, "round": (sum(calls for calls, _ in fixed), sum(w for _, w in fixed))}


PHASES = {
    "verify": ("verify", "--comment"),
    "again": ("verify", "--comment"),
    "merge": ("merge",),
    "publish": ("publish",),
}


def counted(folder: Path, count: int) -> dict[str, tuple[int, int]]:
    """Calls of a round of so many contributions, and those of them that write."""
    from tests.support.github import FakeGitHub, serving
    from tests.support.http_hub import serve
    from tests.support.openapi import description

    served = folder / "served"
    hub = served / "hub" / "model.git"
    people = [f"person{number}" for number in range(count)]
    tokens = {f"t-{who}": who for who in (*people, "carol")}
    fake = FakeGitHub(description(), tokens=tokens, writers={"carol"})
    fake.commit_of = lambda owner, branch: git(
        served / owner / "model.git", "rev-parse", f"refs/heads/{branch}"
    )
    hub.mkdir(parents=True)
    git(hub, "init", "--quiet", "--bare")
    git(hub, "config", "http.receivepack", "true")
    with serve(served) as base, serving(fake):
        fake.web = base
        address = f"{base}/hub/model.git"
        command(folder, fake, "carol", "moshi-hub", "init", address)
        for who in people:
            fork = served / who / "model.git"
            git(folder, "clone", "--quiet", "--bare", str(hub), str(fork))
            git(fork, "config", "http.receivepack", "true")
            fake.forks[f"{who}/model"] = 0
        marks = {"": len(fake.requests)}
        for who in people:
            words = ("--data", str(ROOT / "examples"), "--steps", "1", "--hub", address)
            command(folder, fake, who, "moshi-fl", "contribute", *words)
        marks["send"] = len(fake.requests)
        for what, words in PHASES.items():
            command(folder, fake, "carol", "moshi-hub", *words, "--hub", address)
            marks[what] = len(fake.requests)
        assert fake.problems == []
        assert all(pull["state"] == "closed" for pull in fake.pulls[:count])
    parts = {
        what: fake.requests[start:stop]
        for (_, start), (what, stop) in itertools.pairwise(marks.items())
    }
    return {what: (len(p), sum(r.startswith(WRITES) for r in p)) for what, p in parts.items()}


def git(folder: Path, *words: str) -> str:
    """Git as on a machine where nobody ever configured it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def command(folder: Path, fake: object, who: str, *words: str) -> None:
    """Someone gives a command, which must succeed."""
    import moshi_hub.cli
    import moshi_sdk.cli

    run = {"moshi-fl": moshi_sdk.cli.main, "moshi-hub": moshi_hub.cli.main}[words[0]]
    said = StringIO()
    values = {
        "MOSHI_FL_GITHUB_API": fake.url,
        "MOSHI_FL_HOME": str(folder / f"home-{who}"),
        "GH_TOKEN": f"t-{who}",
    }
    with environment(values), redirect_stdout(said), redirect_stderr(said):
        status = run([*words[1:], "--json"])
    assert status == 0, said.getvalue()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These variables, until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run() -> list[Row]:
    """All rows: what is measured, then what follows."""
    found = measure()
    print(json.dumps(msgspec.to_builtins(found)), file=sys.stderr)
    return rows_of(found)


def rows_of(found: Measured) -> list[Row]:
    """What follows from what was measured."""
    limits = Limits()
    rows = [*measured_rows(found), *(row for plan in PLANS for row in plan_rows(plan, found))]
    region = Plan(math.ceil(PLANS[-1].contributions / REGIONS), 60, taken=30)
    above = Plan(REGIONS * 30, 30)
    rows += plan_rows(region, found, f"each of {REGIONS} regions: ")
    rows += plan_rows(above, found, "the hub above them: ")
    for what, value in largest_month(found, limits).items():
        rows.append(Row(f"a month's limit: {what}", f"{value:,.0f}", "", math.nan, "-"))
    for what, value in most_in_a_round(found, limits).items():
        rows.append(Row(f"a round's limit: {what}", f"{value:,.0f}", "", math.nan, "-"))
    for what, value in largest_model(found, limits).items():
        rows.append(Row(f"a model's limit: {what}", f"{value / 1e6:,.0f} M", "", math.nan, "-"))
    return rows


CALLS = {
    "send": "of a contributor",
    "verify": "to judge a contribution and say so",
    "again": "to judge it again, unchanged",
    "merge": "to merge it",
    "publish": "to publish it",
    "round": "for a round",
}


def measured_rows(found: Measured) -> list[Row]:
    """What one contribution and one round cost."""
    facts = {
        "a contribution pushes": megabytes(found.sent),
        "text on main, packed": f"{found.text:,.0f} B, and {found.round_text:,.0f} B a round",
        "a step that changes every weight": megabytes(found.step),
        "a keyframe": megabytes(found.keyframe),
        "to judge a contribution": f"{found.verify:.2f} s of CPU",
        "to merge it": f"{found.merge:.2f} s of CPU",
        "to evaluate it, three evaluators": f"{found.evaluate:.0f} s of CPU",
    }
    for what, (calls, writes) in found.calls.items():
        facts[f"calls {CALLS[what]}"] = f"{calls:.1f}, {writes:.1f} of them write"
    return [Row(what, said, "", math.nan, "-") for what, said in facts.items()]


def plan_rows(plan: Plan, found: Measured, who: str = "") -> list[Row]:
    """What a plan costs beside GitHub's limits; the ratio is how far away they are."""
    limits, cost = Limits(), costs(plan, found)
    name = f"{who}{plan.contributions:,} a month in {plan.rounds} rounds"
    facts = (
        ("pushed by contributors", megabytes(cost.received), "", math.nan),
        ("stays in a month", megabytes(cost.kept), "5 GB asked", limits.repository / cost.kept),
        ("… with keep_rounds = 10", megabytes(cost.kept_short), "", math.nan),
        ("a round's push", megabytes(cost.push), "2 GB", limits.push / cost.push),
        ("calls an hour", f"{cost.calls:.1f}", "1,000", limits.workflow_calls / cost.calls),
        ("writes an hour", f"{cost.writes:.1f}", "500", limits.writes / cost.writes),
        (
            "calls to make a round",
            f"{cost.burst:,.0f}",
            "1,000",
            limits.workflow_calls / cost.burst,
        ),
        ("CPU", f"{cost.cpu_hours:,.2f} h", "", math.nan),
        ("Actions", f"{cost.minutes:,.0f} min", "2,000", limits.private_minutes / cost.minutes),
        ("jobs at a time", f"{cost.jobs:.2f}", "20", limits.jobs / cost.jobs),
        ("open pull requests", f"{cost.open:,}", "", math.nan),
    )
    return [Row(f"{name}: {what}", ours, limit, ratio, "-") for what, ours, limit, ratio in facts]


def megabytes(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


if __name__ == "__main__":  # python -m benchmarks.bench_scale FILE: what an earlier run measured
    print_table(rows_of(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Measured)))
