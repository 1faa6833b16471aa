"""Rules of a round that a merger applies and an auditor checks; pure functions of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from moshi_fl.hubfile import VocabularyRules
from moshi_fl.records import Weighting
from moshi_fl.weights import Weights

Shapes = Mapping[str, tuple[int, ...]]


def contribution_weight(rule: Weighting, num_examples: int, staleness: int) -> int:
    """Integer weight of a contribution: examples within the limit, discounted by age in rounds."""
    weight = float(min(num_examples, rule.max_examples))
    for _ in range(staleness):  # not a power: its last bit depends on the platform
        weight *= rule.staleness_discount
    return max(1, int(weight))


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


def shapes_before_growth(
    shapes: Shapes, tensors: Iterable[str], rows: int
) -> dict[str, tuple[int, ...]]:
    """Shapes before the vocabulary tensors gained their last ``rows`` rows."""
    grown = set(tensors)
    return {
        name: (shape[0] - rows, *shape[1:]) if name in grown else shape
        for name, shape in shapes.items()
    }
