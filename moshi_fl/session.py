"""An evaluation session as its records tell it: read, and checked against one another.

A *board* maps the name of a step (``opening``, ``nonce/ID``, ``sealing/1``…) to a signed record;
wherever it lies. What the hub says must be right, or the session is refused. What an evaluator says
must be right, or it does not count: late, unsigned, altered or malformed records are passed over,
and ``Session.ignored`` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

from moshi_fl.draw import Sequences, assign, draw_sequences, nonce_commitment, seed_of
from moshi_fl.errors import CorruptRecord, UntrustedHub
from moshi_fl.evidence import (
    MAX_ATTESTATION_BYTES,
    Assignment,
    Attestation,
    AttestationCommitment,
    Closing,
    Draw,
    NonceCommitment,
    NonceReveal,
    Opening,
    Sealing,
    Seat,
    Submission,
    Verdicts,
    evaluator_id,
)
from moshi_fl.history import signature_beside
from moshi_fl.merkle import leaf, merkle_root
from moshi_fl.records import Record, digest, load
from moshi_fl.signing import ATTESTATION_NAMESPACE, EVALUATION_NAMESPACE, verify_signature

MAX_STEP_BYTES = 4 << 20
STAGES = (1, 2)

R = TypeVar("R", bound=Record)
E = TypeVar("E", NonceCommitment, NonceReveal, AttestationCommitment, Attestation)


@dataclass(frozen=True)
class Signed:
    """A record as it was found, and its signature."""

    record: bytes
    signature: str


Board = Mapping[str, Signed]


def evidence_file(name: str) -> str:
    """Name of a step's record among the files of the evidence; its signature ends in ``.sig``."""
    return name.replace("/", "-") + ".json"


def evidence_files(board: Board) -> dict[str, bytes]:
    """All records and signatures of a board as files."""
    files = {}
    for name, signed in sorted(board.items()):
        path = evidence_file(name)
        files[path] = signed.record
        files[signature_beside(path)] = signed.signature.encode()
    return files


def board_of(files: Mapping[str, bytes]) -> dict[str, Signed]:
    """The board that evidence was made of."""
    board = {}
    for path, data in files.items():
        signature = files.get(signature_beside(path))
        if path.endswith(".json") and signature is not None:
            name = path.removesuffix(".json").replace("-", "/")
            board[name] = Signed(data, signature.decode("ascii", "replace"))
    return board


@dataclass
class Session:
    """What a board says, as far as it has been checked."""

    opening: Opening
    commitments: dict[str, NonceCommitment] = field(default_factory=dict)
    closing: Closing | None = None
    reveals: dict[str, NonceReveal] = field(default_factory=dict)
    draws: dict[int, Draw] = field(default_factory=dict)
    pledges: dict[int, dict[str, AttestationCommitment]] = field(default_factory=dict)
    sealings: dict[int, Sealing] = field(default_factory=dict)
    attestations: dict[int, dict[str, Attestation]] = field(default_factory=dict)
    verdicts: Verdicts | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    """Names of evaluators' records that do not count, and why."""

    @property
    def anchor(self) -> str:
        """Evaluator id of the hub's anchor."""
        return evaluator_id(self.opening.anchor)

    @cached_property
    def seats(self) -> dict[str, Seat]:
        """Those who may take part, by id; the anchor is not among them."""
        return {seat.id: seat for seat in self.opening.seats if seat.key != self.opening.anchor}

    def key_of(self, evaluator: str) -> str | None:
        """Public key of somebody who may take part, the anchor included."""
        if evaluator == self.anchor:
            return self.opening.anchor
        seat = self.seats.get(evaluator)
        return seat.key if seat else None

    @property
    def stage(self) -> int:
        """The newest stage that was drawn; 0 before."""
        return max(self.draws, default=0)

    @property
    def seed(self) -> str:
        """Seed of all draws."""
        return self.draws[1].seed

    @property
    def sequences(self) -> Sequences:
        """The sequences that are measured."""
        opening = self.opening
        return draw_sequences(
            self.seed, opening.pool_sequences, opening.sequences, opening.private_sequences
        )

    def sealed(self, stage: int) -> set[str]:
        """Evaluators whose attestation commitment was in time."""
        if stage not in self.sealings:
            return set()
        wanted = set(self.sealings[stage].commitments)
        return {who for who, pledge in self.pledges[stage].items() if digest(pledge) in wanted}

    def assigned(self, stage: int, evaluator: str) -> list[str]:
        """Submissions that an evaluator measures in a stage."""
        draw = self.draws[stage]
        if evaluator == self.anchor:
            return [entry.submission for entry in draw.assignments] if stage == 1 else []
        return [
            entry.submission
            for entry in draw.assignments
            if evaluator in entry.evaluators or evaluator in entry.probation
        ]

    def expected(self, stage: int) -> set[str]:
        """Evaluators who have something to measure in a stage."""
        return {who for who in self.reveals if self.assigned(stage, who)}


