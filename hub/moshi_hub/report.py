"""The report of a round, in Markdown: what a maintainer reads before publishing it.

Everything a contributor chose is escaped: it may hold anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moshi_fl.evidence import MICRO, Credit
from moshi_fl.forge.github import MAX_BODY
from moshi_fl.history import round_folder
from moshi_fl.ledger import ledger_of
from moshi_fl.records import Contribution, Growth, Round
from moshi_fl.text import Size, markdown
from moshi_fl.upstream import origin_of
from moshi_hub import disputes, drift, figures, samples
from moshi_hub.disputes import cut
from moshi_hub.figures import RoundFigures
from moshi_hub.propose import Proposal
from moshi_hub.verify import Verdict

MAX_ROWS = 200
ACCEPTED = (
    "| contribution | contributor | base | trained | examples | weight | verdict | credit "
    "| claims | size |\n|---|---|--:|---|--:|--:|---|--:|--:|--:|"
)
FEWER_ROWS = (MAX_ROWS, 100, 50, 20, 10, 5, 2)


@dataclass(frozen=True)
class Findings:
    """All that a report tells of.

    Attributes:
        proposal: The round.
        verdicts: What the gate said of every open contribution.
        waiting: Accepted contributions that the round leaves for the next.
        excluded: Accepted contributions that the maintainer leaves out.
        figures: What the family can tell of the round beside its loss.
        trained: What of the model each contribution changes, by id.
        drift: How far each layer moves.
        samples: What the model says before and after.
        address: Where everybody finds the hub; empty when that is a path on this machine.
    """

    proposal: Proposal
    verdicts: Sequence[Verdict]
    waiting: Sequence[Contribution] = ()
    excluded: Sequence[Contribution] = ()
    figures: RoundFigures | None = None
    trained: Mapping[str, str] = field(default_factory=dict)
    drift: Sequence[drift.Drift] = ()
    samples: samples.Samples = samples.NOTHING
    address: str = ""


def round_report(found: Findings, rows: int = MAX_ROWS) -> str:
    """The report.

    Args:
        found: What it tells of.
        rows: How long its tables get.
    """
    proposal = found.proposal
    taken = [merged.id for merged in proposal.record.contributions]
    parts = [
        f"# Round {proposal.record.round}\n",
        _summary(proposal.record),
        figures.shown(found.figures),
        _accepted(proposal, found.trained, rows),
        disputes.disputes(proposal.decided, taken, rows),
        _listed("Left out by the maintainer", found.excluded, rows),
        _rejected([verdict for verdict in found.verdicts if not verdict.accepted], rows),
        _listed("Waiting for the next round", found.waiting, rows),
        samples.shown(found.samples, rows),
        disputes.evaluation(proposal.decided, rows),
        drift.table(found.drift, rows),
        _facts(proposal, found.address, rows),
    ]
    return "\n".join(part for part in parts if part)


def pull_request_body(found: Findings) -> str:
    """The report as the text of a pull request: with shorter tables where it would be too long."""
    name = f"{round_folder(found.proposal.record.round)}/report.md"
    said = f"\n*Tables are shortened here; `{name}` on this branch is whole.*\n"
    for rows in FEWER_ROWS:
        body = round_report(found, rows) + (said if rows < MAX_ROWS else "")
        if len(body) <= MAX_BODY:
            return body
    return body  # what is longer still, the forge cuts


def _summary(record: Round) -> str:
    count = len(record.contributions)
    text = f"{count} contribution{'' if count == 1 else 's'}"
    if origin := origin_of(record):
        text = f"Takes round {origin.round} of hub `{origin.hub}` as it is"
    if record.evaluation is None:
        return f"{text}. Held-out loss was not measured: no held-out data on the merging machine.\n"
    before, after = record.evaluation.before, record.evaluation.after
    change = after - before
    return (
        f"{text}; held-out loss **{before:.4f} to {after:.4f}** ({change:+.4f} nats per token, "
        f"{record.evaluation.sequences} sequences).\n"
    )


def _accepted(proposal: Proposal, trained: Mapping[str, str], rows: int) -> str:
    record, decided = proposal.record, proposal.decided
    if not record.contributions:
        return ""
    total = sum(merged.weight for merged in record.contributions)
    verdicts = decided.verdicts if decided else None
    # What the ledger of the round will say; the digest of the one before does not show here.
    ledger = ledger_of(record, None, proposal.contributions, verdicts).entries
    lines = ["## Accepted\n", ACCEPTED]
    for merged, credit in list(zip(record.contributions, ledger, strict=True))[:rows]:
        entry = proposal.contributions[merged.id]
        metrics = entry.metrics
        lines.append(
            f"| {merged.id[:12]} | {markdown(entry.contributor)} | {merged.base_round} "
            f"| {trained.get(merged.id, '-')} "
            f"| {entry.num_examples:,} | {merged.weight / total:.1%} "
            f"| {credit.outcome} | {_credit(credit)} "
            f"| {_loss(metrics.held_out_before)} to {_loss(metrics.held_out_after)} "
            f"| {entry.delta.bytes / 1000:.1f} kB |"
        )
    lines.append(cut(len(record.contributions), rows))
    lines.append(
        "Trained: the part of the model that the delta changes, by the tensors in it. Credit: "
        "measured gain on held-out data, in nats per token. Claims: the contributor's own loss, "
        "before and after."
    )
    return "\n".join(lines) + "\n"


def _credit(entry: Credit) -> str:
    if entry.outcome == "unmeasured":
        return "-"
    return f"{entry.credit / MICRO:.6f}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rejected(verdicts: Sequence[Verdict], rows: int) -> str:
    if not verdicts:
        return ""
    lines = ["## Rejected\n", "| branch | reason | detail |", "|---|---|---|"]
    for verdict in verdicts[:rows]:
        first = verdict.findings[0]
        branch = markdown(verdict.branch.removeprefix("refs/heads/"), 60)
        lines.append(f"| {branch} | {first.code} | {markdown(first.message, 200)} |")
    lines.append(cut(len(verdicts), rows))
    return "\n".join(lines) + "\n"


def _listed(title: str, contributions: Sequence[Contribution], rows: int) -> str:
    if not contributions:
        return ""
    lines = [
        f"- {entry.id[:12]}, {markdown(entry.contributor)}, on round {entry.round}"
        for entry in contributions[:rows]
    ]
    return "\n".join([f"## {title}\n", *lines, cut(len(contributions), rows)]) + "\n"


def _facts(proposal: Proposal, address: str, rows: int) -> str:
    record, update = proposal.record, sum(p.stat().st_size for p in proposal.update_files)
    keyframe = sum(path.stat().st_size for path in proposal.keyframe_files)
    deltas = sum(entry.delta.bytes for entry in proposal.contributions.values())
    kind = record.update.kind if record.update else "none"
    lines = [
        "## Facts\n",
        f"- strategy: {record.strategy.name if record.strategy else 'none'}",
        f"- weights: `{record.weights}`, {record.parameters:,} parameters",
        f"- update: {update / 1000:.1f} kB ({kind}); all deltas: {Size(deltas)}",
    ]
    if keyframe:
        lines.append(f"- keyframe: {keyframe / 1000:.1f} kB")
    if record.growth:
        lines.append(f"- new characters: {_characters(record.growth, rows)}")
    hub = f" --hub {shlex.quote(address)}" if address else ""
    lines.append(f"- recompute it: `moshi-fl audit{hub} --round {record.round}`")
    return "\n".join(lines) + "\n"


def _characters(growth: Growth, rows: int) -> str:
    names = " ".join(f"U+{ord(character):04X}" for character in growth.characters[:rows])
    more = len(growth.characters) - rows
    return f"{names} and {more} more" if more > 0 else names
