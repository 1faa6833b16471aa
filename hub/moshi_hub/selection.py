"""Which of the accepted contributions a round takes: one per owner, no copies, not too many.

Decides only, from what it is given; ``moshi_hub.likeness`` opens the deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moshi_hub.verify import Finding

COPY_COSINE = 0.98
"""Deltas whose cosine is above this are one piece of work."""

Cosine = Callable[[str, str], float]
"""Cosine between the deltas of two contributions, by id."""


@dataclass(frozen=True)
class Candidate:
    """An accepted contribution, as far as selection cares."""

    id: str
    owner: str
    base_round: int


@dataclass(frozen=True)
class Selection:
    """What becomes of each candidate.

    Attributes:
        taken: Ids of those that the round takes, in order.
        waiting: Ids of those that wait for the next round, in order.
        dropped: Id to the reason why it never counts.
    """

    taken: tuple[str, ...]
    waiting: tuple[str, ...]
    dropped: dict[str, Finding] = field(default_factory=dict)


def one_per_owner(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], dict[str, Finding]]:
    """Of each owner the contribution on the newest base, of those the one with the lowest id.

    Returns:
        Those that count, in the order given, and the findings on the others.
    """
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        other = best.get(candidate.owner)
        if other is None or _precedes(candidate, other):
            best[candidate.owner] = candidate
    dropped = {
        candidate.id: Finding(
            "superseded", f"its owner also sent {best[candidate.owner].id}, which counts."
        )
        for candidate in candidates
        if best[candidate.owner] is not candidate
    }
    return [candidate for candidate in candidates if candidate.id not in dropped], dropped


def _precedes(one: Candidate, other: Candidate) -> bool:
    return (-one.base_round, one.id) < (-other.base_round, other.id)


def without_copies(
    candidates: Sequence[Candidate], cosine: Cosine
) -> tuple[list[Candidate], dict[str, Finding]]:
    """Of deltas that point the same way only the first counts.

    Each is compared with those that came before it and count themselves.

    Args:
        candidates: In the order in which they came in.
        cosine: Compares two of them.

    Returns:
        Those that count, in the order given, and the findings on the others.
    """
    kept: list[Candidate] = []
    dropped: dict[str, Finding] = {}
    for candidate in candidates:
        alike = ((other.id, cosine(candidate.id, other.id)) for other in kept)
        original, found = next((pair for pair in alike if pair[1] > COPY_COSINE), ("", 0.0))
        if original:
            said = f"its delta points where that of {original} does: cosine {found:.4f}."
            dropped[candidate.id] = Finding("copy", said)
        else:
            kept.append(candidate)
    return kept, dropped


def select(
    candidates: Sequence[Candidate], compare: Callable[[Mapping[str, int]], Cosine], limit: int
) -> Selection:
    """Decide on all accepted contributions of a round.

    Args:
        candidates: In the order in which they came in.
        compare: Gives the cosines between the deltas of some candidates, by id to base round.
        limit: How many contributions a round takes; of more, those with the lowest ids.
    """
    single, superseded = one_per_owner(candidates)
    cosine = compare({candidate.id: candidate.base_round for candidate in single})
    unique, copies = without_copies(single, cosine)
    ordered = sorted(candidate.id for candidate in unique)
    return Selection(tuple(ordered[:limit]), tuple(ordered[limit:]), superseded | copies)