# Reading.


def read_session(board: Board, *, opening: Opening | None = None) -> Session:
    """Read a board and check all of it.

    Args:
        board: The records.
        opening: The opening, when it has been checked already; else the board's is, and whether
            its anchor is the hub's is for the caller to compare.

    Raises:
        UntrustedHub: A record of the hub contradicts the others, or is not signed by its anchor.
    """
    found = opening or _hub_record(board, "opening", Opening, None)
    if found is None:
        raise UntrustedHub("the evaluation has no opening.")
    session = Session(found)
    _read_draw(board, session)
    for stage in STAGES:
        if stage in session.draws:
            _read_stage(board, session, stage)
    verdicts = _hub_record(board, "verdicts", Verdicts, session.opening.anchor)
    if verdicts and verdicts.opening != digest(session.opening):
        raise broken("verdicts", "they are those of another session")
    session.verdicts = verdicts
    return session


def _read_draw(board: Board, session: Session) -> None:
    opening = session.opening
    commitments = _theirs(board, session, "commitment", NonceCommitment)
    session.commitments = _following(session, commitments, "opening", digest(opening))
    closing = _hub_record(board, "closing", Closing, opening.anchor)
    if closing is None:
        return
    _check_closing(closing, opening)
    session.closing = closing
    in_time = set(closing.commitments)
    session.commitments = {
        who: entry for who, entry in session.commitments.items() if digest(entry) in in_time
    }
    if len(session.commitments) < len(in_time):
        raise broken("closing", "it names a commitment that is not there")
    reveals = _theirs(board, session, "nonce", NonceReveal)
    for who, entry in _following(session, reveals, "closing", digest(closing)).items():
        commitment = session.commitments.get(who)
        if commitment is None:
            session.ignored[f"nonce/{who}"] = "its commitment came too late, or not at all"
        elif nonce_commitment(entry.key, entry.nonce) != commitment.commitment:
            session.ignored[f"nonce/{who}"] = "it does not open the commitment"
        else:
            session.reveals[who] = entry
    for stage in STAGES:
        draw = _hub_record(board, f"draw/{stage}", Draw, opening.anchor)
        if draw is None:
            return
        _check_draw(session, draw, stage)
        session.draws[stage] = draw


def _check_closing(closing: Closing, opening: Opening) -> None:
    if closing.opening != digest(opening):
        raise broken("closing", "it closes another session")
    ids = [submission.id for submission in closing.submissions]
    if ids != sorted(set(ids)):
        raise broken("closing", "its submissions are not in order")
    if merkle_root([leaf(entry) for entry in closing.submissions]).hex() != closing.root:
        raise broken("closing", "its root is not that of its submissions")


def _check_draw(session: Session, draw: Draw, stage: int) -> None:
    closing = session.closing
    if closing is None or draw.closing != digest(closing) or draw.stage != stage:
        raise broken(f"draw/{stage}", "it belongs to another session or stage")
    revealed = {digest(entry): who for who, entry in session.reveals.items()}
    if set(draw.reveals) - set(revealed):
        raise broken(f"draw/{stage}", "it counts a nonce that is not there")
    if stage > 1 and draw.reveals != session.draws[1].reveals:
        raise broken(f"draw/{stage}", "its nonces are not those of the first")
    who = sorted(revealed[entry] for entry in draw.reveals)
    session.reveals = {name: session.reveals[name] for name in who}
    if draw.seed != draw_seed(closing, session.reveals):
        raise broken(f"draw/{stage}", "its seed does not follow from the nonces")
    wanted = {entry.submission for entry in draw.assignments}
    chosen = [entry for entry in closing.submissions if stage == 1 or entry.id in wanted]
    if draw.assignments != draw_assignments(session, draw.seed, chosen, stage):
        raise broken(f"draw/{stage}", "its assignments do not follow from the seed")


