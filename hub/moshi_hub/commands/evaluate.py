"""``moshi-hub evaluate``: the hub's next step in the evaluation of what shall become a round."""

from __future__ import annotations

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home
from moshi_fl.console import Console
from moshi_fl.errors import Exit, HubError
from moshi_fl.evidence import MICRO, Verdicts
from moshi_hub.options import replica_for

STEPS = ("open", "close", "draw", "seal", "decide")


@click.command()
@hub_option
@click.option(
    "--step",
    type=click.Choice(STEPS),
    help="Do this step now, whoever is still awaited; it must be the next.",
)
@click.option("--local", is_flag=True, help="All steps in one go, by processes of this machine.")
@output_options
def evaluate(console: Console, hub: str | None, step: str | None, local: bool) -> int:
    r"""Evaluate the open contributions on held-out data, together with the appointed evaluators.

    Does what the hub can do now, its anchor's measurements included. The status is 4 while others
    are awaited: run it again when they have run `moshi-hub attest`, or when their time is over.
    `moshi-hub merge` then goes by the verdicts.

    \b
    Examples:
      moshi-hub evaluate
      moshi-hub evaluate --step close
      moshi-hub evaluate --local
    """
    if local and step:
        raise click.UsageError("--local does all steps; leave out --step.")
    from moshi_hub.evaluation import run_locally
    from moshi_hub.opened import look

    replica = replica_for(hub)
    with replica.workspace() as folder:
        found = look(replica, folder)
        if not found.accepted:
            raise HubError(
                f"no accepted contribution to round {found.rules.round} is open.",
                hint="moshi-hub verify   (shows each open contribution and why it was rejected)",
            )
        home, mode = ensure_home(), found.rules.config.evaluation.evaluators
        if local or mode == "local":
            decided = run_locally(replica, found, folder, home, console.note)
            return _show(console, decided.verdicts)
        from moshi_hub.evaluation import board_for, chair_for
        from moshi_hub.host import host

        chair = chair_for(replica, found, folder, home, "appointed")
        state = host(replica, chair, board_for(replica, chair), step, console.note)
    if state.verdicts:
        return _show(console, state.verdicts)
    console.result(next_step=state.next_step, awaited=state.awaited, done=state.done)
    console.hint("moshi-hub evaluate   (again, when the awaited have run `moshi-hub attest`)")
    return Exit.MORE_ATTESTATIONS


def _show(console: Console, verdicts: Verdicts) -> int:
    rows = [
        {
            "contribution": entry.submission[:12],
            "verdict": entry.outcome,
            "gain": entry.gain / MICRO,
            "standard_error": entry.standard_error / MICRO,
            "attesters": len(entry.attesters),
            "reason": entry.reason,
        }
        for entry in verdicts.judged
    ]
    shown = ["contribution", "verdict", "gain", "standard_error", "attesters"]
    console.table(rows, shown + ["reason"] * any(row["reason"] for row in rows), name="verdicts")
    for tally in verdicts.tallies:
        if tally.lies:
            console.warn(f"the referee has proven that {tally.key[:60]}… lied.")
    console.done(f"The evaluation of round {verdicts.round} is decided", next_step="")
    return Exit.DONE
