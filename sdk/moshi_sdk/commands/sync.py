"""``moshi-fl sync``: bring the newest round here."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.text import Duration, Moment, Size
from moshi_sdk.options import (
    FIRST_CONTACT,
    attestations_option,
    root_option,
    settings_for,
    sync_manager,
)


@click.command()
@hub_option
@click.option("--round", "number", type=click.IntRange(0), help="This round, not the newest.")
@click.option("--offline", is_flag=True, help="Use what is on this machine; do not ask the hub.")
@root_option
@attestations_option
@output_options
def sync(
    console: Console,
    hub: str | None,
    number: int | None,
    offline: bool,
    root: str,
    min_attestations: int | None,
) -> None:
    r"""Fetch the hub's model and verify it: signatures, chain of rounds, hashes, digest.

    When the hub cannot be reached, or its signatures have expired, the newest round on this
    machine is used and its age is told.

    \b
    Examples:
      moshi-fl sync --hub ./hub.git
      moshi-fl sync --round 3 --json
    """
    settings = settings_for(hub=hub, min_attestations=min_attestations)
    manager = sync_manager(settings, root)
    started = time.monotonic()
    snapshot = manager.pull(number, offline=offline)
    record = snapshot.record
    checked = datetime.fromtimestamp(snapshot.checked, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if not snapshot.online and not offline:
        age = Duration(max(0.0, time.time() - snapshot.checked))
        console.warn(f"{snapshot.problem} This is what was last seen, {age} ago, at {checked}.")
    if snapshot.first_contact:
        console.note(FIRST_CONTACT)
    current = not snapshot.received and record.round == snapshot.state.newest.round
    what = f"Round {record.round} is {'current' if current else 'here'}"
    console.done(
        what if snapshot.online else f"Round {record.round} from the cache",
        round=record.round,
        published=Moment(record.created),
        parameters=record.parameters,
        held_out_loss=record.evaluation.after if record.evaluation else None,
        weights=record.weights,
        root=snapshot.root,
        file=snapshot.path,
        received=Size(snapshot.received),
        seconds=Duration(time.monotonic() - started),
        online=snapshot.online,
        checked=Moment(checked),
    )
