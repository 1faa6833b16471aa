"""``moshi-fl audit``: recompute rounds from their contributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.errors import Exit
from moshi_fl.strategies import find_strategy
from moshi_sdk.options import settings_for, sync_manager

if TYPE_CHECKING:
    from moshi_fl.replica import Replica
    from moshi_fl.upstream import Origin
    from moshi_sdk.audit import Finding

BY_ITS_WORD = "by this hub's word: --upstream URL"


@click.command()
@hub_option
@click.option("--round", "number", type=click.IntRange(1), help="Audit this round.")
@click.option("--all", "everything", is_flag=True, help="Audit every round since round 0.")
@click.option("--upstream", metavar="URL", help="Compare rounds taken of this hub with its own.")
@output_options
def audit(
    console: Console, hub: str | None, number: int | None, everything: bool, upstream: str | None
) -> int:
    r"""Recompute rounds from the accepted contributions and compare them bit for bit.

    Also checks that each contribution is signed by the key that it names. Without an option, the
    newest round is audited. The round after it can be named while it is proposed, before it is
    published. The status is 1 when a round differs.

    \b
    Examples:
      moshi-fl audit
      moshi-fl audit --all --json
    """
    if everything and number is not None:
        raise click.UsageError("--round and --all exclude each other.")
    from moshi_sdk.audit import Auditor

    manager = sync_manager(settings_for(hub=hub))
    newest = manager.replica.look().newest.round
    proposed = number == newest + 1
    other = manager.replica.beside(upstream) if upstream else None
    auditor = Auditor(manager.replica, find_strategy=find_strategy, upstream=other)
    if newest == 0 and number is None:
        return _tell_beginning(console, auditor.audit_beginning(), other)
    first, last = (1, newest) if everything else (number or newest, number or newest)
    findings = []
    with console.progress("Auditing", last - first + 1, unit="rounds") as bar:
        found = [auditor.audit_proposed(last)] if proposed else auditor.audit(first, last)
        for finding in found:
            findings.append(finding)
            bar.advance()
    rows = [_row(finding) for finding in findings]
    shown = ["round", "contributions", "result", "weights"]
    console.table(rows, shown + ["problem"] * any(row["problem"] for row in rows), name="rounds")
    for finding in findings:
        if finding.origin and not upstream:
            console.note(f"Round {finding.round} is {_theirs(finding.origin)}, {BY_ITS_WORD}")
    if proposed:
        console.note(f"Round {number} is proposed; a maintainer has yet to publish it.")
    if any(finding.identical is False for finding in findings):
        console.warn("a round is not what its contributions make; do not build on this hub.")
        return Exit.FAILED
    done = sum(finding.identical is True for finding in findings)
    if done < len(findings):
        console.warn(f"{len(findings) - done} of {len(findings)} round(s) could not be recomputed.")
        console.hint("moshi-fl audit   (the newest round; a hub may drop the deltas of old ones)")
        console.result(audited=done)
        return Exit.FAILED
    console.done(f"{done} of {len(findings)} round(s) recomputed, bit for bit", audited=done)
    return Exit.DONE


def _tell_beginning(console: Console, finding: Finding, upstream: Replica | None) -> int:
    if finding.identical is False:
        console.warn(f"{finding.problem} Do not build on this hub.")
        return Exit.FAILED
    whose = "no other hub's weights"
    if finding.origin:
        word = f"as {upstream.repo.shown_url} has it" if upstream else BY_ITS_WORD
        whose = f"{_theirs(finding.origin)}, {word}"
    console.done(
        f"Only round 0, nothing to recompute: {whose}",
        audited=0,
        upstream=msgspec.to_builtins(finding.origin),
    )
    return Exit.DONE


def _theirs(origin: Origin) -> str:
    return f"round {origin.round} of hub {origin.hub}"


def _row(finding: Finding) -> dict[str, Any]:
    words = {True: "identical", False: "DIFFERENT", None: "cannot be audited"}
    return {
        "round": finding.round,
        "contributions": finding.contributions,
        "result": words[finding.identical],
        "weights": finding.weights[:16],
        "proposed": finding.proposed,
        "upstream": msgspec.to_builtins(finding.origin),
        "problem": finding.problem,
    }
