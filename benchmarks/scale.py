"""The arithmetic of what a hub costs on GitHub; ``bench_scale`` measures what goes into it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MONTH = 30 * 24  # hours
KEPT = 64 / 4096  # of all weights, that a delta of topk touches
EVALUATORS = 3  # processes of the hub's machine
JOBS = 5  # that a pull request starts: signal, verify, is it accepted, evaluate (on three), report
STARTING = 45.0  # seconds before a job's own work begins: checkout, Python, install; assumed


@dataclass(frozen=True)
class Limits:
    """GitHub's, as its documentation names them in November 2026."""

    file: float = 100e6  # bytes that a blob may have
    push: float = 2e9  # bytes that a push may have
    repository: float = 5e9  # bytes above which GitHub asks to reduce a repository
    user_calls: int = 5000  # an hour, of a token
    workflow_calls: int = 1000  # an hour and repository, of a workflow's token
    writes: int = 500  # an hour, of what creates content
    private_minutes: int = 2000  # a month, of private repositories; public ones are free
    jobs: int = 20  # at the same time


@dataclass(frozen=True)
class Measured:
    """What one contribution and one round cost.

    ``calls``: of the API and, of these, those that create content, by what they are for: ``send``
    by a contributor; ``verify``, ``again`` (judged when nothing has changed), ``merge`` and
    ``publish`` by the hub for each contribution; ``round`` for a round. Empty: not counted.
    """

    parameters: int
    sent: float  # bytes that a contribution pushes
    delta: float  # bytes of its delta
    text: float  # bytes of main, packed, for a contribution
    round_text: float  # and for a round
    record: float  # bytes of the round's record for each contribution in it
    step: float  # bytes of a step that changes every weight
    keyframe: float
    verify: float  # CPU seconds for a contribution
    merge: float
    evaluate: float
    calls: dict[str, tuple[float, float]]

    def called(self, *what: str) -> tuple[float, float]:
        """Calls for these together, and those that create content."""
        found = [self.calls.get(name, (math.nan, math.nan)) for name in what]
        return sum(calls for calls, _ in found), sum(writes for _, writes in found)


@dataclass(frozen=True)
class Plan:
    """So many contributions a month, in so many rounds; and rounds taken of a hub above."""

    contributions: int
    rounds: int
    taken: int = 0

    @property
    def each(self) -> int:
        """Contributions of a round."""
        return math.ceil(self.contributions / self.rounds)


PLANS = (Plan(10, 4), Plan(1000, 30), Plan(100_000, 240))
REGIONS = 25


@dataclass(frozen=True)
class Costs:
    """What a plan costs in a month, and the busiest push and hour."""

    received: float  # bytes that contributors push
    kept: float  # bytes that stay, when every round can be audited for ever
    kept_short: float  # bytes that stay of the updates and archives of 10 rounds
    push: float  # bytes of a round's push
    calls: float  # of the hub's token, an hour on average
    writes: float
    burst: float  # of the hub's token, when a round is merged and published
    cpu_hours: float  # of judging, evaluating and merging
    minutes: float  # of Actions
    jobs: float  # running at the same time on average
    open: int  # pull requests at the end of a round


def costs(plan: Plan, found: Measured, *, keep_rounds: int = 10) -> Costs:
    """The arithmetic, in one place."""
    n, each = plan.contributions, plan.each
    deltas = each * found.delta
    touched = 1 - (1 - KEPT) ** each  # of all weights, where each delta touches others
    update = min(deltas, found.step * touched)
    archive = deltas if update < deltas else 0.0
    # A keyframe comes when the updates since the last have half its size; three stay.
    keyframes = min(plan.rounds, math.floor(plan.rounds * update / (found.keyframe / 2)))
    a_round = update + archive
    text = n * found.text + plan.rounds * found.round_text
    updates = plan.rounds * a_round + plan.taken * found.step
    lasting = min(1.0, keep_rounds / (plan.rounds + plan.taken))
    kept = text + updates + 3 * found.keyframe
    short = text + lasting * updates + 3 * found.keyframe
    own, fixed = found.called("verify", "merge", "publish"), found.called("round")
    seconds = found.verify + found.evaluate + found.merge
    job = STARTING + found.verify
    machine = STARTING + found.evaluate / EVALUATORS
    minutes = n * ((JOBS - 1) * math.ceil(job / 60) + EVALUATORS * math.ceil(machine / 60))
    minutes += plan.rounds * math.ceil((STARTING + each * found.merge) / 60)
    return Costs(
        received=n * found.sent,
        kept=kept,
        kept_short=short,
        push=a_round + (found.keyframe if keyframes else 0.0) + each * found.text,
        calls=(n * own[0] + plan.rounds * fixed[0]) / MONTH,
        writes=(n * own[1] + plan.rounds * fixed[1]) / MONTH,
        burst=each * found.called("merge", "publish")[0] + fixed[0],
        cpu_hours=n * seconds / 3600,
        minutes=minutes,
        jobs=minutes / 60 / MONTH,
        open=each,
    )


def largest_month(found: Measured, limits: Limits) -> dict[str, float]:
    """Contributions a month at which each limit is reached by one repository; inf: never."""
    own = found.called("verify", "merge", "publish")
    job = costs(Plan(1, 1), found).minutes
    return {
        "calls of a workflow's token": limits.workflow_calls * MONTH / own[0],
        "calls of a user's token": limits.user_calls * MONTH / own[0],
        "writes": limits.writes * MONTH / own[1],
        "jobs at the same time": limits.jobs * MONTH * 60 / job,
        "private minutes": limits.private_minutes / job,
        "storage of a year": limits.repository / 12 / (found.delta + found.text),
    }


def most_in_a_round(found: Measured, limits: Limits) -> dict[str, float]:
    """Contributions of a round at which each limit is reached."""
    from moshi_fl.records import MAX_RECORD_BYTES

    return {
        "calls of a workflow's token": limits.workflow_calls / found.called("merge", "publish")[0],
        "push": limits.push / found.sent,
        "record of 1 MiB": MAX_RECORD_BYTES / found.record,
    }


def largest_model(found: Measured, limits: Limits) -> dict[str, float]:
    """Parameters of a model at which each limit is reached; snapshots are cut into small files."""
    return {
        "delta file": limits.file / found.delta * found.parameters,
        "push of a keyframe": limits.push / found.keyframe * found.parameters,
    }
