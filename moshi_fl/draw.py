"""How a session's evaluators and sequences are drawn: by a seed that nobody knows beforehand.

Pure functions of bytes, so that an auditor on another machine draws the same.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moshi_fl.evidence import Assignment, Seat, Submission
from moshi_fl.signing import fingerprint

ESCALATED = 6
"""External evaluators of a disputed submission, those of the first stage included: n = 7."""
PROBATION_SEATS = 2

NONCE_DOMAIN = b"moshi-fl-nonce-v1\n"
SEED_DOMAIN = b"moshi-fl-seed-v1\n"


def counts(pool: int, sequences: int, private: int) -> tuple[int, int]:
    """Shared and private sequences that a pool of this size has room for.

    Beside the shared ones at least twice as many are left as an evaluator gets for itself, so
    that no two evaluators get the same.
    """
    own = min(private, pool // 4)
    return min(sequences, pool - 2 * own), own


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
