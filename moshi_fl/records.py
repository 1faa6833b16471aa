"""The records of a hub: frozen structs whose canonical JSON bytes are hashed and compared.

Unknown fields, wrong types and non-finite numbers are refused on decoding, with a path such as
``$.delta.bytes``. ``load`` also demands that encoding the result gives the same bytes again, which
settles key order, spacing and duplicate keys: one record has exactly one spelling.
``format`` changes whenever a meaning changes.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from moshi_fl.errors import CorruptRecord

MAX_RECORD_BYTES = 1 << 20
MAX_SAID = 500  # characters of what is wrong with a record

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Oid = Annotated[str, Meta(pattern=r"\A([0-9a-f]{40}|[0-9a-f]{64})\Z")]
RefName = Annotated[str, Meta(pattern=r"\Arefs/[A-Za-z0-9][A-Za-z0-9._/-]*\Z", max_length=200)]
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
HubId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
ContributionId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Name = Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9_-]*\Z", max_length=40)]
Text = Annotated[str, Meta(max_length=200)]
PublicKey = Annotated[
    str,
    Meta(
        pattern=r"\A(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)|sk-ssh-ed25519@openssh\.com"
        r"|sk-ecdsa-sha2-nistp256@openssh\.com) [A-Za-z0-9+/]+={0,2}\Z",
        max_length=1500,
    ),
]
Count = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
RoundNumber = Annotated[int, Meta(ge=0, le=999_999_999)]
Scalar = bool | int | float | str


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, keyword-only, strict."""


class File(Record, frozen=True, kw_only=True):
    """One file of an orphan commit: its name in the tree, size and content hash."""

    name: FileName
    bytes: Count
    sha256: Sha256


class Location(Record, frozen=True, kw_only=True):
    """Where weights lie: a ref, the commit it must point to, and the files of its tree."""

    ref: RefName
    commit: Oid
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


class Training(Record, frozen=True, kw_only=True):
    """How a contribution was trained, as its contributor states it."""

    steps: Count
    batch_size: Count
    learning_rate: float
    seed: Count
    precision: Name


class Metrics(Record, frozen=True, kw_only=True):
    """Losses in nats per token as measured on the contributor's own data; never trusted."""

    held_out_before: float | None = None
    held_out_after: float | None = None


class Privacy(Record, frozen=True, kw_only=True):
    """Differential privacy of a contribution, as its contributor states it; never trusted.

    ``epsilon`` is of this contribution alone, at ``delta``; ``unit`` is what it protects.
    """

    mechanism: Name
    noise_multiplier: Annotated[float, Meta(gt=0)]
    max_gradient_norm: Annotated[float, Meta(gt=0)]
    sample_rate: Annotated[float, Meta(gt=0, le=1)]
    steps: Count
    delta: Annotated[float, Meta(gt=0, lt=1)]
    epsilon: Annotated[float, Meta(ge=0)]
    accountant: Name
    unit: Name


class Contribution(Record, frozen=True, kw_only=True):
    """One contributor's update: a small text; the delta lies beside it on its own ref."""

    format: Literal[1] = 1
    kind: Literal["contribution"] = "contribution"
    hub: HubId
    round: RoundNumber
    base: Sha256
    family: Name
    codec: Name
    contributor: Text
    key: PublicKey
    delta: Location
    num_examples: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    training: Training
    metrics: Metrics = Metrics()
    privacy: Privacy | None = None
    proposed_characters: Annotated[str, Meta(max_length=1000)] = ""
    rebased_from: RoundNumber | None = None
    software: Text

    @property
    def id(self) -> str:
        """The contribution id: content-addressed, so nobody can take another's id."""
        return digest(self)[:32]


class Merged(Record, frozen=True, kw_only=True):
    """A contribution's place in a round: who, on which base, with which integer weight.

    ``owner``: who stands behind it; an owner counts once, and never for more than a fair share.
    ``missing_rows``: rows of the vocabulary tensors that were appended after its base.
    """

    id: ContributionId
    owner: Text
    base_round: RoundNumber
    weight: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    missing_rows: Count = 0


