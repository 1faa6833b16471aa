"""``moshi-fl status``: where the hub stands, and where one's own contributions are."""

from __future__ import annotations

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import Settings, ensure_home
from moshi_fl.console import Console
from moshi_fl.errors import CorruptRecord
from moshi_fl.evidence import MICRO
from moshi_fl.history import HubState, contribution_branch
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.signing import own_signer
from moshi_fl.store import redact
from moshi_fl.text import Moment, Size
from moshi_fl.trusted import read_ledger
from moshi_sdk.options import FIRST_CONTACT, hub_flag, settings_for, sync_manager
from moshi_sdk.privacy import Account
from moshi_sdk.runs import Run, Runs

SHOWN_ROUNDS = 10


@click.command()
@hub_option
@click.option("--offline", is_flag=True, help="Show what is known; do not ask the hub.")
@output_options
def status(console: Console, hub: str | None, offline: bool) -> None:
    r"""Show a hub's rounds, and what became of the contributions from this machine.

    \b
    Examples:
      moshi-fl status --hub ./hub.git
      moshi-fl status --json
    """
    settings = settings_for(hub=hub)
    manager = sync_manager(settings)
    snapshot = manager.pull(offline=offline)
    if not snapshot.online and not offline:
        console.warn(f"{snapshot.problem} This is what was last seen.")
    if snapshot.first_contact:
        console.note(FIRST_CONTACT)
    _show_hub(console, settings.hub, snapshot)
    console.table(_rounds(snapshot.state), name="rounds")
    resume = f"moshi-fl contribute{hub_flag(settings)} --resume"
    _show_privacy(console, snapshot)
    runs = _runs(manager.replica)
    rows = _contributions(runs, manager.replica, snapshot)
    if rows:
        console.table(rows, name="contributions")
        _show_credit(console, manager.replica, snapshot, settings)
        if not all(run.is_sent for run in runs):
            console.hint(f"{resume}   (continues or sends the newest unfinished one)")
    else:
        console.note("No contributions from this machine yet.")
        console.hint(f"moshi-fl contribute{hub_flag(settings)} --data PATH")


def _show_hub(console: Console, hub: str, snapshot: Snapshot) -> None:
    config, record = snapshot.state.config, snapshot.record
    console.result(
        hub=redact(hub),
        name=config.hub.name,
        model=f"{config.family}, {record.parameters:,} parameters",
        round=record.round,
        online=snapshot.online,
        root=snapshot.root,
    )


def _show_privacy(console: Console, snapshot: Snapshot) -> None:
    try:
        ledger = Account(ensure_home(), snapshot.state.config.hub.id).read()
    except CorruptRecord as error:
        console.warn(f"{error} Until it is mended or removed, nothing can be sent with --dp.")
        return
    if ledger.runs:
        row = {"epsilon": ledger.total, "delta": ledger.delta, "runs": len(ledger.runs)}
        console.table([row | {"newest_run": ledger.runs[-1].epsilon}], name="privacy")


def _rounds(state: HubState) -> list[dict[str, object]]:
    return [
        {
            "round": record.round,
            "published": Moment(record.created),
            "contributions": len(record.contributions),
            "held_out_loss": record.evaluation.after if record.evaluation else None,
            "update": Size(record.update.location.bytes) if record.update else None,
            "keyframe": Size(record.keyframe.bytes) if record.keyframe else None,
        }
        for record in state.manifest.rounds[-SHOWN_ROUNDS:]
    ]


def _runs(replica: Replica) -> list[Run]:
    return list(Runs(replica.folder / "runs"))[:SHOWN_ROUNDS]


Place = tuple[str, int] | None
"""Key and round of a contribution: a hub takes one of each."""


def _place(run: Run) -> Place:
    contribution = run.contribution()
    return (contribution.key, contribution.round) if contribution else None


def _contributions(
    runs: list[Run], replica: Replica, snapshot: Snapshot
) -> list[dict[str, object]]:
    """A row for each, with what became of it."""
    states = [_state(run, replica, snapshot) for run in runs]
    places = [_place(run) for run in runs]
    filled = {
        place
        for place, state in zip(places, states, strict=True)
        if state == "open" or state.startswith("in round")
    }
    return [
        _row(run, "replaced" if state == "not taken" and place in filled else state)
        for run, place, state in zip(runs, places, states, strict=True)
    ]


def _row(run: Run, state: str) -> dict[str, object]:
    contribution = run.contribution()
    return {
        "contribution": contribution.id[:12] if contribution else "-",
        "base": run.plan.base_round,
        "trained": run.plan.part,
        "steps": run.plan.training.steps,
        "own_loss": contribution.metrics.held_out_after if contribution else None,
        "state": state,
    }


def _state(run: Run, replica: Replica, snapshot: Snapshot) -> str:
    contribution = run.contribution()
    if contribution is None:
        return "training"
    if not run.is_sent:
        return "ready"
    if not snapshot.online:
        return "sent"
    for record in replica.chain(snapshot.state, min(contribution.round + 1, snapshot.round)):
        if any(merged.id == contribution.id for merged in record.contributions):
            return f"in round {record.round}"
    branch = contribution_branch(contribution.round, contribution.id)
    return "open" if replica.repo.remote_refs(branch) else "not taken"


def _show_credit(
    console: Console, replica: Replica, snapshot: Snapshot, settings: Settings
) -> None:
    """The sum of measured gains that this machine's key has earned so far."""
    if not snapshot.online:
        return
    key = own_signer(ensure_home(), settings.own_key).public_key
    main = replica.fetch_main()
    rounds = replica.chain(snapshot.state, 0)
    ledgers = (read_ledger(replica.repo, main, record) for record in rounds)
    entries = [e for ledger in ledgers if ledger for e in ledger.entries if e.key == key]
    console.result(
        merged=len(entries), credit=round(sum(entry.credit for entry in entries) / MICRO, 6)
    )
