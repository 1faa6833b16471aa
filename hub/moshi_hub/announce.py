"""Tells contributors on a forge what became of their pull requests.

One comment of each kind, edited in place; everything that a stranger chose is escaped. What the
forge refuses is returned in words: the round is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from moshi_fl.errors import HubError
from moshi_fl.forge import Forge, Offer, Proposal, Status
from moshi_fl.history import round_branch
from moshi_fl.records import Round
from moshi_fl.signing import fingerprint, keys_match
from moshi_fl.text import Size, markdown
from moshi_hub.verify import REASONS, Verdict

VERDICT, ROUND = "verdict", "round"
CHECK = "moshi-fl/verify"
ACCEPTED, REJECTED = "accepted", "rejected"


def tell_verdicts(
    forge: Forge,
    verdicts: Iterable[Verdict],
    pull_requests: Mapping[str, Proposal],
    commits: Mapping[str, str],
) -> list[str]:
    """Comment on, label and mark each judged pull request.

    Args:
        forge: Where they are.
        verdicts: What the gate says.
        pull_requests: Those there are, by branch.
        commits: Branch to the commit that was judged.

    Returns:
        What the forge refused, in words.
    """
    problems: list[str] = []
    for verdict in verdicts:
        proposal = pull_requests.get(verdict.branch)
        if proposal and verdict.is_settled:
            _tell(forge, verdict, proposal, commits[verdict.branch], problems)
    return problems


def _tell(
    forge: Forge, verdict: Verdict, proposal: Proposal, commit: str, problems: list[str]
) -> None:
    number = proposal.number
    word, other = (ACCEPTED, REJECTED) if verdict.accepted else (REJECTED, ACCEPTED)
    first = "passes the gate" if verdict.accepted else verdict.findings[0].code
    status = Status(CHECK, "success" if verdict.accepted else "failure", first)
    _try(problems, lambda: forge.set_status(commit, status))
    signer = _signer(forge, verdict, proposal.author, problems)
    _try(problems, lambda: forge.say(number, verdict_text(verdict, signer), marker=VERDICT))
    missing, wrong = {word} - {*proposal.labels}, {other} & {*proposal.labels}
    _try(problems, lambda: forge.label(number, [*missing], remove=[*wrong]))


def tell_round(
    forge: Forge,
    record: Round,
    branches: Mapping[str, str],
    pull_requests: Mapping[str, Proposal],
) -> list[str]:
    """Close the pull requests of a round's contributions.

    Args:
        forge: Where they are.
        record: The published round.
        branches: Id of each open contribution to its branch.
        pull_requests: Those there are, by branch.

    Returns:
        What the forge refused, in words.
    """
    problems: list[str] = []
    total = sum(merged.weight for merged in record.contributions)
    for merged in record.contributions:
        proposal = pull_requests.get(branches.get(merged.id, ""))
        if proposal:
            share = f"{merged.weight / total:.1%}"
            text = f"Included in round {record.round} with weight {merged.weight:,} ({share})."
            _close(forge, proposal.number, text, problems)
    return problems


def propose_round(forge: Forge, record: Round, report: str) -> tuple[str, str]:
    """Open the pull request of a proposed round, or bring the one there is up to date.

    Returns:
        Its page, or the page on which it can be opened (empty where there is no forge); and what
        the forge refused, in words.
    """
    count = len(record.contributions)
    title = f"Round {record.round}: {count} contribution{'' if count == 1 else 's'}"
    branch = round_branch(record.round).removeprefix("refs/heads/")
    try:
        return forge.propose(Offer(branch, "main", title, report, ("round",), anew=True)).url, ""
    except HubError as error:
        return "", error.in_full


def _close(forge: Forge, number: int, text: str, problems: list[str]) -> None:
    _try(problems, lambda: forge.close(number, text, marker=ROUND))


def _try(problems: list[str], act: Callable[[], None]) -> None:
    try:
        act()
    except HubError as error:
        problems.append(error.in_full)


def _signer(forge: Forge, verdict: Verdict, login: str, problems: list[str]) -> str:
    """Whether the key that signed is one that the pull request's author has published."""
    if not (verdict.contribution and verdict.signature and login):
        return ""
    keys: list[str] = []
    _try(problems, lambda: keys.extend(forge.keys_of(login)))
    key, who = verdict.contribution.key, markdown(login)
    name = f"`{fingerprint(key)}`"
    if keys_match("\n".join(keys), key):
        return f"Signed by {name}, a key that {who} publishes here."
    return f"Signed by {name}, which is **not among the keys that {who} publishes** here."


def verdict_text(verdict: Verdict, signer: str = "") -> str:
    """The comment of a pull request: the verdict first, then what it rests on.

    Args:
        verdict: What the gate says.
        signer: A sentence about the key.
    """
    record = verdict.contribution
    head = "**Accepted** by the gate." if verdict.accepted else "**Rejected** by the gate."
    lines = [head, ""]
    for finding in verdict.findings:
        rule = REASONS.get(finding.code, "")
        lines.append(f"- `{finding.code}`: {rule}. {markdown(finding.message, 300)}")
    if record:
        norm = "not measured" if verdict.norm is None else f"{verdict.norm:.4g}"
        lines += [
            "",
            "| base | size | norm | examples |",
            "|--:|--:|--:|--:|",
            f"| {record.round} | {Size(record.delta.bytes)} | {norm} | {record.num_examples:,} |",
        ]
    if signer:
        lines += ["", signer]
    if verdict.accepted:
        lines += ["", "The next round takes it, if evaluators find that it does no harm."]
    return "\n".join(lines) + "\n"
