"""What follows from a session's records: a decision for each submission, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moshi_fl.consensus import Case, Decision, Measured, Referee, decide, merge_rulings
from moshi_fl.draw import Sequences
from moshi_fl.errors import CorruptRecord
from moshi_fl.evidence import Attestation, Judged, Ruling, Submission, Tally, Verdicts, unpack
from moshi_fl.records import Location, digest
from moshi_fl.session import Board, Session, broken, draw_assignments, read_session


def measurements(session: Session, submission: str) -> dict[str, Measured]:
    """What each evaluator says of a submission, over all stages; unusable results count as none."""
    found = {}
    sequences = session.sequences
    for stage, attestations in session.attestations.items():
        for who, entry in attestations.items():
            if submission not in session.assigned(stage, who):
                continue
            try:
                measured = _measured(session, sequences, stage, who, entry, submission)
            except CorruptRecord as error:
                session.ignored[f"attestation/{stage}/{who}"] = str(error)
                continue
            if measured:
                found[who] = measured
    return found


def _measured(
    session: Session,
    sequences: Sequences,
    stage: int,
    who: str,
    entry: Attestation,
    submission: str,
) -> Measured | None:
    result = next((r for r in entry.results if r.submission == submission), None)
    if result is None:
        return None
    base = next((b for b in entry.bases if b.round == result.base_round), None)
    if base is None:
        raise CorruptRecord(f"there are no losses of round {result.base_round}.")
    shared, own = len(sequences.shared), sequences.private(who)
    name = f"attestation of {who}"
    before = unpack(base.private, len(own), name=name).tolist()
    after = unpack(result.private, len(own), name=name).tolist()
    return Measured(
        evaluator=who,
        counts=who in session.seats and session.seats[who].counts,
        before=unpack(base.shared, shared, name=name),
        after=unpack(result.shared, shared, name=name),
        private=dict(zip(own, zip(before, after, strict=True), strict=True)),
        sealing=digest(session.sealings[stage]),
    )


def case_of(session: Session, submission: str) -> Case:
    """A submission as it stands after the newest stage that concerned it."""
    found = measurements(session, submission)
    stage = max(
        (
            n
            for n, d in session.draws.items()
            if any(a.submission == submission for a in d.assignments)
        ),
        default=1,
    )
    return Case(
        submission=submission,
        stage=stage,
        quorum=session.opening.quorum,
        precision=session.opening.precision,
        sequences=session.sequences,
        anchor=found.pop(session.anchor, None),
        externals=tuple(found[who] for who in sorted(found)),
    )


def decide_all(session: Session, referee: Referee) -> dict[str, Decision]:
    """A decision for each submission, by id."""
    assert session.closing is not None
    return {
        entry.id: decide(case_of(session, entry.id), referee)
        for entry in session.closing.submissions
    }


def to_escalate(session: Session, decisions: Mapping[str, Decision]) -> list[Submission]:
    """Undecided submissions for which more evaluators can be drawn."""
    assert session.closing is not None
    if session.stage != 1:
        return []
    undecided = [s for s in session.closing.submissions if decisions[s.id].outcome is None]
    drawn = draw_assignments(session, session.seed, undecided, 2)
    return [s for s, entry in zip(undecided, drawn, strict=True) if entry.evaluators]


def verdicts_of(
    session: Session, decisions: Mapping[str, Decision], evidence: Location
) -> Verdicts:
    """The record that ends a session; what is undecided now is for the maintainer to decide."""
    opening = session.opening
    return Verdicts(
        hub=opening.hub,
        round=opening.round,
        opening=digest(opening),
        mode=opening.mode,
        anchor=opening.anchor,
        judged=tuple(_judged(name, decisions[name]) for name in sorted(decisions)),
        rulings=merge_rulings(decisions.values()),
        tallies=_tallies(session, list(decisions.values())),
        evidence=evidence,
    )


def _judged(submission: str, decision: Decision) -> Judged:
    return Judged(
        submission=submission,
        outcome=decision.outcome or "disputed",
        gain=decision.gain.mean if decision.gain else 0,
        standard_error=decision.gain.standard_error if decision.gain else 0,
        attesters=decision.agreeing,
        reason=decision.reason,
    )


def _tallies(session: Session, decisions: Sequence[Decision]) -> tuple[Tally, ...]:
    """For each evaluator: verdicts that confirm it; a session with a proven lie confirms none."""
    found = []
    for who, seat in sorted(session.seats.items()):
        lied = any(who in decision.liars for decision in decisions)
        confirmed = 0 if lied else sum(who in decision.confirmed for decision in decisions)
        if lied or confirmed:
            found.append(Tally(key=seat.key, confirmed=confirmed, lies=int(lied)))
    return tuple(found)


def recorded_referee(rulings: Iterable[Ruling]) -> Referee:
    """The referee as the verdicts recorded it."""
    known = {(ruling.submission, ruling.sequence): ruling for ruling in rulings}
    return lambda submission, sequence: known.get((submission, sequence))


def check_verdicts(verdicts: Verdicts, board: Board) -> Session:
    """Derive verdicts again from their evidence.

    Nothing here needs the sealed pool: only the referee's rulings are taken as recorded. Whoever
    has the pool, once it is published, can measure those too.

    Raises:
        UntrustedHub: The evidence is not that of these verdicts, or gives others.
    """
    session = read_session({name: entry for name, entry in board.items() if name != "verdicts"})
    if session.opening.anchor != verdicts.anchor:
        raise broken("verdicts", "the evidence has another anchor")
    if session.closing is None or 1 not in session.sealings:
        raise broken("verdicts", "the evidence is that of an unfinished session")
    decisions = decide_all(session, recorded_referee(verdicts.rulings))
    if to_escalate(session, decisions):
        raise broken("verdicts", "more evaluators could have been drawn for a disputed submission")
    if verdicts_of(session, decisions, verdicts.evidence) != verdicts:
        raise broken("verdicts", "they do not follow from the evidence")
    return session
