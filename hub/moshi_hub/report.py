"""The report of a round, in Markdown: what a maintainer reads before publishing it.

Everything a contributor chose is escaped: it may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from moshi_fl.evidence import Verdicts
from moshi_fl.records import Contribution, Round
from moshi_fl.signing import fingerprint
from moshi_fl.text import markdown
from moshi_hub.propose import Proposal
from moshi_hub.verify import Verdict

MAX_ROWS = 200


def round_report(
    proposal: Proposal, verdicts: Sequence[Verdict], waiting: Sequence[Contribution]
) -> str:
    """Report of a proposed round.

    Args:
        proposal: The round.
        verdicts: What the gate said of every open contribution.
        waiting: Accepted contributions that this round does not take.
    """
    parts = [
        f"# Round {proposal.record.round}\n",
        _summary(proposal.record),
        _accepted(proposal),
        _evaluated(proposal),
        _rejected([verdict for verdict in verdicts if not verdict.accepted]),
        _waiting(waiting),
        _facts(proposal),
    ]
    return "\n".join(part for part in parts if part)


def _summary(record: Round) -> str:
    count = len(record.contributions)
    text = f"{count} contribution{'' if count == 1 else 's'}"
    if record.evaluation is None:
        return f"{text}. Held-out loss was not measured: no held-out data on the merging machine.\n"
    before, after = record.evaluation.before, record.evaluation.after
    change = after - before
    return (
        f"{text}; held-out loss **{before:.4f} to {after:.4f}** ({change:+.4f} nats per token, "
        f"{record.evaluation.sequences} sequences).\n"
    )


def _accepted(proposal: Proposal) -> str:
    total = sum(merged.weight for merged in proposal.record.contributions)
    rows = [
        "## Accepted\n",
        "| contribution | contributor | base | examples | weight | own loss | after | size |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for merged in proposal.record.contributions[:MAX_ROWS]:
        entry = proposal.contributions[merged.id]
        metrics = entry.metrics
        rows.append(
            f"| {merged.id[:12]} | {markdown(entry.contributor)} | {merged.base_round} "
            f"| {entry.num_examples} | {merged.weight / total:.1%} "
            f"| {_loss(metrics.held_out_before)} | {_loss(metrics.held_out_after)} "
            f"| {entry.delta.bytes / 1000:.1f} kB |"
        )
    rows.append(_cut(len(proposal.record.contributions)))
    return "\n".join(rows) + "\n"


def _evaluated(proposal: Proposal) -> str:
    """What the evaluation found; what is disputed with its evidence, for the maintainer."""
    if proposal.decided is None:
        return ""
    verdicts, opening = proposal.decided.verdicts, proposal.decided.session.opening
    who = {"local": "processes of this machine", "appointed": "appointed evaluators"}
    intro = (
        f"By {who[verdicts.mode]}, on {opening.sequences} sequences, in {opening.precision}. Gain "
        "and standard error of each contribution alone, in nats per token:\n"
    )
    rows = [
        f"| {entry.submission[:12]} | {entry.outcome} | {entry.gain / 1e6:+.6f} "
        f"| {entry.standard_error / 1e6:.6f} | {len(entry.attesters)} "
        f"| {markdown(entry.reason, 200)} |"
        for entry in verdicts.judged[:MAX_ROWS]
    ]
    head = "| contribution | verdict | gain | standard error | agreeing beside the anchor | why |"
    text = ["## Evaluation\n", intro, head, "|---|---|--:|--:|--:|---|", *rows]
    return "\n".join([*text, _cut(len(verdicts.judged)), *_lies(verdicts)]) + "\n"


def _lies(verdicts: Verdicts) -> list[str]:
    liars = [tally for tally in verdicts.tallies if tally.lies]
    if not verdicts.rulings:
        return []
    rows = [
        "\nThe referee measured again what was disputed, in nats per token:\n",
        "| contribution | sequence | before | after |",
        "|---|--:|--:|--:|",
    ]
    rows += [
        f"| {r.submission[:12]} | {r.sequence} | {r.before / 1e6:.6f} | {r.after / 1e6:.6f} |"
        for r in verdicts.rulings[:MAX_ROWS]
    ]
    return [*rows, "", *(f"Proven to have lied: `{fingerprint(t.key)}`." for t in liars)]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cut(count: int) -> str:
    return f"\n… and {count - MAX_ROWS} more." if count > MAX_ROWS else ""


def _rejected(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = ["## Rejected\n", "| branch | reason | detail |", "|---|---|---|"]
    for verdict in verdicts[:MAX_ROWS]:
        first = verdict.findings[0]
        branch = markdown(verdict.branch.removeprefix("refs/heads/"), 60)
        rows.append(f"| {branch} | {first.code} | {markdown(first.message, 200)} |")
    rows.append(_cut(len(verdicts)))
    return "\n".join(rows) + "\n"


def _waiting(contributions: Sequence[Contribution]) -> str:
    if not contributions:
        return ""
    ids = ", ".join(contribution.id[:12] for contribution in contributions[:MAX_ROWS])
    return f"## Waiting for the next round\n\n{ids}\n"


def _facts(proposal: Proposal) -> str:
    record, update = proposal.record, sum(p.stat().st_size for p in proposal.update_files)
    keyframe = sum(path.stat().st_size for path in proposal.keyframe_files)
    kind = record.update.kind if record.update else "none"
    lines = [
        "## Facts\n",
        f"- strategy: {record.strategy.name if record.strategy else 'none'}",
        f"- weights: `{record.weights}`, {record.parameters:,} parameters",
        f"- update: {update / 1000:.1f} kB ({kind})",
    ]
    if keyframe:
        lines.append(f"- keyframe: {keyframe / 1000:.1f} kB")
    if record.growth:
        characters = " ".join(f"U+{ord(character):04X}" for character in record.growth.characters)
        lines.append(f"- new characters: {characters}")
    lines.append(f"- recompute it: `moshi-fl audit --round {record.round}`")
    return "\n".join(lines) + "\n"
