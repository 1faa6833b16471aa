"""The pages of a hub's site. Everything a stranger wrote is escaped by the template engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moshi_fl.evidence import MICRO
from moshi_fl.plot import Chart, Line
from moshi_fl.text import Size
from moshi_fl.weights import write_atomic
from moshi_hub.site.history import Entry, History

SHOWN_ROUNDS = 500  # in the table of the first page; each has a page of its own


def write_site(history: History, folder: Path) -> list[Path]:
    """Write all pages into a folder; what is there under other names stays.

    Returns:
        The files, the first page first.
    """
    written = []
    for name, text in render(history):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode(), shared=True)
        written.append(path)
    return written


def render(history: History) -> Iterator[tuple[str, str]]:
    """Name and text of each page."""
    engine = _engine()
    people = history.people()
    charts = [Markup(chart.svg(f"c{n}")) for n, chart in enumerate(_charts(history))]  # noqa: S704 - made here
    shown = list(reversed(history.entries))[:SHOWN_ROUNDS]
    page = engine.get_template("index.html")
    yield "index.html", page.render(hub=history, people=people, charts=charts, entries=shown)
    page = engine.get_template("round.html")
    last = history.newest.round
    for entry in history.entries:
        yield page_of(entry), page.render(hub=history, entry=entry, last=last)


def page_of(entry: Entry) -> str:
    """Name of a round's page."""
    return f"rounds/{entry.record.round:04d}.html"


def _engine() -> Environment:
    engine = Environment(
        loader=PackageLoader("moshi_hub.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters.update(
        size=lambda count: str(Size(count)) if count else "–",
        loss=lambda value: "–" if value is None else f"{value:.4f}",
        signed=lambda value: "–" if value is None else f"{value:+.4f}",
        plain=_plain,
        page=page_of,
    )
    return engine


def _plain(text: str, limit: int = 80) -> str:
    """A stranger's text on one line, without what would turn the writing around."""
    flat = "".join(c if c.isprintable() else " " for c in str(text))
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _charts(history: History) -> Iterator[Chart]:
    measured = [(e.record.round, e.record.evaluation) for e in history.entries]
    losses = [(n, found.after) for n, found in measured if found]
    first = next(((n - 1, found.before) for n, found in measured if found), None)
    if first:
        yield _chart("Held-out loss", "nats per token", [first, *losses])
    if len(history.entries) > 1:
        counts = [(e.record.round, float(len(e.parts))) for e in history.entries[1:]]
        people = [(number, float(count)) for number, count in history.people_so_far()[1:]]
        yield _chart(
            "Contributions", "accepted in each round", counts, Line("Contributors so far", people)
        )
        sizes = itertools.accumulate(e.update_bytes + e.keyframe_bytes for e in history.entries)
        megabytes = [
            (entry.record.round, total / MICRO)
            for entry, total in zip(history.entries, sizes, strict=True)
        ]
        yield _chart("Published weights", "megabytes, all rounds together", megabytes)


def _chart(title: str, unit: str, points: Sequence[tuple[float, float]], *more: Line) -> Chart:
    lines = [Line(title, points), *more]
    ends = "; ".join(
        f"{ln.name} {ln.points[-1][1]:.4g} at round {ln.points[-1][0]:g}" for ln in lines
    )
    return Chart(
        title=title,
        subtitle=unit,
        description=f"{title} by round, {unit}. {ends}.",
        x="Round",
        y="",
        lines=lines,
    )
