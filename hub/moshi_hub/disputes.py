"""An evaluation as a maintainer reads it: every verdict, and who said what about a disputed one."""

from __future__ import annotations

from collections.abc import Sequence

from moshi_fl.consensus import gain
from moshi_fl.evidence import MICRO, Judged, Verdicts
from moshi_fl.session import Session
from moshi_fl.signing import fingerprint
from moshi_fl.text import markdown
from moshi_fl.verdicts import measurements
from moshi_hub.judging import Decided

HOW = (
    "Evaluators do not agree on these. `moshi-hub merge --accept ID` takes one, `--exclude ID` "
    "leaves it out; otherwise it waits."
)
WHO = {"local": "processes of this machine", "appointed": "appointed evaluators"}


def disputes(decided: Decided | None, taken: Sequence[str], rows: int) -> str:
    """What nobody but a person can decide, with all that is known of it; empty without any.

    Args:
        decided: The evaluation; None when there was none.
        taken: Ids of what the round takes in.
        rows: How many disputed contributions are shown at most.
    """
    found = [j for j in decided.verdicts.judged if j.outcome == "disputed"] if decided else []
    if decided is None or not found:
        return ""
    parts = ["## Disputed\n", f"{HOW}\n"]
    for judged in found[:rows]:
        parts += _dispute(decided.session, decided.verdicts, judged, judged.submission in taken)
    return "\n".join([*parts, cut(len(found), rows)]) + "\n"


def _dispute(session: Session, verdicts: Verdicts, judged: Judged, is_taken: bool) -> list[str]:
    short = judged.submission[:12]
    state = "taken by the maintainer" if is_taken else "not in this round"
    seats, liars = session.seats, {tally.key for tally in verdicts.tallies if tally.lies}
    rows = [f"**{short}** ({state}): {markdown(judged.reason, 500)}\n"]
    rows += ["| who | says it gains | |", "|---|--:|---|"]
    for who, said in measurements(session, judged.submission).items():
        seat = seats.get(who)
        name = markdown(seat.owner) if seat else "the hub's anchor"
        note = "on probation" if seat and not seat.counts else ""
        note = "proven to have lied" if session.key_of(who) in liars else note
        rows.append(f"| {name} | {gain(said.before, said.after).mean / MICRO:+.6f} | {note} |")
    rulings = [r for r in verdicts.rulings if r.submission == judged.submission]
    if rulings:
        first = rulings[0]
        rows.append(
            f"\nThe referee measured {len(rulings)} sequence(s) again; sequence {first.sequence}: "
            f"{first.before / MICRO:.6f} before, {first.after / MICRO:.6f} after."
        )
    return [*rows, ""]


def evaluation(decided: Decided | None, rows: int) -> str:
    """All verdicts, folded; empty when nothing was evaluated."""
    if decided is None:
        return ""
    verdicts, opening = decided.verdicts, decided.session.opening
    lines = [
        f"| {entry.submission[:12]} | {entry.outcome} | {entry.gain / MICRO:+.6f} "
        f"| {entry.standard_error / MICRO:.6f} | {len(entry.attesters)} "
        f"| {markdown(entry.reason, 200)} |"
        for entry in verdicts.judged[:rows]
    ]
    what = (
        f"Evaluation of {len(verdicts.judged)} by {WHO[verdicts.mode]}, on {opening.sequences} "
        f"sequences, in {opening.precision}"
    )
    return "\n".join(
        [
            f"<details><summary>{what}</summary>\n",
            "Gain and standard error of each contribution alone, in nats per token:\n",
            "| contribution | verdict | gain | standard error | agreeing beside the anchor | why |",
            "|---|---|--:|--:|--:|---|",
            *lines,
            cut(len(verdicts.judged), rows),
            *_lies(verdicts, rows),
            "\n</details>\n",
        ]
    )


def _lies(verdicts: Verdicts, rows: int) -> list[str]:
    if not verdicts.rulings:
        return []
    lines = [
        f"| {r.submission[:12]} | {r.sequence} | {r.before / MICRO:.6f} | {r.after / MICRO:.6f} |"
        for r in verdicts.rulings[:rows]
    ]
    liars = [tally for tally in verdicts.tallies if tally.lies]
    return [
        "\nThe referee measured again what was disputed, in nats per token:\n",
        "| contribution | sequence | before | after |",
        "|---|--:|--:|--:|",
        *lines,
        cut(len(verdicts.rulings), rows),
        *(f"Proven to have lied: `{fingerprint(tally.key)}`." for tally in liars[:rows]),
    ]


def cut(count: int, rows: int) -> str:
    """What stands below a table that is not whole."""
    return f"\n… and {count - rows} more." if count > rows else ""
