"""The records of an evaluation: what the hub and the evaluators say, in the order they say it.

The hub *opens* a session; evaluators commit to nonces; the hub *closes* it over the submissions;
nonces are revealed; the hub *draws* who evaluates what; evaluators pledge results, the hub *seals*
the pledges, and the results are revealed; the hub states the *verdicts*. Each record is signed and
names the one before it by digest. ``moshi_fl.consensus`` has the arithmetic.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from moshi_fl.errors import CorruptRecord
from moshi_fl.records import (
    ContributionId,
    Count,
    HubId,
    Location,
    PublicKey,
    Record,
    RoundNumber,
    Sha256,
    Text,
)

MAX_ATTESTATION_BYTES = 8 << 20
MICRO = 1_000_000  # micro-nats, which losses and gains are recorded in, in a nat
LARGEST_LOSS = (1 << 31) - 1  # micro-nats; also what stands for a loss that is not finite
MAX_SEATS = 1000

EvaluatorId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Numbers = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9+/]*={0,2}\Z", max_length=1 << 17)]
"""Losses in micro-nats: base64 of little-endian 32-bit integers."""
Moment = Annotated[str, Meta(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
Precision = Literal["float64", "float32"]
Mode = Literal["local", "appointed"]
Stage = Annotated[int, Meta(ge=1, le=2)]
Outcome = Literal["credit", "neutral", "reject", "disputed"]


class Evaluator(Record, frozen=True, kw_only=True):
    """Somebody who may evaluate, as a maintainer appointed them."""

    key: PublicKey
    owner: Text
    vouched: bool = False
    revoked: bool = False
    since: RoundNumber = 0

    @property
    def id(self) -> str:
        """The evaluator id."""
        return evaluator_id(self.key)


class Evaluators(Record, frozen=True, kw_only=True):
    """Who evaluates for a hub. The last of ``anchors`` is the hub's own key; others were before."""

    format: Literal[1] = 1
    kind: Literal["evaluators"] = "evaluators"
    hub: HubId
    anchors: Annotated[tuple[PublicKey, ...], Meta(min_length=1, max_length=100)]
    evaluators: Annotated[tuple[Evaluator, ...], Meta(max_length=MAX_SEATS)] = ()


class Seat(Record, frozen=True, kw_only=True):
    """One who may take part in a session; ``counts`` is false on probation."""

    key: PublicKey
    owner: Text
    counts: bool

    @property
    def id(self) -> str:
        """The evaluator id."""
        return evaluator_id(self.key)


class Opening(Record, frozen=True, kw_only=True):
    """The hub opens the evaluation of what shall become a round."""

    format: Literal[1] = 1
    kind: Literal["opening"] = "opening"
    hub: HubId
    round: RoundNumber
    previous: Sha256
    mode: Mode
    anchor: PublicKey
    seats: Annotated[tuple[Seat, ...], Meta(max_length=MAX_SEATS)]
    pool: Sha256
    pool_sequences: Annotated[int, Meta(ge=2, le=10_000)]
    sequences: Annotated[int, Meta(ge=2, le=10_000)]
    private_sequences: Annotated[int, Meta(ge=0, le=10_000)]
    precision: Precision
    share: Annotated[float, Meta(gt=0, le=1)]
    quorum: Annotated[int, Meta(ge=1, le=6)]
    hours: Annotated[float, Meta(gt=0, le=10_000)]
    created: Moment


class NonceCommitment(Record, frozen=True, kw_only=True):
    """An evaluator takes part, and commits to a nonce that nobody knows yet."""

    format: Literal[1] = 1
    kind: Literal["nonce-commitment"] = "nonce-commitment"
    opening: Sha256
    key: PublicKey
    commitment: Sha256


class Submission(Record, frozen=True, kw_only=True):
    """A contribution that passed the gate before the session closed."""

    id: ContributionId
    record: Sha256
    key: PublicKey


class Closing(Record, frozen=True, kw_only=True):
    """The hub closes submissions and commitments; ``root`` is the submissions' Merkle root."""

    format: Literal[1] = 1
    kind: Literal["closing"] = "closing"
    opening: Sha256
    commitments: Annotated[tuple[Sha256, ...], Meta(max_length=MAX_SEATS + 1)]
    submissions: Annotated[tuple[Submission, ...], Meta(max_length=10_000)]
    root: Sha256
    created: Moment


class NonceReveal(Record, frozen=True, kw_only=True):
    """An evaluator opens its commitment."""

    format: Literal[1] = 1
    kind: Literal["nonce-reveal"] = "nonce-reveal"
    closing: Sha256
    key: PublicKey
    nonce: Sha256


class Assignment(Record, frozen=True, kw_only=True):
    """Who evaluates a submission beside the anchor, and who on probation."""

    submission: ContributionId
    evaluators: tuple[EvaluatorId, ...]
    probation: tuple[EvaluatorId, ...] = ()


