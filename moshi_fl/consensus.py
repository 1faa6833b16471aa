"""When evaluators agree, and what follows: pure functions, exact arithmetic.

Every decision is made on integers, so that an auditor on another machine decides the same.
``moshi_fl.evidence`` has the records, ``moshi_fl.session`` puts them in order, and
``moshi_fl.verdicts`` asks here for each submission.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moshi_fl.draw import Sequences, score
from moshi_fl.evidence import LARGEST_LOSS, MICRO, Outcome, Precision, Ruling

ESCALATED_QUORUM = 4
"""How many of them must agree with the anchor: 5 of 7."""
PRIVATE_CHECKS = 2
"""Private sequences of each result that the referee measures again."""

Losses = NDArray[np.int64]
Referee = Callable[[str, int], Ruling | None]
"""The losses of a submission on one sequence of the pool; None when nothing is on record."""


@dataclass(frozen=True)
class Tolerance:
    """How far results may lie apart, in micro-nats."""

    each: int
    mean: int
    proof: int
    """A claim is proven false when it lies farther than this from what the referee finds."""


TOLERANCES: Mapping[Precision, Tolerance] = {
    "float64": Tolerance(each=0, mean=0, proof=1),
    "float32": Tolerance(each=100, mean=10, proof=100),
}


# Losses and verdicts.


def quantise(losses: Iterable[float]) -> list[int]:
    """Micro-nats, rounded half to even; what is not finite or too large is ``LARGEST_LOSS``."""
    return [_quantised(float(loss)) for loss in losses]


def _quantised(loss: float) -> int:
    if not math.isfinite(loss) or loss * MICRO >= LARGEST_LOSS:
        return LARGEST_LOSS
    return max(0, round(loss * MICRO))


@dataclass(frozen=True)
class Gain:
    """Paired gains of a submission in micro-nats: mean, standard error, and what they allow."""

    mean: int
    standard_error: int
    outcome: Outcome


def gain(before: Losses, after: Losses) -> Gain:
    """What a submission is worth on the shared sequences.

    With the gains g, their sum S, V = m * sum(g^2) - S^2 and m sequences, the standard error of
    the mean is SE = sqrt(V / (m - 1)) / m. So ``mean - 1.645 SE > 0`` means S > 0 and
    1000^2 S^2 (m - 1) > 1645^2 V, all in integers.
    """
    gains = [int(b) - int(a) for b, a in zip(before, after, strict=True)]
    m, total = len(gains), sum(gains)
    spread = m * sum(g * g for g in gains) - total * total
    signal, noise = 1000**2 * total * total * (m - 1), 1645**2 * spread
    if total > 0:
        outcome: Outcome = "credit" if signal > noise else "neutral"
    else:
        outcome = "neutral" if signal < noise else "reject"
    return Gain(total // m, math.isqrt(spread // ((m - 1) * m * m)), outcome)


@dataclass(frozen=True)
class Measured:
    """What one evaluator says of one submission."""

    evaluator: str
    counts: bool
    before: Losses
    after: Losses
    private: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Sequence of the pool to the losses before and after."""
    sealing: str = ""
    """Digest of the sealing that its commitment is in."""

    def claims(self, shared: Sequence[int]) -> dict[int, tuple[int, int]]:
        """All claims: sequence of the pool to the losses before and after."""
        pairs = zip(self.before.tolist(), self.after.tolist(), strict=True)
        return dict(zip(shared, pairs, strict=True)) | dict(self.private)


def agree(a: Measured, b: Measured, tolerance: Tolerance) -> bool:
    """Whether two evaluators measured the same on the shared sequences."""
    return all(
        int(np.abs(x - y).max(initial=0)) <= tolerance.each
        and abs(int((x - y).sum())) <= tolerance.mean * len(x)
        for x, y in ((a.before, b.before), (a.after, b.after))
    )


def first_difference(a: Measured, b: Measured, tolerance: Tolerance) -> int | None:
    """Position of the first shared sequence on which one of two must be wrong provably."""
    apart = np.maximum(np.abs(a.before - b.before), np.abs(a.after - b.after)) > tolerance.proof
    return int(apart.argmax()) if apart.any() else None


@dataclass(frozen=True)
class Case:
    """All that is known of a submission when a stage is over."""

    submission: str
    stage: int
    quorum: int
    precision: Precision
    sequences: Sequences
    anchor: Measured | None
    externals: tuple[Measured, ...]


