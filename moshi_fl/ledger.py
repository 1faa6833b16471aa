"""The credit of a round: measured gains, hash-chained, and derived again by whoever audits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moshi_fl.errors import UntrustedHub
from moshi_fl.evidence import Credit, Judged, Ledger, Verdicts
from moshi_fl.records import Contribution, Merged, Round, digest

Kept = Literal["credit", "neutral", "unmeasured", "by-maintainer"]
_KEPT: Mapping[str, Kept] = {
    "": "unmeasured",
    "credit": "credit",
    "neutral": "neutral",
    "reject": "by-maintainer",
    "disputed": "by-maintainer",
}


def ledger_of(
    record: Round,
    previous: str | None,
    contributions: Mapping[str, Contribution],
    verdicts: Verdicts | None,
) -> Ledger:
    """The ledger of a round.

    Args:
        record: The round; only its number and its contributions' places are used.
        previous: Digest of the ledger of the round before; None where it has none.
        contributions: The accepted contributions by id.
        verdicts: What the evaluation says; None when nothing was measured.
    """
    judged = {entry.submission: entry for entry in verdicts.judged} if verdicts else {}
    entries = tuple(
        _credit(merged, contributions[merged.id], judged.get(merged.id))
        for merged in record.contributions
    )
    return Ledger(hub=record.hub, round=record.round, previous=previous, entries=entries)


def _credit(merged: Merged, contribution: Contribution, judged: Judged | None) -> Credit:
    gain, outcome = (judged.gain, _KEPT[judged.outcome]) if judged else (0, _KEPT[""])
    return Credit(
        contribution=merged.id,
        key=contribution.key,
        outcome=outcome,
        gain=gain,
        standard_error=judged.standard_error if judged else 0,
        credit=max(0, gain) if outcome == "credit" else 0,
        weight=merged.weight,
    )


def check_ledger(
    ledger: Ledger,
    record: Round,
    previous: Round,
    contributions: Mapping[str, Contribution],
    verdicts: Verdicts | None,
) -> None:
    """Insist that a round's ledger is the one that its verdicts make.

    Raises:
        UntrustedHub: It is not.
    """
    if record.ledger != digest(ledger):
        raise UntrustedHub(f"the ledger of round {record.round} is not the one it names.")
    if ledger != ledger_of(record, previous.ledger, contributions, verdicts):
        raise UntrustedHub(f"the ledger of round {record.round} does not follow from its verdicts.")
