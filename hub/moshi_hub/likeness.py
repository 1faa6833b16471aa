"""Compares the deltas of accepted contributions: the edge around ``moshi_hub.selection``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from moshi_fl.aggregate import Update
from moshi_fl.aggregate.gram import Gram, gram
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta
from moshi_fl.restore import allow_open_files
from moshi_hub.selection import Cosine
from moshi_hub.verify import Rules


def likeness(rules: Rules, bases: Mapping[str, int], deltas: Path) -> Cosine:
    """Cosines between deltas; those of all are computed when the first is asked for.

    Args:
        rules: Rules of the open round.
        bases: Id of each contribution to its base round.
        deltas: Folder with the judged deltas, named by id.
    """
    place = {contribution_id: index for index, contribution_id in enumerate(sorted(bases))}

    @cache
    def products() -> Gram:
        allow_open_files(len(bases))
        return gram(_updates(rules, bases, deltas))

    return lambda one, other: products().cosine(place[one], place[other])


def _updates(rules: Rules, bases: Mapping[str, int], deltas: Path) -> Sequence[Update]:
    codec = get_codec(rules.config.delta.codec, rules.config.delta.options)
    updates = []
    for contribution_id, base in bases.items():
        path, shapes = deltas / f"{contribution_id}.safetensors", rules.bases[base].shapes
        updates.append(Update(contribution_id, 1, Delta.open(path, shapes, codec, checked=True)))
    return updates
