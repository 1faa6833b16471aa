"""What a model's family can tell of a round beside its loss, such as the perplexity of text.

For people: it is measured where the round is made, on the held-out pool there. Nothing is decided
by it, and a reader of the file takes it for a stranger's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from moshi_fl.errors import CorruptRecord
from moshi_fl.history import round_folder
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import task_of
from moshi_fl.records import Record, load
from moshi_fl.replica import Replica
from moshi_fl.text import Figure
from moshi_hub.heldout import pool_path
from moshi_hub.samples import Model

FIGURES_FILE = "figures.json"
MAX_FIGURES_BYTES = 1 << 16

Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}\Z")]
Named = Annotated[dict[Name, float], Meta(max_length=200)]


class RoundFigures(Record, frozen=True, kw_only=True):
    """Means over the held-out pool by name, of the round before and of this one."""

    format: Literal[1] = 1
    kind: Literal["figures"] = "figures"
    before: Named
    after: Named

    @property
    def changes(self) -> list[tuple[str, Figure | None, Figure | None]]:
        """Each figure, before and after; None where there is none."""
        return [
            (name, _figure(self.before.get(name)), _figure(self.after.get(name)))
            for name in sorted({*self.before, *self.after}, key=_natural)
        ]


Explainer = Callable[[HubConfig, Model, Model], RoundFigures | None]
"""Gives the figures, for a hub's settings and its model before and after a round."""


def explainer(replica: Replica) -> Explainer:
    """What measures figures on this machine's pool; None without a pool, or of other families."""

    def explain(config: HubConfig, before: Model, after: Model) -> RoundFigures | None:
        path = pool_path(replica)
        if not path.exists():
            return None
        pool = path.read_bytes()
        was, now = (_measured(config, model, pool) for model in (before, after))
        return RoundFigures(before=was, after=now) if was or now else None

    return explain


def _measured(config: HubConfig, model: Model, pool: bytes) -> dict[str, float]:
    import torch

    from moshi_fl.models.common import model_of
    from moshi_fl.models.family import Explains
    from moshi_hub.measure import few_threads

    weights, tokenizer = model
    task = task_of(config, tokenizer)
    if not isinstance(task, Explains):
        return {}
    module = model_of(task, weights)
    with few_threads(module):
        return dict(task.figures(module, pool, torch.device("cpu")))


def _natural(name: str) -> str:
    """Codebook 10 comes after codebook 9."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), name)


def _figure(value: float | None) -> Figure | None:
    return None if value is None else Figure(value)


def figures_path(number: int) -> str:
    """Where a round's figures lie on main."""
    return f"{round_folder(number)}/{FIGURES_FILE}"


def read_figures(data: bytes) -> RoundFigures | None:
    """The figures in a file; None where it is no such file."""
    try:
        return load(data, RoundFigures, name=FIGURES_FILE, limit=MAX_FIGURES_BYTES)
    except CorruptRecord:
        return None


def shown(figures: RoundFigures | None) -> str:
    """A table of them, in Markdown; empty where there are none."""
    if figures is None:
        return ""
    rows = [
        f"| {name} | {'-' if was is None else was} | {'-' if now is None else now} |"
        for name, was, now in figures.changes
    ]
    said = "Means on the held-out data, of the round before and of this one; codebooks in nats."
    return "\n".join(
        ["## Figures\n", "| figure | before | after |", "|---|--:|--:|", *rows, f"\n{said}\n"]
    )
