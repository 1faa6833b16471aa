"""``moshi-hub attest``: an evaluator's next step."""

from __future__ import annotations

from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import HubError
from moshi_fl.replica import Replica
from moshi_hub.options import replica_for


@click.command()
@click.argument("contribution", required=False, metavar="[ID]")
@hub_option
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Sign with this SSH key. [default: the setting 'signing_key', or one made for you]",
)
@click.option("--local", is_flag=True, help="Measure the contribution ID and print; sign nothing.")
@output_options
def attest(
    console: Console, contribution: str | None, hub: str | None, key: Path | None, local: bool
) -> None:
    r"""Do your next step as an appointed evaluator: join, reveal, measure and commit, reveal.

    Run it now and then, or from a timer: what is done is not done twice. It takes the sealed pool
    (`moshi-hub pool import FILE`) and a seat (`moshi-hub evaluators add KEY`).

    \b
    Examples:
      moshi-hub attest
      moshi-hub attest 4f1c09 --local
    """
    if local != (contribution is not None):
        raise click.UsageError("an ID and --local belong together.")
    replica = replica_for(hub)
    if contribution:
        _print(console, replica, contribution)
    else:
        _advance(console, replica, key)


def _advance(console: Console, replica: Replica, key: Path | None) -> None:
    from moshi_fl.session import read_session
    from moshi_fl.signing import own_signer
    from moshi_fl.trusted import read_evaluators
    from moshi_hub.board import RefBoard
    from moshi_hub.chair import next_step
    from moshi_hub.evaluation import desk_for
    from moshi_hub.host import evaluator
    from moshi_hub.merge import look

    signer = own_signer(ensure_home(), key.expanduser() if key else load_settings().own_key)
    with replica.workspace() as folder:
        found = look(replica, folder)
        listed = read_evaluators(replica.repo, found.main)
        if listed is None:
            raise HubError(
                "this hub has appointed no evaluators.",
                hint="moshi-hub evaluators add KEY   (a maintainer does this)",
            )
        board = RefBoard(replica.repo, found.snapshot.state.refs, found.snapshot.round + 1)
        who = evaluator(
            replica,
            signer,
            lambda: desk_for(replica, found, folder / "deltas"),
            listed.anchors[-1:],
        )
        done = who.advance(board)
    for words in done:
        console.note(words)
    there = board.read()
    step = next_step(read_session(there)) if "opening" in there else "open"
    what = "Done what can be done now" if done else "Nothing to do now"
    console.done(what, evaluator=who.id, done=done, next_step=step or "decided")


def _print(console: Console, replica: Replica, start: str) -> None:
    import numpy as np

    from moshi_fl.consensus import gain
    from moshi_hub.evaluation import desk_for, named
    from moshi_hub.measure import Meter
    from moshi_hub.merge import look

    with replica.workspace() as folder:
        found = look(replica, folder)
        entry = named(found.accepted, start)
        desk = desk_for(replica, found, folder / "deltas")
        rules = found.rules.config.evaluation
        meter = Meter(desk, rules.precision, rules.share)
        everything = list(range(meter.size()))
        before = np.array(meter.base_losses(entry.round, everything))
        after = np.array(meter.after_losses(entry, everything))
    measured = gain(before, after)
    console.result(
        contribution=entry.id,
        verdict=measured.outcome,
        loss_before=float(before.mean()) / 1e6,
        loss_after=float(after.mean()) / 1e6,
        gain=measured.mean / 1e6,
        standard_error=measured.standard_error / 1e6,
        sequences=len(everything),
    )
