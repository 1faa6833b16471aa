"""Where a session stands: what comes next, who is awaited, and for how long. Decides only."""

from __future__ import annotations

from datetime import UTC, datetime

from moshi_fl.session import Session
from moshi_hub.publish import seconds


def next_step(session: Session | None) -> str:
    """The step that the hub does next; empty when the session is decided."""
    if session is None:
        return "open"
    if session.verdicts:
        return ""
    if session.closing is None:
        return "close"
    if not session.draws:
        return "draw"
    return "decide" if session.stage in session.sealings else "seal"


def awaited(session: Session | None) -> list[str]:
    """Evaluators (ids) who must do something before the hub's next step makes sense."""
    if session is None or session.verdicts:
        return []
    everybody = {session.anchor, *session.seats}
    stage = session.stage
    missing = {
        "close": lambda: everybody - session.commitments.keys(),
        "draw": lambda: session.commitments.keys() - session.reveals.keys(),
        "seal": lambda: session.expected(stage) - session.pledges[stage].keys(),
        "decide": lambda: session.sealed(stage) - session.attestations[stage].keys(),
    }[next_step(session)]()
    return sorted(missing)


def is_overdue(session: Session, now: datetime | None = None) -> bool:
    """Whether the hub has waited long enough for others since its last step."""
    last = session.opening.created
    if session.closing:
        last = session.closing.created
    for stage, draw in session.draws.items():
        last = draw.created
        if stage in session.sealings:
            last = session.sealings[stage].created
    waited = (now or datetime.now(UTC)).timestamp() - seconds(last)
    return waited >= session.opening.hours * 3600


def counted(session: Session) -> list[str]:
    """Names of the records that verdicts follow from, in order."""
    names = {"opening", "closing"}
    names |= {f"commitment/{who}" for who in session.commitments}
    names |= {f"nonce/{who}" for who in session.reveals}
    for stage in session.draws:
        names |= {f"draw/{stage}", f"sealing/{stage}"}
        names |= {f"pledge/{stage}/{who}" for who in session.sealed(stage)}
        names |= {f"attestation/{stage}/{who}" for who in session.attestations[stage]}
    return sorted(names)
