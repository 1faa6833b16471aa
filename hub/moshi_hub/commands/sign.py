"""``moshi-hub sign``: put one's signature under a round that somebody else proposed."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.console import Console
from moshi_fl.strategies import find_strategy
from moshi_hub.options import (
    maintainer,
    passphrase_from,
    passphrase_option,
    replica_for,
    upstream_option,
)

if TYPE_CHECKING:
    from moshi_fl.replica import Replica
    from moshi_hub.review import Signature


@click.command()
@click.argument("number", type=click.IntRange(1), metavar="[ROUND]", required=False)
@hub_option
@upstream_option
@passphrase_option
@output_options
def sign(
    console: Console,
    number: int | None,
    hub: str | None,
    upstream: str | None,
    passphrase_env: str,
) -> None:
    r"""Recompute a proposed round and sign it with your targets key; default: the next round.

    A round that does not extend the hub's, or whose weights are not what its contributions make,
    is not signed. Nor is one that takes another hub's round, unless --upstream shows that it does.
    Signing twice adds nothing.

    \b
    Examples:
      moshi-hub sign --hub ./hub.git
      moshi-hub sign 3
      moshi-hub sign --upstream https://git.example.org/team/model.git
    """
    done = sign_here(replica_for(hub), number, upstream, passphrase_env)
    record = done.record
    what = "Signed" if done.added else "Already signed:"
    console.done(
        f"{what} round {record.round}",
        round=record.round,
        weights=record.weights,
        signatures=done.have,
        needed=done.need,
        added=done.added,
    )
    for change in done.settings:
        console.warn(f"you have signed a change of hub.toml: {change}")
    where = f" --hub {shlex.quote(hub)}" if hub else ""
    if done.have >= done.need:
        console.hint(f"moshi-hub publish{where}   (makes it the current round)")
    else:
        console.note(f"{done.need - done.have} more maintainer(s) must sign it.")


def sign_here(
    replica: Replica, number: int | None, upstream: str | None, passphrase_env: str
) -> Signature:
    """Sign a round with this maintainer's keys; raises what ``sign_round`` does."""
    from moshi_hub.review import sign_round

    return sign_round(
        replica,
        number,
        passphrase=passphrase_from(passphrase_env),
        find_strategy=find_strategy,
        name=maintainer(),
        upstream=replica.beside(upstream) if upstream else None,
    )
