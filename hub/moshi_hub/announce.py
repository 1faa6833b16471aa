"""Tells contributors on a forge what became of their pull requests.

One comment of each kind, edited in place; everything that a stranger chose is escaped. What the
forge refuses is returned in words: the round is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from moshi_fl.errors import HubError
from moshi_fl.forge import Forge, Offer, Proposal, State, Status
from moshi_fl.history import round_branch
from moshi_fl.records import Round
from moshi_fl.signing import fingerprint, keys_match
from moshi_fl.text import markdown
from moshi_hub.comment import AGREE, one_line, results_text, verdict_text
from moshi_hub.publish import title
from moshi_hub.results import Results, verdict_of
from moshi_hub.verify import Verdict

if TYPE_CHECKING:
    from moshi_fl.replica import Replica
    from moshi_hub.opened import OpenRound

VERDICT, ROUND = "verdict", "round"
CHECK = "moshi-fl/verify"
ACCEPTED, REJECTED, DISPUTED = "accepted", "rejected", "disputed"
STATES: dict[str, State] = {ACCEPTED: "success", REJECTED: "failure", DISPUTED: "pending"}
"""Label to the state of the commit."""


def announce(replica: Replica, found: OpenRound, record: Round | None = None) -> list[str]:
    """Tell contributors on a forge the verdicts, and what a round took; what went wrong.

    Args:
        replica: The hub's copy on this machine.
        found: The open round.
        record: The round that was just made of it; then what is accepted and waits is told nothing.
    """
    problems, taken = announce_past(replica, found, record)
    news = [v for v in found.verdicts if not (v.contribution and v.contribution.id in taken)]
    if record:
        news = [verdict for verdict in news if not verdict.accepted]
    return problems + tell_verdicts(found, news)


def announce_past(
    replica: Replica, found: OpenRound, record: Round | None = None
) -> tuple[list[str], set[str]]:
    """Tell whose contributions rounds have taken, the forge having been away when they were made.

    Returns:
        What the forge refused, in words; and the ids of what these rounds took.
    """
    rounds = replica.chain(found.snapshot.state, min(found.rules.bases))
    branches = {v.contribution.id: v.branch for v in found.verdicts if v.contribution}
    problems: list[str] = []
    taken: set[str] = set()
    for entry in (*rounds, *([record] if record else [])):
        taken |= {merged.id for merged in entry.contributions}
        problems += tell_round(found.offers.forge, entry, branches, found.offers.pull_requests)
    return problems, taken


def tell_verdicts(found: OpenRound, verdicts: Iterable[Verdict]) -> list[str]:
    """Comment on, label and mark each judged pull request.

    Args:
        found: The open round.
        verdicts: Those of its verdicts that are news.

    Returns:
        What the forge refused, in words.
    """
    problems: list[str] = []
    for verdict in verdicts:
        proposal = found.offers.pull_requests.get(verdict.branch)
        if proposal and verdict.is_settled:
            _tell(found, verdict, proposal, problems)
    return problems


def _tell(found: OpenRound, verdict: Verdict, proposal: Proposal, problems: list[str]) -> None:
    forge, commit = found.offers.forge, found.offers.branches[verdict.branch]
    if verdict.accepted and _is_measured(forge, commit, problems):
        return
    number, word = proposal.number, ACCEPTED if verdict.accepted else REJECTED
    first = "passes the gate" if verdict.accepted else verdict.findings[0].code
    status = Status(CHECK, "success" if verdict.accepted else "failure", first)
    _try(problems, lambda: forge.set_status(commit, status))
    signer = _signer(forge, verdict, proposal.author, problems)
    trained = found.trained.get(verdict.contribution.id, "") if verdict.contribution else ""
    text = verdict_text(verdict, signer, trained)
    _try(problems, lambda: forge.say(number, text, marker=VERDICT))
    missing, wrong = {word} - {*proposal.labels}, ({*STATES} - {word}) & {*proposal.labels}
    _try(problems, lambda: forge.label(number, [*missing], remove=sorted(wrong)))


def tell_results(
    forge: Forge, results: Results, author: str, hub: str
) -> tuple[str, list[str], list[str]]:
    """Say what jobs found of a contribution: one comment, one status, one label.

    Args:
        forge: Where its pull request is.
        results: What they found. Its head must be the pull request's.
        author: Login of who opened it.
        hub: The hub's address, for the commands that check it.

    Returns:
        The comment; what the forge refused, in words; and what it refused of lesser things: a job
        may not make a label that the repository has not yet.
    """
    problems: list[str] = []
    lesser: list[str] = []
    gate, verdict = results.gate, verdict_of(results.gate)
    text = results_text(results, verdict, _signer(forge, verdict, author, lesser), hub)
    if not gate.pull_request:
        return text, problems, lesser
    if results.outcome == ACCEPTED and _is_measured(forge, gate.head, problems):
        return text, problems, lesser
    word = results.outcome if results.outcome in {REJECTED, DISPUTED} else ACCEPTED
    _try(problems, lambda: forge.say(gate.pull_request, text, marker=VERDICT))
    _try(
        problems,
        lambda: forge.set_status(gate.head, Status(CHECK, STATES[word], one_line(results))),
    )
    others = [other for other in STATES if other != word]
    _try(lesser, lambda: forge.label(gate.pull_request, [word], remove=others))
    return text, problems, lesser


def _is_measured(forge: Forge, commit: str, problems: list[str]) -> bool:
    """Whether measurements of this head are told: the gate, which comes late, takes none back."""
    found: dict[str, Status] = {}
    _try(problems, lambda: found.update(forge.statuses(commit)))
    return CHECK in found and AGREE in found[CHECK].description


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
    branch = round_branch(record.round).removeprefix("refs/heads/")
    try:
        offer = Offer(branch, "main", title(record), report, ("round",), anew=True)
        return forge.propose(offer).url, ""
    except HubError as error:
        return "", error.in_full


def show_round(forge: Forge, record: Round, report: str, commit: str) -> str:
    """Open the pull request of a proposed round that has none; one that was closed stays closed.

    Args:
        forge: Where it is shown.
        record: The round.
        report: What a maintainer reads.
        commit: Of its branch. A fork may have a branch of that name, too: that is another one.

    Returns:
        What the forge refused, in words.
    """
    branch = round_branch(record.round).removeprefix("refs/heads/")
    try:
        for entry in forge.proposals(branch):
            if (entry.branch, entry.commit, entry.clone_url) == (branch, commit, None):
                return ""
        forge.propose(Offer(branch, "main", title(record), report, ("round",)))
    except HubError as error:
        return error.in_full
    return ""


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
