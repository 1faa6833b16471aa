"""A contribution as a pull request, where the hub is on a forge."""

from __future__ import annotations

from moshi_fl.config import load_settings
from moshi_fl.errors import HubError
from moshi_fl.forge import Forge, Offer, open_forge
from moshi_fl.history import contribution_branch
from moshi_fl.records import Contribution
from moshi_fl.replica import Replica
from moshi_fl.signing import fingerprint
from moshi_fl.store import HubRepo
from moshi_fl.text import Size, markdown

LABEL = "contribution"


def forge_of(replica: Replica) -> Forge:
    """The forge of a hub, by its address and the setting ``github_api``."""
    return open_forge(replica.repo, load_settings().github_api)


def pushing_to(forge: Forge, replica: Replica) -> HubRepo:
    """The store that pushes where this user may: to the hub, or to their fork of it.

    Raises:
        ForgeError: The forge refuses or cannot be reached.
    """
    url = forge.push_url()
    if url == replica.repo.url:
        return replica.repo
    own = replica.repo
    return HubRepo(own.path, url, timeout=replica.timeout, token_for=own.token_for)


def propose(forge: Forge, contribution: Contribution) -> tuple[str, str]:
    """Open the contribution's pull request, or find the one there is.

    Returns:
        Its page, or the page on which it can be opened (empty where there is no forge); and why
        there is none: the branch is pushed all the same.
    """
    try:
        return forge.propose(offer_of(contribution)).url, ""
    except HubError as error:
        return "", error.in_full


def offer_of(contribution: Contribution) -> Offer:
    """What a reviewer reads first. Its text follows from the record alone."""
    number, name = contribution.round, contribution.contributor
    branch = contribution_branch(number, contribution.id).removeprefix("refs/heads/")
    title = f"Contribution {contribution.id[:12]} to round {number}"
    return Offer(branch, "main", title, _body(contribution, name), (LABEL,))


def _body(contribution: Contribution, name: str) -> str:
    training, losses = contribution.training, contribution.metrics
    rows = {
        "contributor": markdown(name),
        "signed by": f"`{fingerprint(contribution.key)}`",
        "made on": f"round {contribution.round}",
        "delta": f"{Size(contribution.delta.bytes)}, {contribution.codec}",
        "trained": f"{training.steps:,} steps of {training.batch_size} windows",
        "own loss": _losses(losses.held_out_before, losses.held_out_after),
        "software": markdown(contribution.software),
    }
    if contribution.privacy:
        privacy = contribution.privacy
        rows["privacy"] = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(
        [
            "A signed record; the delta lies beside it. What it says are its contributor's claims;",
            "the hub's own verdict follows as a comment.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
        ]
    )


def _losses(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.4f} to {after:.4f}"
