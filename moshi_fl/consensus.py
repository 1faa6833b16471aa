"""How evaluators are drawn, when they agree, and what follows: pure functions, exact arithmetic.

Every decision is made on integers, so that an auditor on another machine decides the same.
``moshi_fl.evidence`` has the records, ``moshi_fl.session`` puts them in order.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moshi_fl.evidence import (
    LARGEST_LOSS,
    MICRO,
    Assignment,
    Outcome,
    Precision,
    Ruling,
    Seat,
    Submission,
)
from moshi_fl.records import dump
from moshi_fl.signing import fingerprint

ESCALATED = 6
"""External evaluators of a disputed submission, those of the first stage included: n = 7."""
ESCALATED_QUORUM = 4
"""How many of them must agree with the anchor: 5 of 7."""
PROBATION_SEATS = 2
PRIVATE_CHECKS = 2
"""Private sequences of each result that the referee measures again."""

NONCE_DOMAIN = b"moshi-fl-nonce-v1\n"
SEED_DOMAIN = b"moshi-fl-seed-v1\n"

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


def counts(pool: int, sequences: int, private: int) -> tuple[int, int]:
    """Shared and private sequences that a pool of this size has room for.

    Beside the shared ones at least twice as many are left as an evaluator gets for itself, so
    that no two evaluators get the same.
    """
    own = min(private, pool // 4)
    return min(sequences, pool - 2 * own), own


# The Merkle tree of the submissions (RFC 6962, section 2.1).


def leaf(submission: Submission) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\0" + dump(submission)).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes, in their order."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = _split(len(leaves))
    return _node(merkle_root(leaves[:split]), merkle_root(leaves[split:]))


def merkle_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """What it takes to get from a leaf to the root: hashes of siblings, from the leaf up."""
    if len(leaves) <= 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*merkle_proof(leaves[:split], index), merkle_root(leaves[split:])]
    return [*merkle_proof(leaves[split:], index - split), merkle_root(leaves[:split])]


def is_included(found: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a proof leads from a leaf at this place, of so many, to the root."""
    if not 0 <= index < size:
        return False
    sides: list[bool] = []
    while size > 1:
        split = _split(size)
        sides.append(index < split)
        index, size = (index, split) if index < split else (index - split, size - split)
    if len(sides) != len(proof):
        return False
    for is_left, sibling in zip(reversed(sides), proof, strict=True):
        found = _node(found, sibling) if is_left else _node(sibling, found)
    return found == root


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


# Seed and draw.


def nonce_commitment(key: str, nonce: str) -> str:
    """What an evaluator publishes before its nonce; bound to its key, so nobody can repeat it."""
    return hashlib.sha256(NONCE_DOMAIN + key.encode() + b"\n" + bytes.fromhex(nonce)).hexdigest()


def seed_of(closing: str, nonces: Iterable[str]) -> str:
    """``SHA-256(domain | digest of the closing | xor of the nonces)``, all in hex."""
    mixed = bytes(32)
    for nonce in nonces:
        mixed = bytes(a ^ b for a, b in zip(mixed, bytes.fromhex(nonce), strict=True))
    return hashlib.sha256(SEED_DOMAIN + bytes.fromhex(closing) + mixed).hexdigest()


def score(seed: str, *words: object) -> bytes:
    """HMAC-SHA-256 under the seed of words joined by ``|``: what all draws are ordered by."""
    message = "|".join(map(str, words)).encode()
    return hmac.digest(bytes.fromhex(seed), message, "sha256")


@dataclass(frozen=True)
class Sequences:
    """Which sequences of the pool a session uses."""

    pool: int
    shared: tuple[int, ...]
    seed: str
    private_count: int

    def private(self, evaluator: str) -> tuple[int, ...]:
        """An evaluator's own sequences, ascending; shared with nobody but by chance."""
        return _private(self, evaluator)


@lru_cache(maxsize=1024)
def _private(sequences: Sequences, evaluator: str) -> tuple[int, ...]:
    shared = set(sequences.shared)
    rest = [i for i in range(sequences.pool) if i not in shared]
    chosen = sorted(rest, key=lambda i: score(sequences.seed, "private", evaluator, i))
    return tuple(sorted(chosen[: sequences.private_count]))


@lru_cache(maxsize=64)
def draw_sequences(seed: str, pool: int, sequences: int, private: int) -> Sequences:
    """The sequences of a session, known to nobody before the draw."""
    order = sorted(range(pool), key=lambda i: score(seed, "shared", i))
    return Sequences(pool, tuple(sorted(order[:sequences])), seed, private)


def ranking(
    seed: str, submission: Submission, seats: Sequence[Seat], owners: Mapping[str, str]
) -> list[Seat]:
    """Who may evaluate a submission, lowest score first: of each owner one, never its own.

    ``owners``: owner of each key that has a seat, whether it takes part or not.
    """
    own = {owners.get(submission.key), fingerprint(submission.key)}
    ordered = sorted(seats, key=lambda seat: score(seed, "assign", submission.id, seat.id))
    taken: set[str] = set()
    found = []
    for seat in ordered:
        if seat.key != submission.key and seat.owner not in own | taken:
            taken.add(seat.owner)
            found.append(seat)
    return found


def assign(
    seed: str,
    submission: Submission,
    seats: Sequence[Seat],
    owners: Mapping[str, str],
    *,
    quorum: int,
    stage: int,
) -> Assignment:
    """Who evaluates a submission in a stage; ``seats`` are those who revealed their nonces."""
    counting = ranking(seed, submission, [seat for seat in seats if seat.counts], owners)
    chosen = counting[:quorum] if stage == 1 else counting[quorum:ESCALATED]
    learning = ranking(seed, submission, [seat for seat in seats if not seat.counts], owners)
    learning = [] if stage > 1 else learning[:PROBATION_SEATS]
    return Assignment(
        submission=submission.id,
        evaluators=tuple(seat.id for seat in chosen),
        probation=tuple(seat.id for seat in learning),
    )


# Agreement and decision.


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
