"""Rules of a round that a merger applies and an auditor checks; pure functions of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moshi_fl.aggregate.robust import next_running_norm
from moshi_fl.hubfile import AggregationRules, VocabularyRules
from moshi_fl.records import Contribution, Round, Scalar, Weighting
from moshi_fl.sshsig import parse_key
from moshi_fl.weights import Weights

Shapes = Mapping[str, tuple[int, ...]]

EQUAL_WEIGHT = 1_000_000
"""What each contribution weighs by the rule ``equal``, before it is discounted."""

MEASURES_NORMS = frozenset({"robust"})
"""Strategies that go by the norms of earlier rounds, and so record those of theirs."""


class Claim(NamedTuple):
    """What a contribution's weight goes by."""

    owner: str
    num_examples: int
    age: int


def owner_of(contribution: Contribution) -> str:
    """Who stands behind a contribution whose signature was checked: its key's fingerprint."""
    return parse_key(contribution.key).fingerprint


def weighting(rules: AggregationRules) -> Weighting:
    """How a hub with these settings turns claims into weights."""
    return Weighting(
        rule=rules.weighting,
        min_owners=rules.min_owners,
        max_examples=rules.max_examples,
        staleness_discount=rules.staleness_discount,
    )


def contribution_weight(rule: Weighting, num_examples: int, staleness: int) -> int:
    """Integer weight of a contribution by itself, discounted by its age in rounds."""
    claimed = min(num_examples, rule.max_examples)
    weight = float(EQUAL_WEIGHT if rule.rule == "equal" else claimed)
    for _ in range(staleness):  # not a power: its last bit depends on the platform
        weight *= rule.staleness_discount
    return max(1, int(weight))


def round_weights(rule: Weighting, claims: Sequence[Claim]) -> list[int]:
    """Integer weight of each contribution of a round, in the order given.

    An owner whose contributions together would have more than ``1 / min_owners`` of all weight is
    brought down to that, and its contributions in proportion. With fewer owners than
    ``min_owners``, all have the same.
    """
    own = [contribution_weight(rule, claim.num_examples, claim.age) for claim in claims]
    totals: dict[str, int] = {}
    for claim, weight in zip(claims, own, strict=True):
        totals[claim.owner] = totals.get(claim.owner, 0) + weight
    cap = owner_cap(list(totals.values()), rule.min_owners)
    return [
        weight if totals[claim.owner] <= cap else max(1, weight * cap // totals[claim.owner])
        for claim, weight in zip(claims, own, strict=True)
    ]


def owner_cap(totals: Sequence[int], min_owners: int) -> int:
    """The most that an owner may weigh, so that nobody has more than ``1 / min_owners`` of all.

    From the heaviest owner down: with ``k`` owners held at the cap, and the others weighing ``R``
    together, the cap is ``R // (m - k)``.
    """
    shares = min(min_owners, len(totals))
    heaviest, rest = sorted(totals, reverse=True), sum(totals)
    for capped, total in enumerate(heaviest):
        cap = rest // (shares - capped)
        if total <= cap:
            return cap
        rest -= total
    return 0


def running_norm(previous: Round) -> float:
    """What norms of the rounds so far came to; 0.0 after a round that did not measure them."""
    if previous.median_norm is None or previous.strategy is None:
        return 0.0
    before = previous.strategy.options.get("running_norm")
    return next_running_norm(previous.median_norm, before if isinstance(before, float) else 0.0)


def strategy_options(
    name: str, options: Mapping[str, Scalar], previous: Round
) -> dict[str, Scalar]:
    """A strategy's options as the next round records them."""
    if name not in MEASURES_NORMS:
        return dict(options)
    return {**options, "running_norm": running_norm(previous)}


def accepted_characters(rules: VocabularyRules, size: int, proposals: Iterable[str]) -> str:
    """Characters that enough contributions propose: most proposed first, then by code point.

    Args:
        rules: How many proposals it takes, and how large the vocabulary may become.
        size: Present size of the vocabulary.
        proposals: ``proposed_characters`` of each accepted contribution.
    """
    votes = Counter(character for text in proposals for character in set(text))
    chosen = [character for character, count in votes.items() if count >= rules.min_proposals]
    chosen.sort(key=lambda character: (-votes[character], character))
    return "".join(chosen[: max(0, rules.max_size - size)])


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {name: array.shape for name, array in weights.items()}


def grown_rows(rounds: Iterable[Round]) -> int:
    """Rows by which these rounds made the vocabulary's tensors longer."""
    return sum(len(record.growth.characters) for record in rounds if record.growth)


def shapes_before_growth(
    shapes: Shapes, tensors: Iterable[str], rows: int
) -> dict[str, tuple[int, ...]]:
    """Shapes before the vocabulary tensors gained their last ``rows`` rows."""
    grown = set(tensors)
    return {
        name: (shape[0] - rows, *shape[1:]) if name in grown else shape
        for name, shape in shapes.items()
    }
