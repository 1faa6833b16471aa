"""``moshi-hub verify``: judge open contributions."""

from __future__ import annotations

from collections.abc import Mapping

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.errors import Exit, HubError
from moshi_fl.forge import Proposal
from moshi_fl.signing import fingerprint
from moshi_fl.text import Size
from moshi_hub.options import maintainer, replica_for
from moshi_hub.verify import Verdict


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@hub_option
@click.option(
    "--record", is_flag=True, help="Put on the hub which contributions were seen first; push it."
)
@click.option("--comment", is_flag=True, help="Say the verdicts on their pull requests.")
@output_options
def verify(
    console: Console, ids: tuple[str, ...], hub: str | None, record: bool, comment: bool
) -> int:
    r"""Check open contributions against the hub's rules, without running any of them.

    Without an ID, all of them. The status is 3 when one is rejected.

    \b
    Examples:
      moshi-hub verify --hub ./hub.git
      moshi-hub verify 4f1c09 --json
      moshi-hub verify --record --comment
    """
    from moshi_hub.intake import publish_intake
    from moshi_hub.merge import announce, look
    from moshi_hub.publish import author

    replica = replica_for(hub)
    with replica.workspace() as folder:
        found = look(replica, folder)
    if found.arrivals.problem:
        console.warn(found.arrivals.problem)
    told = announce(found) if comment else []
    for problem in (*found.offers.problems, *told):
        console.warn(problem)
    if record:
        names, intake = found.snapshot.state.refs, found.arrivals.intake
        publish_intake(replica, names, intake, author(maintainer()))
        console.note(f"On record: {len(intake.seen)} open, in the order of first sight.")
    verdicts = [verdict for verdict in found.verdicts if _asked(verdict, ids)]
    if ids and not verdicts:
        raise HubError(
            f"no open contribution begins with {' or '.join(ids)}.",
            hint="moshi-hub verify   (lists all)",
        )
    if not verdicts:
        console.note(f"No open contributions to round {found.rules.round}.")
    shown = found.offers.pull_requests
    rows = [_row(verdict, shown) for verdict in verdicts]
    console.table(
        rows, ["contribution", "contributor", "base", "size", "norm", "verdict"], name="verdicts"
    )
    for verdict in verdicts:
        for finding in verdict.findings:
            console.note(f"{_name(verdict)}: {finding.code}: {finding.message}")
    rejected = sum(not verdict.accepted for verdict in verdicts)
    console.result(accepted=len(verdicts) - rejected, rejected=rejected)
    return Exit.REJECTED if rejected else Exit.DONE


def _asked(verdict: Verdict, ids: tuple[str, ...]) -> bool:
    return not ids or any(verdict.branch.rsplit("/", 1)[-1].startswith(start) for start in ids)


def _name(verdict: Verdict) -> str:
    return verdict.contribution.id[:12] if verdict.contribution else verdict.branch


def _row(verdict: Verdict, shown: Mapping[str, Proposal]) -> dict[str, object]:
    record, proposal = verdict.contribution, shown.get(verdict.branch)
    return {
        "contribution": _name(verdict),
        "contributor": record.contributor if record else None,
        "key": fingerprint(record.key) if record and verdict.signature else None,
        "base": record.round if record else None,
        "size": Size(record.delta.bytes) if record else None,
        "norm": None if verdict.norm is None else round(verdict.norm, 4),
        "verdict": "accepted" if verdict.accepted else verdict.findings[0].code,
        "branch": verdict.branch,
        "pull_request": proposal.number if proposal else None,
        "login": proposal.author if proposal else None,
        "findings": [{"code": f.code, "message": f.message} for f in verdict.findings],
    }
