"""``moshi-hub merge``: make the next round."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home
from moshi_fl.console import Console
from moshi_fl.hubfile import changed_settings
from moshi_fl.records import Round
from moshi_fl.strategies import find_strategy
from moshi_fl.text import Percent, Size
from moshi_hub.options import maintainer, passphrase_from, passphrase_option, replica_for


@click.command()
@hub_option
@click.option("--publish", is_flag=True, help="Publish at once; otherwise the round is proposed.")
@click.option("--strategy", help="Aggregate by this instead of the hub's strategy, this once.")
@click.option("--exclude", multiple=True, metavar="ID", help="Leave this contribution out.")
@click.option(
    "--eval-data",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Held-out files to measure this and later merges on; they stay on this machine.",
)
@click.option("--accept", multiple=True, metavar="ID", help="Take this disputed contribution.")
@click.option("--prompt", multiple=True, metavar="TEXT", help="The report shows what follows.")
@click.option("--dry-run", is_flag=True, help="Compute and report; push nothing.")
@click.option(
    "--if-ready",
    is_flag=True,
    help="For a timer: where there is nothing to merge, say so and end with status 0.",
)
@passphrase_option
@output_options
def merge(  # noqa: PLR0913 - one parameter an option
    console: Console,
    *,
    hub: str | None,
    publish: bool,
    strategy: str | None,
    exclude: tuple[str, ...],
    eval_data: tuple[Path, ...],
    accept: tuple[str, ...],
    prompt: tuple[str, ...],
    dry_run: bool,
    if_ready: bool,
    passphrase_env: str,
) -> None:
    r"""Verify the open contributions, aggregate the accepted ones, and make the next round.

    Without --publish the round is proposed on branch round/<n>, for review; `moshi-hub publish`
    then makes it the current one. Of two merges at the same time, exactly one is published.

    \b
    Examples:
      moshi-hub merge --hub ./hub.git --publish
      moshi-hub merge --dry-run --strategy median
      moshi-hub merge --if-ready
    """
    from moshi_hub.chair import MoreAttestations
    from moshi_hub.evaluation import gate_for
    from moshi_hub.figures import explainer
    from moshi_hub.heldout import evaluator_for, store_pool
    from moshi_hub.merge import Options, Outcome
    from moshi_hub.merge import merge as run
    from moshi_hub.pending import NothingToMerge
    from moshi_hub.samples import sampler
    from moshi_hub.sealed import open_sealed_pool

    replica = replica_for(hub)
    if eval_data:
        state = replica.look()
        store_pool(replica, state.config, state.tokenizer, eval_data)
    open_sealed_pool(replica)
    options = Options(publish, dry_run, strategy, exclude, accept, maintainer(), if_ready)
    try:
        outcome: Outcome = run(
            replica,
            options,
            evaluator=evaluator_for(replica),
            find_strategy=find_strategy,
            passphrase=passphrase_from(passphrase_env),
            gate=gate_for(replica, ensure_home(), _measured(console)),
            sampler=sampler(prompt),
            explainer=explainer(replica),
        )
    except (NothingToMerge, MoreAttestations) as error:
        if not if_ready:
            raise
        console.done(f"Nothing to merge: {error}", round=None)
        return
    if outcome.open_round.arrivals.problem:
        console.warn(outcome.open_round.arrivals.problem)
    _contributions(console, outcome)
    published = outcome.open_round.snapshot.state.config
    for change in changed_settings(published, outcome.open_round.rules.config):
        console.warn(f"main's hub.toml is not the one last signed: {change}")
    record = outcome.built.record if outcome.built else outcome.proposal.record
    done = {True: "Published", False: "Proposed"}[publish] if not dry_run else "Computed"
    console.done(
        f"{done} round {record.round}{_gain(record)}",
        round=record.round,
        contributions=len(record.contributions),
        rejected=len(outcome.open_round.verdicts) - len(outcome.open_round.accepted),
        held_out_before=record.evaluation.before if record.evaluation else None,
        held_out_after=record.evaluation.after if record.evaluation else None,
        update=Size(outcome.update_bytes),
        keyframe=Size(outcome.keyframe_bytes) if outcome.keyframe_bytes else None,
        weights=record.weights,
        **({"pull_request": outcome.page} if outcome.page else {}),
    )
    if outcome.leftovers:
        done = "published, but not all is cleaned up" if publish else "proposed, but not shown"
        console.warn(f"the round is {done}: {outcome.leftovers}")
    if dry_run:
        console.hint("The same without --dry-run proposes it, or makes it current with --publish.")
    elif not publish:
        where = f" --hub {shlex.quote(hub)}" if hub else ""
        console.hint(f"moshi-hub publish{where}   (after review: makes it the current round)")


def _measured(console: Console) -> Callable[[str], None]:
    """Of an evaluation's steps, those that take time; `moshi-hub evaluate` tells all."""

    def tell(step: str) -> None:
        if "measured" in step:
            console.note(step)

    return tell


def _gain(record: Round) -> str:
    if record.evaluation is None:
        return ""
    before, after = record.evaluation.before, record.evaluation.after
    return f": held-out loss {before:.4f} -> {after:.4f}"


def _contributions(console: Console, outcome: object) -> None:
    from moshi_hub.merge import Outcome

    assert isinstance(outcome, Outcome)
    record = outcome.proposal.record
    total = sum(merged.weight for merged in record.contributions)
    trained = outcome.open_round.trained
    rows = []
    for merged in record.contributions:
        entry = outcome.proposal.contributions[merged.id]
        rows.append(
            {
                "contribution": merged.id[:12],
                "contributor": entry.contributor,
                "base": merged.base_round,
                "trained": trained.get(merged.id),
                "examples": entry.num_examples,
                "share": Percent(merged.weight / total),
                "own_loss": entry.metrics.held_out_after,
                "size": Size(entry.delta.bytes),
                "verdict": "accepted",
            }
        )
    for verdict in outcome.open_round.verdicts:
        if not verdict.accepted:
            name = verdict.contribution.id[:12] if verdict.contribution else verdict.branch
            finding = verdict.findings[0]
            rows.append({"contribution": name, "verdict": finding.code})
            console.note(f"{name}: {finding.code}: {finding.message}")
    shown = ["contribution", "contributor", "base", "trained", "examples", "share", "own_loss"]
    if all(merged.base_round == record.round - 1 for merged in record.contributions):
        shown.remove("base")
    if all(str(part).startswith("all:") for part in trained.values()):
        shown.remove("trained")
    console.table(rows, [*shown, "size", "verdict"], name="table")
