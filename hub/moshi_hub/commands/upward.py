"""``moshi-hub upward``: contribute this hub's rounds to another hub, and take that one's."""

from __future__ import annotations

import shlex
from typing import Any

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home
from moshi_fl.console import Console
from moshi_fl.text import Size
from moshi_hub.options import maintainer, passphrase_from, passphrase_option, replica_for


@click.command()
@hub_option
@click.option("--upstream", metavar="URL", required=True, help="The hub that it began with.")
@click.option("--publish", is_flag=True, help="Publish a taken round at once; else it is proposed.")
@passphrase_option
@output_options
def upward(
    console: Console, hub: str | None, upstream: str, publish: bool, passphrase_env: str
) -> None:
    r"""Send what this hub's rounds learned to another hub, and take that one's newest round.

    The other hub is the one that this began with (moshi-hub init --upstream). What is sent is one
    contribution, signed by this hub's anchor; that hub's maintainers judge it as any other. It
    takes one for each of its rounds. Once all is sent, its newest round becomes this hub's next,
    as it is. To be run again and again, say from a timer: nothing is sent twice.

    \b
    Examples:
      moshi-hub upward --hub ./west.git --upstream https://git.example.org/team/model.git --publish
    """
    from moshi_hub.bridge import Bridge
    from moshi_hub.heldout import evaluator_for
    from moshi_hub.merge import Options
    from moshi_hub.pending import NothingToMerge
    from moshi_hub.samples import sampler
    from moshi_hub.taking import take
    from moshi_hub.upward import send

    replica = replica_for(hub)
    bridge = Bridge(replica, replica.beside(upstream))
    sent = send(bridge, ensure_home(), console.note)
    if sent:
        _tell_sent(console, sent)
    try:
        taken = take(
            bridge,
            Options(publish=publish, name=maintainer()),
            evaluator=evaluator_for(replica),
            passphrase=passphrase_from(passphrase_env),
            sampler=sampler(),
        )
    except NothingToMerge as error:
        console.done(f"Nothing to take: {error}", upstream_round=bridge.above.round)
        return
    if taken:
        _tell_taken(console, taken, publish, f" --hub {shlex.quote(hub)}" if hub else "")
    elif not sent:
        waits = bridge.first_unsent() < bridge.below.round
        console.done(
            "Nothing to do: the other hub has yet to make a round of what was sent"
            if waits
            else "Nothing to do: all is sent, and there is no newer round",
            unsent=bridge.below.round - bridge.first_unsent(),
            upstream_round=bridge.above.round,
        )


def _tell_sent(console: Console, sent: Any) -> None:
    entry, passed = sent.contribution, sent.passed
    what = "The other hub already had" if sent.sent.again else "Sent"
    console.done(
        f"{what} rounds {passed.first + 1} to {passed.last}",
        contribution=entry.id,
        upstream_round=entry.round,
        rounds=passed.last - passed.first,
        examples=entry.num_examples,
        delta=Size(entry.delta.bytes),
        **({"pull_request": sent.url} if sent.url else {}),
    )
    if sent.problem:
        console.warn(f"the branch is pushed, but there is no pull request: {sent.problem}")


def _tell_taken(console: Console, taken: Any, publish: bool, where: str) -> None:
    from moshi_fl.upstream import origin_of

    record = taken.built.record
    origin = origin_of(record)
    assert origin is not None
    console.done(
        f"{'Published' if publish else 'Proposed'} round {record.round}: "
        f"round {origin.round} of hub {origin.hub}",
        round=record.round,
        taken=origin.round,
        held_out_before=record.evaluation.before if record.evaluation else None,
        held_out_after=record.evaluation.after if record.evaluation else None,
        update=Size(taken.update_bytes),
        keyframe=Size(taken.keyframe_bytes) if taken.keyframe_bytes else None,
        weights=record.weights,
    )
    if taken.leftovers:
        console.warn(f"not all is done: {taken.leftovers}")
    if not publish:
        console.hint(f"moshi-hub publish{where}   (after review: makes it the current round)")