@dataclass(frozen=True)
class Decision:
    """What follows. ``outcome`` None: undecided, more evaluators are needed."""

    outcome: Outcome | None
    gain: Gain | None
    agreeing: tuple[str, ...]
    confirmed: tuple[str, ...]
    liars: tuple[str, ...]
    rulings: tuple[Ruling, ...]
    reason: str = ""


def decide(case: Case, referee: Referee) -> Decision:
    """Decide a submission: agreement, else the referee, else more evaluators, else a person.

    A wrong verdict needs the anchor: whoever does not agree with it cannot accept anything, and
    whoever contradicts the referee is struck.
    """
    if case.anchor is None:
        return Decision("disputed", None, (), (), (), (), "the hub's anchor did not measure it")
    tolerance = TOLERANCES[case.precision]
    rulings = _rulings(case, case.anchor, tolerance, referee)
    everybody = (case.anchor, *case.externals)
    liars = {m.evaluator for m in everybody if _lies(m, case, rulings, tolerance)}
    kept = tuple(r for r in rulings if any(_lies(m, case, [r], tolerance) for m in everybody))
    matching = [
        m for m in case.externals if m.evaluator not in liars and agree(m, case.anchor, tolerance)
    ]
    found = gain(case.anchor.before, case.anchor.after)
    outcome, reason = _outcome(case, matching, liars, found)
    settled = outcome not in {None, "disputed"}
    return Decision(
        outcome,
        found,
        tuple(sorted(m.evaluator for m in matching if m.counts)) if settled else (),
        tuple(sorted(m.evaluator for m in matching)) if settled else (),
        tuple(sorted(liars)),
        kept,
        reason,
    )


def _outcome(
    case: Case, matching: Sequence[Measured], liars: set[str], found: Gain
) -> tuple[Outcome | None, str]:
    assert case.anchor is not None
    if case.anchor.evaluator in liars:
        return "disputed", "the referee contradicts the hub's anchor"
    counting = [m for m in case.externals if m.counts]
    struck = sum(m.evaluator in liars for m in counting)
    agreeing = sum(m.counts for m in matching)
    unresolved = len(counting) - struck - agreeing
    if not unresolved and agreeing and agreeing + struck >= case.quorum and case.stage == 1:
        return found.outcome, ""
    needed = ESCALATED_QUORUM if struck or unresolved else case.quorum
    if case.stage > 1 and agreeing >= needed:
        return found.outcome, ""
    reason = (
        f"{agreeing} of {len(counting)} evaluators agree with the anchor, {struck} proven to lie; "
        f"{case.quorum if case.stage == 1 else needed} must agree"
    )
    return None if case.stage == 1 else "disputed", reason


def _rulings(case: Case, anchor: Measured, tolerance: Tolerance, referee: Referee) -> list[Ruling]:
    """What the referee says wherever it is asked, in the order of sequences."""
    asked: set[int] = set()
    for measured in case.externals:
        place = first_difference(measured, anchor, tolerance)
        if place is not None:
            asked.add(case.sequences.shared[place])
        asked |= set(private_checks(case, measured))
    found = (referee(case.submission, sequence) for sequence in sorted(asked))
    return [ruling for ruling in found if ruling is not None]


def private_checks(case: Case, measured: Measured) -> list[int]:
    """Private sequences of a result that are measured again: nobody knew which when it pledged."""
    words = ("check", measured.sealing, measured.evaluator, case.submission)
    order = sorted(measured.private, key=lambda i: score(case.sequences.seed, *words, i))
    return order[:PRIVATE_CHECKS]


def _lies(measured: Measured, case: Case, rulings: Iterable[Ruling], tolerance: Tolerance) -> bool:
    claims = measured.claims(case.sequences.shared)
    return any(
        max(abs(claims[r.sequence][0] - r.before), abs(claims[r.sequence][1] - r.after))
        > tolerance.proof
        for r in rulings
        if r.sequence in claims
    )


def merge_rulings(decisions: Iterable[Decision]) -> tuple[Ruling, ...]:
    """All rulings of a session, by submission and sequence."""
    found = itertools.chain.from_iterable(decision.rulings for decision in decisions)
    return tuple(sorted(set(found), key=lambda r: (r.submission, r.sequence)))
