"""A hub that stands on another: the rounds in which it takes the other's weights as they are.

Such a round has the strategy ``upstream``, whose options name the other hub, its round and that
round's weights. No contribution makes it. Whoever follows the hub needs nothing of the other one;
whoever audits it can compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from moshi_fl.errors import UntrustedHub
from moshi_fl.records import HubId, Record, Round, RoundNumber, Sha256, Strategy

UPSTREAM = "upstream"


class Origin(Record, frozen=True, kw_only=True):
    """A round of another hub, and the digest of its weights."""

    hub: HubId
    round: RoundNumber
    weights: Sha256

    @classmethod
    def of(cls, record: Round) -> Origin:
        """That round."""
        return cls(hub=record.hub, round=record.round, weights=record.weights)

    @property
    def strategy(self) -> Strategy:
        """How a round that takes these weights says so."""
        return Strategy(name=UPSTREAM, options=msgspec.to_builtins(self))


@dataclass(frozen=True)
class Stand:
    """Where a hub last took another's weights.

    Attributes:
        number: Its own round that did.
        origin: What it took.
    """

    number: int
    origin: Origin


def takes_upstream(record: Round) -> bool:
    """Whether a round is another hub's, taken as it is."""
    return record.strategy is not None and record.strategy.name == UPSTREAM


def origin_of(record: Round) -> Origin | None:
    """What a round takes of another hub; None when it is made of contributions.

    Raises:
        UntrustedHub: It says so, and does not have what such a round has.
    """
    if record.strategy is None or not takes_upstream(record):
        return None
    try:
        origin = msgspec.convert(record.strategy.options, Origin)
    except msgspec.ValidationError as error:
        raise _false(record, f"its options: {error}") from error
    if origin.weights != record.weights:
        raise _false(record, "its weights are not those that it says it took")
    if origin.hub == record.hub:
        raise _false(record, "the other hub is itself")
    if record.contributions or record.archive or record.verdicts:
        raise _false(record, "it has contributions of its own")
    if record.update and record.update.kind != "step":
        raise _false(record, "its update is no step")
    return origin


def _false(record: Round, why: str) -> UntrustedHub:
    return UntrustedHub(f"round {record.round} does not take over another hub's round: {why}.")


def stand_of(rounds: Iterable[Round]) -> Stand | None:
    """Where a hub last took another's weights, by its rounds in order; None when it never did."""
    found = None
    for record in rounds:
        if origin := origin_of(record):
            found = Stand(record.round, origin)
    return found
