"""The one comment of a contribution's pull request, in Markdown: the verdict first.

Everything that a stranger chose is escaped, and everything is bounded: the longest comment there
can be is far below what GitHub takes (65,536 characters).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from moshi_fl.evidence import MICRO
from moshi_fl.records import Contribution
from moshi_fl.text import Size, markdown
from moshi_hub.results import Measurement, Results
from moshi_hub.verify import REASONS, Finding, Verdict

MAX_ROWS = 32
AGREE = "evaluators agree"
TWO_SIDED = 1.96  # standard errors: a 95 % interval of a mean of many
HEADS = {
    "rejected": "**Rejected**",
    "accepted": "**Accepted** by the gate.",
    "credit": "**Accepted**: it makes the model better.",
    "neutral": "**Accepted**: whether it makes the model better cannot be told from noise. "
    "It is merged, and earns no credit.",
    "disputed": "**Disputed**: the evaluators do not agree on what it is worth.",
}


def verdict_text(verdict: Verdict, signer: str = "", trained: str = "") -> str:
    """What is said when only the gate has judged.

    Args:
        verdict: What the gate says.
        signer: A sentence about the key.
        trained: What of the model the delta changes.
    """
    head = HEADS["accepted"] if verdict.accepted else f"{HEADS['rejected']} by the gate."
    parts = [head, _findings(verdict.findings), _table(verdict, trained, None, 0, 0), signer]
    if verdict.accepted:
        parts.append("The next round takes it, if evaluators find that it does no harm.")
    return "\n\n".join(part for part in parts if part) + "\n"


def results_text(results: Results, verdict: Verdict, signer: str = "", hub: str = "") -> str:
    """What is said when jobs have judged and measured.

    Args:
        results: What they found.
        verdict: The gate's part of it.
        signer: A sentence about the key.
        hub: The hub's address, for the commands that check it.
    """
    agreeing = results.agreeing
    first = agreeing[0] if agreeing else None
    k, n = len(agreeing), len(results.measured)
    parts = [
        _head(results),
        _findings(verdict.findings),
        _table(
            verdict, results.gate.trained, first if results.outcome != "disputed" else None, k, n
        ),
        signer,
        _ending(results),
        _details(results, verdict.contribution, hub),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def one_line(results: Results) -> str:
    """The same as a commit status says it."""
    if results.gate.findings:
        return results.gate.findings[0].code
    if not results.measured:
        return "passes the gate"
    said = {"rejected": "no-gain", "credit": "helps", "neutral": "does no harm"}
    k, n = len(results.agreeing), len(results.measured)
    return f"{said.get(results.outcome, results.outcome)}: {k} of {n} {AGREE}"


def _head(results: Results) -> str:
    if results.gate.findings:
        return f"{HEADS['rejected']} by the gate."
    if results.outcome == "rejected":
        return f"{HEADS['rejected']}: by itself it makes the model worse."
    return HEADS[results.outcome]


def _ending(results: Results) -> str:
    if results.outcome == "accepted":
        return (
            "Evaluators measure it next, where this hub has them. "
            "The next round takes it, if they find that it does no harm."
        )
    if results.outcome in {"credit", "neutral"}:
        return "The next round takes it, if its own evaluation finds the same."
    return ""


def _findings(findings: Sequence[Finding]) -> str:
    return "\n".join(
        f"- `{finding.code}`: {REASONS.get(finding.code, '')}. {markdown(finding.message, 300)}"
        for finding in findings[:10]
    )


def _table(verdict: Verdict, trained: str, measured: Measurement | None, k: int, n: int) -> str:
    record = verdict.contribution
    if record is None:
        return ""
    cells = {
        "norm": "not measured" if verdict.norm is None else f"{verdict.norm:.4g}",
        "examples": f"{record.num_examples:,}",
        "size": str(Size(record.delta.bytes)),
        "base": f"round {record.round}",
    }
    if trained:
        cells["trained"] = markdown(trained)
    if measured:
        cells = _measured(measured) | {"attestations": f"{k} of {n}"} | cells
    elif n:
        cells = {"attestations": f"{k} of {n}"} | cells
    rows = [cells.keys(), ["--:"] * len(cells), cells.values()]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if not measured:
        return text
    return (
        f"{text}\n\nLosses in nats per token, on {measured.sequences:,} held-out sequences, with "
        f"{measured.share:.0%} of the delta in {measured.precision}: it is one of several."
    )


def _measured(found: Measurement) -> dict[str, str]:
    change, half = -found.gain / MICRO, TWO_SIDED * found.standard_error / MICRO
    return {
        "loss before": f"{found.before / MICRO:.6f}",
        "after": f"{found.after / MICRO:.6f}",
        "change (95 % interval)": f"{change:+.6f} ({change - half:+.6f} to {change + half:+.6f})",
    }


def _details(results: Results, record: Contribution | None, hub: str) -> str:
    gate = results.gate
    lines = [f"- judged: commit `{gate.head}`, by the rules of round {gate.round + 1}"]
    if record:
        lines += [
            f"- contribution `{record.id}` by {markdown(record.contributor)}",
            f"- made by {markdown(record.software)}, codec {markdown(record.codec)}",
            f"- base: round {record.round}, weights `{record.base}`",
            f"- delta: `{record.delta.files[0].sha256}`" if record.delta.files else "",
        ]
    where = f" --hub {shlex.quote(hub)}" if hub else ""
    name = record.id[:12] if record else gate.head[:12]
    lines.append(f"- judge it again: `moshi-hub verify {name}{where}`")
    if results.measured:
        pool = results.measured[0].pool
        lines.append(f"- held-out pool: `{pool}`")
        lines.append(f"- measure it again, with the pool: `moshi-hub attest {name} --local{where}`")
    text = "\n".join(line for line in lines if line)
    body = "\n\n".join(part for part in (text, _evaluators(results)) if part)
    return f"<details><summary>Details</summary>\n\n{body}\n\n</details>"


def _evaluators(results: Results) -> str:
    if not results.measured:
        return ""
    rows = ["| evaluator | machine | digest of all losses | change |", "|---|---|---|--:|"]
    rows += [
        f"| {markdown(entry.evaluator)} | {markdown(entry.system)}, {markdown(entry.software)} "
        f"| `{entry.losses}` | {-entry.gain / MICRO:+.6f} |"
        for entry in results.measured[:MAX_ROWS]
    ]
    return "\n".join(rows)