def draw_seed(closing: Closing, reveals: Mapping[str, NonceReveal]) -> str:
    """Seed of a session, from the closing and the nonces that were revealed."""
    return seed_of(digest(closing), (entry.nonce for entry in reveals.values()))


def draw_assignments(
    session: Session, seed: str, submissions: Iterable[Submission], stage: int
) -> tuple[Assignment, ...]:
    """Who evaluates what: only those who revealed their nonces."""
    seats = [seat for who, seat in session.seats.items() if who in session.reveals]
    owners = {seat.key: seat.owner for seat in session.seats.values()}
    quorum = session.opening.quorum
    return tuple(
        assign(seed, entry, seats, owners, quorum=quorum, stage=stage) for entry in submissions
    )


def _read_stage(board: Board, session: Session, stage: int) -> None:
    draw = digest(session.draws[stage])
    pledges = _theirs(board, session, f"pledge/{stage}", AttestationCommitment)
    session.pledges[stage] = _following(session, pledges, "draw", draw)
    session.attestations[stage] = {}
    sealing = _hub_record(board, f"sealing/{stage}", Sealing, session.opening.anchor)
    if sealing is None:
        return
    if sealing.draw != draw:
        raise broken(f"sealing/{stage}", "it seals another draw")
    session.sealings[stage] = sealing
    sealed = session.sealed(stage)
    if len(sealed) < len(set(sealing.commitments)):
        raise broken(f"sealing/{stage}", "it names a commitment that is not there")
    found = _theirs(board, session, f"attestation/{stage}", Attestation)
    for who, entry in _following(session, found, "draw", draw).items():
        name = f"attestation/{stage}/{who}"
        if who not in sealed:
            session.ignored[name] = "its commitment came too late, or not at all"
        elif digest(entry) != session.pledges[stage][who].attestation:
            session.ignored[name] = "it is not what was committed to"
        else:
            session.attestations[stage][who] = entry


def _hub_record(board: Board, name: str, kind: type[R], anchor: str | None) -> R | None:
    signed = board.get(name)
    if signed is None:
        return None
    try:
        record = load(signed.record, kind, name=name, limit=MAX_STEP_BYTES)
        key = anchor or str(getattr(record, "anchor", ""))
        _verify(signed, key, EVALUATION_NAMESPACE)
    except CorruptRecord as error:
        raise broken(name, str(error).rstrip(".")) from error
    return record


@lru_cache(maxsize=4096)
def _verify(signed: Signed, key: str, namespace: str) -> None:
    """Each signature costs a process; what was right stays right."""
    verify_signature(signed.record, signed.signature, key, namespace)


def _theirs(board: Board, session: Session, folder: str, kind: type[E]) -> dict[str, E]:
    """Evaluators' records in a folder of the board, by evaluator; those that are none are noted."""
    found = {}
    for name in sorted(board):
        place, _, who = name.rpartition("/")
        if place != folder:
            continue
        try:
            found[who] = _their_record(board[name], session, name, who, kind)
        except CorruptRecord as error:
            session.ignored[name] = str(error)
    return found


def _their_record(signed: Signed, session: Session, name: str, who: str, kind: type[E]) -> E:
    key = session.key_of(who)
    if key is None:
        raise CorruptRecord(f"{name}: there is no seat for this evaluator.")
    record = load(signed.record, kind, name=name, limit=MAX_ATTESTATION_BYTES)
    if record.key != key:
        raise CorruptRecord(f"{name}: it names another key.")
    _verify(signed, key, ATTESTATION_NAMESPACE)
    return record


def _following(session: Session, found: dict[str, E], link: str, wanted: str) -> dict[str, E]:
    """Those that name the record of the hub that they must follow."""
    kept = {who: entry for who, entry in found.items() if getattr(entry, link) == wanted}
    for who in found.keys() - kept.keys():
        session.ignored[f"{type(found[who]).__name__} of {who}"] = f"it follows another {link}"
    return kept


def broken(name: str, what: str) -> UntrustedHub:
    """What the hub says of a step is not so."""
    return UntrustedHub(f"the hub's evaluation contradicts itself: {name}: {what}.")
