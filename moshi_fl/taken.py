"""Compares a round that takes another hub's weights with that hub itself.

Whoever signs such a round and whoever audits it asks the same question.
"""

from __future__ import annotations

from moshi_fl.errors import UntrustedHub
from moshi_fl.records import Round
from moshi_fl.replica import Replica
from moshi_fl.upstream import Origin


def check_taken(record: Round, origin: Origin, upstream: Replica) -> None:
    """Insist that a round is the one of another hub that it says it takes: weights and tokenizer.

    Args:
        record: The round.
        origin: What it says it takes.
        upstream: The other hub.

    Raises:
        UntrustedHub: It is not, or this is a third hub.
        HubError: The other hub cannot be reached.
    """
    state, there = upstream.look(), upstream.repo.shown_url
    if state.config.hub.id != origin.hub:
        raise UntrustedHub(
            f"round {record.round} takes a round of hub {origin.hub}; "
            f"{there} is {state.config.hub.id}."
        )
    if origin.round <= state.newest.round:
        theirs = upstream.chain(state, origin.round)[0]
        if (theirs.weights, theirs.tokenizer) == (record.weights, record.tokenizer):
            return
    raise UntrustedHub(
        f"round {record.round} is not round {origin.round} of {there}, which it says it takes."
    )