class Draw(Record, frozen=True, kw_only=True):
    """The hub says what everybody can compute: the seed and the assignments of a stage."""

    format: Literal[1] = 1
    kind: Literal["draw"] = "draw"
    closing: Sha256
    stage: Stage
    reveals: Annotated[tuple[Sha256, ...], Meta(max_length=MAX_SEATS + 1)]
    seed: Sha256
    assignments: Annotated[tuple[Assignment, ...], Meta(max_length=10_000)]
    created: Moment


class BaseLosses(Record, frozen=True, kw_only=True):
    """Losses of a round that submissions build on."""

    round: RoundNumber
    shared: Numbers
    private: Numbers


class Losses(Record, frozen=True, kw_only=True):
    """Losses of a submission: those of its base plus its own delta."""

    submission: ContributionId
    base_round: RoundNumber
    shared: Numbers
    private: Numbers


class Attestation(Record, frozen=True, kw_only=True):
    """What an evaluator measured in a stage, in the order of ids."""

    format: Literal[1] = 1
    kind: Literal["attestation"] = "attestation"
    draw: Sha256
    key: PublicKey
    bases: Annotated[tuple[BaseLosses, ...], Meta(max_length=100)]
    results: Annotated[tuple[Losses, ...], Meta(max_length=10_000)]


class AttestationCommitment(Record, frozen=True, kw_only=True):
    """An evaluator binds itself to an attestation before anybody has seen one."""

    format: Literal[1] = 1
    kind: Literal["attestation-commitment"] = "attestation-commitment"
    draw: Sha256
    key: PublicKey
    attestation: Sha256


class Sealing(Record, frozen=True, kw_only=True):
    """The hub closes the set of commitments; only now attestations are revealed."""

    format: Literal[1] = 1
    kind: Literal["sealing"] = "sealing"
    draw: Sha256
    commitments: Annotated[tuple[Sha256, ...], Meta(max_length=MAX_SEATS + 1)]
    created: Moment


class Ruling(Record, frozen=True, kw_only=True):
    """What the referee found for one sequence: losses in micro-nats."""

    submission: ContributionId
    sequence: Count
    before: Count
    after: Count


class Judged(Record, frozen=True, kw_only=True):
    """A submission's verdict. ``gain`` and ``standard_error``: micro-nats per token."""

    submission: ContributionId
    outcome: Outcome
    gain: int
    standard_error: Count
    attesters: tuple[EvaluatorId, ...]
    reason: Annotated[str, Meta(max_length=500)] = ""


class Tally(Record, frozen=True, kw_only=True):
    """What a session says about an evaluator: confirmed verdicts, and proven lies."""

    key: PublicKey
    confirmed: Count
    lies: Count


class Verdicts(Record, frozen=True, kw_only=True):
    """The hub's verdicts. All of it follows from the evidence and the rulings."""

    format: Literal[1] = 1
    kind: Literal["verdicts"] = "verdicts"
    hub: HubId
    round: RoundNumber
    opening: Sha256
    mode: Mode
    anchor: PublicKey
    judged: Annotated[tuple[Judged, ...], Meta(max_length=10_000)]
    rulings: Annotated[tuple[Ruling, ...], Meta(max_length=100_000)]
    tallies: Annotated[tuple[Tally, ...], Meta(max_length=MAX_SEATS)]
    evidence: Location


class Credit(Record, frozen=True, kw_only=True):
    """What a contribution brought. ``credit``: its gain where the verdict gives credit, else 0."""

    contribution: ContributionId
    key: PublicKey
    outcome: Literal["credit", "neutral", "unmeasured", "by-maintainer"]
    gain: int
    standard_error: Count
    credit: Count
    weight: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]


class Ledger(Record, frozen=True, kw_only=True):
    """The credit of a round, chained to the ledger before it."""

    format: Literal[1] = 1
    kind: Literal["ledger"] = "ledger"
    hub: HubId
    round: RoundNumber
    previous: Sha256 | None
    entries: tuple[Credit, ...]


def evaluator_id(key: str) -> str:
    """First 32 digits of the SHA-256 of the public key's text."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def pack(losses: Iterable[int] | NDArray[np.int64]) -> str:
    """Losses in micro-nats as records carry them."""
    array = np.asarray(list(losses), np.int64)
    if array.size and (array.min() < 0 or array.max() > LARGEST_LOSS):
        raise ValueError("a loss in micro-nats lies between 0 and 2^31 - 1")
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def unpack(text: str, count: int, *, name: str) -> NDArray[np.int64]:
    """Losses of a record.

    Raises:
        CorruptRecord: Not that many, not canonical base64, or a negative one.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CorruptRecord(f"{name}: not base64.") from error
    if len(data) != 4 * count or base64.b64encode(data).decode() != text:
        raise CorruptRecord(f"{name}: not {count} numbers.")
    found = np.frombuffer(data, "<i4").astype(np.int64)
    if found.size and found.min() < 0:
        raise CorruptRecord(f"{name}: a loss is negative.")
    return found