class Strategy(Record, frozen=True, kw_only=True):
    """Name and options of the aggregation that made a round."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z][A-Za-z0-9_:-]*\Z", max_length=60)]
    options: dict[str, Scalar] = {}
    server_learning_rate: float = 1.0


class Weighting(Record, frozen=True, kw_only=True):
    """How a round turned claims into weights, so that an auditor can do it again.

    ``rule``: ``equal`` weighs contributions of one age alike, ``examples`` by what they claim.
    ``min_owners``: no owner has more than one share of so many, or of all where there are fewer.
    """

    rule: Literal["equal", "examples"] = "equal"
    min_owners: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    max_examples: Annotated[int, Meta(ge=1)] = 100_000
    staleness_discount: Annotated[float, Meta(ge=0, le=1)] = 0.5


class Update(Record, frozen=True, kw_only=True):
    """What leads from the round before to this one.

    ``deltas``: the accepted contributions themselves, aggregated again by whoever applies them.
    ``step``: the aggregated step, losslessly compressed; smaller when there are many contributions.
    """

    kind: Literal["deltas", "step"]
    location: Location
    codec: Name
    codec_options: dict[str, Scalar] = {}


class Growth(Record, frozen=True, kw_only=True):
    """Characters appended to the vocabulary in a round; each adds a row to the vocabulary tensors.

    A new row starts as the mean of the rows of the character's UTF-8 bytes, which begin at
    ``byte_row``.
    """

    characters: Annotated[str, Meta(min_length=1, max_length=100_000)]
    byte_row: Count


class Evaluation(Record, frozen=True, kw_only=True):
    """Held-out loss in nats per token before and after a round, on the hub's own sequences."""

    before: float
    after: float
    sequences: Annotated[int, Meta(ge=1)]
    pool: Sha256


class Round(Record, frozen=True, kw_only=True):
    """One published state of the global model, chained to the one before by ``previous``.

    ``median_norm``: of the deltas, in a round of a strategy that goes by the norms of earlier ones.
    """

    format: Literal[1] = 1
    kind: Literal["round"] = "round"
    hub: HubId
    round: RoundNumber
    previous: Sha256 | None
    weights: Sha256
    parameters: Count
    tokenizer: Sha256
    vocabulary_tensors: tuple[str, ...] = ()
    keyframe: Location | None = None
    update: Update | None = None
    archive: Location | None = None
    strategy: Strategy | None = None
    weighting: Weighting = Weighting()
    contributions: tuple[Merged, ...] = ()
    median_norm: Annotated[float, Meta(ge=0)] | None = None
    growth: Growth | None = None
    evaluation: Evaluation | None = None
    verdicts: Sha256 | None = None
    ledger: Sha256 | None = None
    created: Annotated[str, Meta(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
    software: Text


class Manifest(Record, frozen=True, kw_only=True):
    """What a client fetches first: the newest rounds, from a keyframe on, oldest first."""

    format: Literal[1] = 1
    kind: Literal["manifest"] = "manifest"
    hub: HubId
    rounds: Annotated[tuple[Round, ...], Meta(min_length=1)]

    @property
    def newest(self) -> Round:
        """The round that is the current global model."""
        return self.rounds[-1]


class Intake(Record, frozen=True, kw_only=True):
    """Open contributions in the order in which whoever merges first saw them."""

    format: Literal[1] = 1
    kind: Literal["intake"] = "intake"
    hub: HubId
    seen: Annotated[tuple[ContributionId, ...], Meta(max_length=20_000)]


R = TypeVar("R", bound=Record)
_encoder = msgspec.json.Encoder(order="sorted")


def dump(record: Record) -> bytes:
    """Canonical bytes: sorted keys, two spaces of indentation for reviewers, one final newline."""
    return msgspec.json.format(_encoder.encode(record), indent=2) + b"\n"


def load(data: bytes, kind: type[R], *, name: str, limit: int = MAX_RECORD_BYTES) -> R:
    """Decode a record and insist on its canonical spelling.

    Args:
        data: Bytes from anywhere; hostile until this returns.
        kind: The struct they claim to be.
        name: What to call them in an error.
        limit: Longest accepted input in bytes.

    Raises:
        CorruptRecord: Too long, not JSON, not of this kind, or spelled differently.
    """
    if len(data) > limit:
        raise CorruptRecord(f"{name}: {len(data)} bytes, the limit for a record is {limit}.")
    try:
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = str(error)[:MAX_SAID]  # it quotes keys of the record, however long they are
        raise CorruptRecord(f"{name}: {said}.") from error
    if dump(record) != data:
        raise CorruptRecord(
            f"{name}: not in canonical form (key order, spacing or a repeated key)."
        )
    return record


def digest(record: Record) -> str:
    """SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(dump(record)).hexdigest()
