"""``moshi-hub attest``: an evaluator's next step."""

from __future__ import annotations

from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import HubError
from moshi_fl.evidence import MICRO
from moshi_fl.records import dump
from moshi_fl.replica import Replica
from moshi_hub.options import SEAT, replica_for


@click.command()
@click.argument("contribution", required=False, metavar="[ID]")
@hub_option
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Sign with this SSH key. [default: the setting 'signing_key', or one made for you]",
)
@click.option("--local", is_flag=True, help="Measure the contribution ID and print; sign nothing.")
@click.option(
    "--verdict",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure what this file of `verify --out` accepts, while its head has not moved.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what --verdict made measure to this file, for other jobs.",
)
@click.option("--seat", metavar="NAME", default="1", type=SEAT, help="Who measures, in that file.")
@output_options
def attest(
    console: Console,
    *,
    contribution: str | None,
    hub: str | None,
    key: Path | None,
    local: bool,
    verdict: Path | None,
    out: Path | None,
    seat: str,
) -> None:
    r"""Do your next step as an appointed evaluator: join, reveal, measure and commit, reveal.

    Run it now and then, or from a timer: what is done is not done twice. It takes the sealed pool
    (`moshi-hub pool import FILE`) and a seat (`moshi-hub evaluators add KEY`).

    \b
    Examples:
      moshi-hub attest
      moshi-hub attest 4f1c09 --local
      moshi-hub attest --verdict verdict.json --out measure-1.json --seat 1
    """
    if (verdict is None) != (out is None) or (verdict and (contribution or local)):
        raise click.UsageError("--verdict and --out belong together, and take no ID.")
    if verdict and out:
        _measure(console, replica_for(hub), verdict, out, seat)
        return
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
    from moshi_hub.agenda import next_step
    from moshi_hub.board import RefBoard
    from moshi_hub.evaluation import desk_for
    from moshi_hub.host import evaluator
    from moshi_hub.opened import look

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


def _measure(console: Console, replica: Replica, verdict: Path, out: Path, seat: str) -> None:
    from moshi_fl.weights import write_atomic
    from moshi_hub.gauge import measurement
    from moshi_hub.pinned import pinned
    from moshi_hub.results import read_gate
    from moshi_hub.sealed import open_sealed_pool

    gate = read_gate(verdict)
    if gate.findings:
        console.note(f"Rejected ({gate.findings[0].code}): there is nothing to measure.")
        return
    if not open_sealed_pool(replica):
        console.warn("the held-out pool is not on this machine: nothing is measured.")
        console.hint("moshi-hub pool seal   (its output is the secret MOSHI_HUB_POOL_KEY)")
        return
    with pinned(replica, gate.head) as one:
        found = measurement(replica, one, seat)
    write_atomic(out, dump(found))
    console.done(
        f"Measured {found.contribution[:12]}",
        verdict=found.outcome,
        loss_before=found.before / MICRO,
        loss_after=found.after / MICRO,
        losses=found.losses,
    )


def _print(console: Console, replica: Replica, start: str) -> None:
    from moshi_hub.evaluation import named
    from moshi_hub.gauge import gauge
    from moshi_hub.opened import look

    with replica.workspace() as folder:
        found = look(replica, folder)
        entry = named(found.accepted, start)
        result = gauge(replica, found, entry, folder)
    measured = result.gain
    console.result(
        contribution=entry.id,
        verdict=measured.outcome,
        loss_before=float(result.before.mean()) / MICRO,
        loss_after=float(result.after.mean()) / MICRO,
        gain=measured.mean / MICRO,
        standard_error=measured.standard_error / MICRO,
        sequences=len(result.before),
    )
