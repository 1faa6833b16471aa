"""What main says about evaluations: who evaluates, and each round's verdicts, evidence and ledger.

Reads and checks; whoever audits, follows or merges a hub uses the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from moshi_fl.errors import CorruptRecord, UntrustedHub
from moshi_fl.evidence import Evaluators, Ledger, Verdicts
from moshi_fl.history import EVALUATORS_FILE, ledger_path, signature_beside, verdicts_path
from moshi_fl.ledger import check_ledger
from moshi_fl.records import Contribution, Record, Round, digest, load
from moshi_fl.restore import fetch_locations
from moshi_fl.session import MAX_STEP_BYTES, Session, Signed, board_of
from moshi_fl.signing import EVALUATION_NAMESPACE, MAX_SIGNATURE_BYTES, verify_signature
from moshi_fl.store import HubRepo
from moshi_fl.verdicts import check_verdicts
from moshi_fl.weights import sha256_bytes

R = TypeVar("R", bound=Record)
ACCEPTING = ("credit", "neutral")


def read_evaluators(repo: HubRepo, main: str) -> Evaluators | None:
    """The evaluators that main lists; None when it lists none."""
    if not any(entry.path == EVALUATORS_FILE for entry in repo.entries(main, EVALUATORS_FILE)):
        return None
    data = repo.read(main, EVALUATORS_FILE, limit=MAX_STEP_BYTES)
    return load(data, Evaluators, name=EVALUATORS_FILE, limit=MAX_STEP_BYTES)


def read_verdicts(repo: HubRepo, main: str, rounds: Sequence[Round]) -> list[Verdicts | None]:
    """The verdicts of rounds, in order, from a commit of main; None where a round has none.

    Raises:
        UntrustedHub: They are not those that a round names.
    """
    having = [record for record in rounds if record.verdicts]
    paths = [verdicts_path(record.round) for record in having]
    texts = repo.read_many(main, paths, limit=MAX_STEP_BYTES)
    found = {
        record.round: _named(data, Verdicts, record.verdicts, path, record)
        for record, path, data in zip(having, paths, texts, strict=True)
    }
    return [found.get(record.round) for record in rounds]


def _named(data: bytes, kind: type[R], wanted: str | None, path: str, record: Round) -> R:
    """A file on main that has the hash which a round names."""
    if sha256_bytes(data) != wanted:
        raise UntrustedHub(f"{path} is not what round {record.round} names.")
    try:
        return load(data, kind, name=path, limit=MAX_STEP_BYTES)
    except CorruptRecord as error:
        raise UntrustedHub(str(error)) from error


def read_ledger(repo: HubRepo, main: str, record: Round) -> Ledger | None:
    """A round's ledger, from a commit of main; None where it has none.

    Raises:
        UntrustedHub: It is not the one that the round names.
    """
    if record.ledger is None:
        return None
    path = ledger_path(record.round)
    data = repo.read(main, path, limit=MAX_STEP_BYTES)
    return _named(data, Ledger, record.ledger, path, record)


def check_evaluation(
    repo: HubRepo,
    scratch: HubRepo,
    folder: Path,
    main: str,
    record: Round,
    previous: Round,
    contributions: Mapping[str, Contribution],
) -> Verdicts | None:
    """Derive a round's verdicts and ledger again from the attestations that the hub keeps.

    Args:
        repo: The replica's store, which holds main.
        scratch: A throw-away store for the evidence.
        folder: A folder for its files.
        main: Commit of main.
        record: The round.
        previous: The round before it.
        contributions: The round's contributions by id.

    Returns:
        The verdicts; None when the round has none.

    Raises:
        UntrustedHub: Verdicts, evidence, ledger and round contradict one another.
        HubError: The hub no longer keeps the evidence.
    """
    verdicts = read_verdicts(repo, main, [record])[0]
    ledger = read_ledger(repo, main, record)
    if ledger:
        check_ledger(ledger, record, previous, contributions, verdicts)
    elif verdicts or previous.ledger:
        raise UntrustedHub(f"round {record.round} has no ledger.")
    if verdicts:
        listed = read_evaluators(repo, main)
        _check_anchor(repo, main, record, verdicts, listed)
        session = check_verdicts(verdicts, _evidence(scratch, folder, verdicts))
        _check_session(session, record, previous, listed)
        _check_contributions(record, verdicts, session, contributions)
    return verdicts


def _check_anchor(
    repo: HubRepo, main: str, record: Round, verdicts: Verdicts, listed: Evaluators | None
) -> None:
    path = verdicts_path(record.round)
    if listed is None or verdicts.anchor not in listed.anchors:
        raise UntrustedHub(f"{path} is signed by a key that {EVALUATORS_FILE} does not name.")
    signature = repo.read(main, signature_beside(path), limit=MAX_SIGNATURE_BYTES)
    data = repo.read(main, path, limit=MAX_STEP_BYTES)
    try:
        armoured = signature.decode("ascii", "replace")
        verify_signature(data, armoured, verdicts.anchor, EVALUATION_NAMESPACE)
    except CorruptRecord as error:
        raise UntrustedHub(f"{path}: {error}") from error


def _evidence(scratch: HubRepo, folder: Path, verdicts: Verdicts) -> dict[str, Signed]:
    place = verdicts.evidence
    fetched = fetch_locations(scratch, [place], folder)[0]
    return board_of({file.name: (fetched / file.name).read_bytes() for file in place.files})


def _check_session(
    session: Session, record: Round, previous: Round, listed: Evaluators | None
) -> None:
    opening = session.opening
    if (opening.hub, opening.round, opening.previous) != (
        record.hub,
        record.round,
        digest(previous),
    ):
        raise UntrustedHub(f"the evidence of round {record.round} is that of another.")
    if record.evaluation and opening.pool != record.evaluation.pool:
        raise UntrustedHub(f"round {record.round} was evaluated on another pool than it says.")
    appointed = {entry.key for entry in listed.evaluators} if listed else set()
    strangers = [seat for seat in opening.seats if seat.key not in appointed]
    if opening.mode == "appointed" and strangers:
        raise UntrustedHub(
            f"{strangers[0].owner!r} evaluated for round {record.round} without being appointed."
        )


def _check_contributions(
    record: Round,
    verdicts: Verdicts,
    session: Session,
    contributions: Mapping[str, Contribution],
) -> None:
    assert session.closing is not None
    submitted = {entry.id: entry.record for entry in session.closing.submissions}
    judged = {entry.submission: entry.outcome for entry in verdicts.judged}
    for merged in record.contributions:
        if submitted.get(merged.id) != digest(contributions[merged.id]):
            raise UntrustedHub(f"contribution {merged.id[:12]} was not evaluated.")
        if judged[merged.id] == "reject":
            raise UntrustedHub(f"contribution {merged.id[:12]} was merged although rejected.")


def external_attestations(record: Round, verdicts: Verdicts | None) -> int:
    """Of a round's contributions, the fewest agreeing attestations of independent people.

    Processes of the hub's own machine are nobody's word but the hub's.
    """
    if verdicts is None or verdicts.mode == "local":
        return 0
    judged = {entry.submission: entry for entry in verdicts.judged}
    found = [judged.get(merged.id) for merged in record.contributions]
    return min(
        (len(entry.attesters) if entry and entry.outcome in ACCEPTING else 0 for entry in found),
        default=0,
    )
