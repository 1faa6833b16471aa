"""``moshi-hub publish``: make a reviewed round the current one."""

from __future__ import annotations

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.replica import Replica
from moshi_hub.options import (
    maintainer,
    passphrase_from,
    passphrase_option,
    replica_for,
    upstream_option,
)


@click.command()
@hub_option
@click.option("--round", "number", type=click.IntRange(1), help="[default: the next one]")
@click.option(
    "--if-merged",
    is_flag=True,
    help="For a CI: only a round that main has already; else say so and end with status 0.",
)
@click.option("--sign", is_flag=True, help="First recompute and sign it, if a targets key is here.")
@upstream_option
@passphrase_option
@output_options
def publish(
    console: Console,
    *,
    hub: str | None,
    number: int | None,
    if_merged: bool,
    sign: bool,
    upstream: str | None,
    passphrase_env: str,
) -> None:
    r"""Publish a proposed round: fast-forward main, unless a forge did, and move `latest`.

    It takes the signatures of as many maintainers as the hub demands (`moshi-hub sign`), and the
    online key.

    \b
    Examples:
      moshi-hub publish --hub ./hub.git
      moshi-hub publish --if-merged --sign
    """
    if upstream and not sign:
        raise click.UsageError("--upstream is for --sign.")
    from moshi_hub.merge import publish_round

    replica, passphrase = replica_for(hub), passphrase_from(passphrase_env)
    if if_merged and not _is_merged(console, replica, number):
        return
    if sign:
        _sign(console, replica, number, upstream, passphrase_env)
    record, leftovers = publish_round(replica, number, passphrase=passphrase, name=maintainer())
    console.done(f"Published round {record.round}", round=record.round, weights=record.weights)
    if leftovers:
        console.warn(f"the round is published, but the clean-up is not complete: {leftovers}")


def _is_merged(console: Console, replica: Replica, number: int | None) -> bool:
    """Whether a proposed round is on main; if none is, what a run before left undone is done."""
    from moshi_hub.merge import finish
    from moshi_hub.pending import is_on_main

    if is_on_main(replica, number):
        return True
    for problem in finish(replica):
        console.warn(problem)
    console.done("No proposed round is on main: there is nothing to publish", round=None)
    return False


def _sign(
    console: Console,
    replica: Replica,
    number: int | None,
    upstream: str | None,
    passphrase_env: str,
) -> None:
    from moshi_hub.commands.sign import sign_here
    from moshi_hub.review import NoKeyHere, Unseen

    try:
        done = sign_here(replica, number, upstream, passphrase_env)
    except NoKeyHere:
        console.note("No targets key is here: the round needs the signatures that it has.")
        return
    except Unseen as error:
        console.warn(f"not signed, so it needs the signatures that it has: {error.in_full}")
        return
    for change in done.settings:
        console.warn(f"you have signed a change of hub.toml: {change}")
