"""What the verdicts of an evaluation mean for a merge; pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from moshi_fl.evidence import MICRO, Evaluators, Judged, Verdicts
from moshi_fl.records import Contribution
from moshi_fl.session import Session, Signed
from moshi_hub.verify import Finding, Verdict


@dataclass(frozen=True)
class Decided:
    """A finished evaluation: the verdicts, and what they follow from."""

    verdicts: Verdicts
    signed: Signed
    session: Session
    files: Mapping[str, bytes]
    """The evidence: names to contents."""


def without_gain(found: Iterable[Verdict], verdicts: Verdicts) -> tuple[Verdict, ...]:
    """The gate's verdicts, with those contributions rejected that make the model worse."""
    rejected = {j.submission: j for j in verdicts.judged if j.outcome == "reject"}
    return tuple(_judge(verdict, rejected) for verdict in found)


def _judge(verdict: Verdict, rejected: dict[str, Judged]) -> Verdict:
    entry = verdict.contribution
    if not verdict.accepted or entry is None or entry.id not in rejected:
        return verdict
    return replace(verdict, findings=(no_gain(rejected[entry.id]),))


def no_gain(judged: Judged) -> Finding:
    """The finding about a contribution that was measured and rejected."""
    change, error = -judged.gain / MICRO, judged.standard_error / MICRO
    return Finding(
        "no-gain",
        f"alone it changes the held-out loss by {change:+.6f} nats per token "
        f"(standard error {error:.6f}).",
    )


def held(
    accepted: Iterable[Contribution], verdicts: Verdicts, allowed: Sequence[str] = ()
) -> set[str]:
    """Contributions that wait: disputed ones, and those that came after the session had closed.

    Args:
        accepted: What passed the gate.
        verdicts: What the evaluation says.
        allowed: Beginnings of ids of disputed contributions that the maintainer accepts.
    """
    outcomes = {entry.submission: entry.outcome for entry in verdicts.judged}
    return {
        entry.id
        for entry in accepted
        if entry.id not in outcomes
        or (outcomes[entry.id] == "disputed" and not entry.id.startswith(tuple(allowed)))
    }


def with_anchor(listed: Evaluators | None, hub: str, anchor: str) -> Evaluators:
    """The list with this key as the hub's present anchor."""
    if listed is None:
        return Evaluators(hub=hub, anchors=(anchor,))
    if listed.anchors[-1] == anchor:
        return listed
    before = tuple(key for key in listed.anchors if key != anchor)
    return msgspec.structs.replace(listed, anchors=(*before, anchor))
