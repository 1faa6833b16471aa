"""``moshi-hub verify``: judge open contributions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.errors import Exit, HubError
from moshi_fl.forge import Proposal
from moshi_fl.replica import Replica
from moshi_fl.signing import fingerprint
from moshi_fl.text import Size
from moshi_hub.options import COMMIT, maintainer, replica_for
from moshi_hub.verify import Verdict

COLUMNS = ("contribution", "contributor", "base", "size", "norm", "verdict")


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@hub_option
@click.option(
    "--record", is_flag=True, help="Put on the hub which contributions were seen first; push it."
)
@click.option("--comment", is_flag=True, help="Say the verdicts on their pull requests.")
@click.option(
    "--head", metavar="COMMIT", type=COMMIT, help="Only what has this commit as its head."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the verdict on --head to this file, for other jobs; rejecting is no failure then.",
)
@output_options
def verify(
    console: Console,
    *,
    ids: tuple[str, ...],
    hub: str | None,
    record: bool,
    comment: bool,
    head: str | None,
    out: Path | None,
) -> int:
    r"""Check open contributions against the hub's rules, without running any of them.

    Without an ID, all of them. The status is 3 when one is rejected. With --head, one is judged
    beside what its repository has open by the same key: that it copies another's, a merge will say.

    \b
    Examples:
      moshi-hub verify --hub ./hub.git
      moshi-hub verify 4f1c09 --json
      moshi-hub verify --record --comment
      moshi-hub verify --head "$HEAD" --out verdict.json
    """
    if (head is None) != (out is None):
        raise click.UsageError("--head and --out belong together.")
    if head and out:
        if ids or record or comment:
            raise click.UsageError("--head is the only one that --out takes.")
        return _judge_head(console, replica_for(hub), head, out)
    return _judge_all(console, replica_for(hub), ids, record=record, comment=comment)


def _judge_head(console: Console, replica: Replica, head: str, out: Path) -> int:
    from moshi_fl.weights import write_atomic
    from moshi_hub.pinned import pinned

    with pinned(replica, head) as one:
        write_atomic(out, one.as_result())
        verdict, shown = one.verdict, one.found.offers.pull_requests
    console.table([_row(verdict, shown)], COLUMNS, name="verdicts")
    for finding in verdict.findings:
        console.note(f"{_name(verdict)}: {finding.code}: {finding.message}")
    console.result(accepted=int(verdict.accepted), rejected=int(not verdict.accepted))
    return Exit.DONE


def _judge_all(
    console: Console, replica: Replica, ids: tuple[str, ...], *, record: bool, comment: bool
) -> int:
    from moshi_hub.announce import announce
    from moshi_hub.intake import publish_intake
    from moshi_hub.opened import look
    from moshi_hub.publish import author

    with replica.workspace() as folder:
        found = look(replica, folder)
    if found.arrivals.problem:
        console.warn(found.arrivals.problem)
    told = announce(replica, found) if comment else []
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
    console.table(rows, COLUMNS, name="verdicts")
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
