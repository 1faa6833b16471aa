"""``moshi-hub publish``: make a reviewed round the current one."""

from __future__ import annotations

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_hub.options import maintainer, passphrase_from, passphrase_option, replica_for


@click.command()
@hub_option
@click.option("--round", "number", type=click.IntRange(1), help="[default: the next one]")
@passphrase_option
@output_options
def publish(console: Console, hub: str | None, number: int | None, passphrase_env: str) -> None:
    r"""Publish a proposed round: fast-forward main, unless a forge did, and move `latest`.

    It takes the signatures of as many maintainers as the hub demands (`moshi-hub sign`), and the
    online key.

    \b
    Examples:
      moshi-hub publish --hub ./hub.git
    """
    from moshi_hub.merge import publish_round

    replica = replica_for(hub)
    record, leftovers = publish_round(
        replica, number, passphrase=passphrase_from(passphrase_env), name=maintainer()
    )
    console.done(f"Published round {record.round}", round=record.round, weights=record.weights)
    if leftovers:
        console.warn(f"the round is published, but the clean-up is not complete: {leftovers}")
