"""A line chart as one self-contained SVG file: no script, no font, nothing loaded.

It follows the reader's light or dark scheme, has a title and a description for screen readers, a
tooltip with the exact value on every point, and tells lines apart by dashes and marks, not by
colour alone. Letters stay readable from 400 to 1200 pixels of width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 114, 70  # margins around the plotting area

_STYLE = """
svg { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #5b6470;
      --grid: #dfe3e8; --line-0: #0b5cad; --line-1: #b3400a; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14181d; --ink: #eef1f4; --faint: #a9b3be; --grid: #333b44;
        --line-0: #74b5ff; --line-1: #ff9f6b; }
}
text { font: 17px system-ui, sans-serif; fill: var(--ink); }
.heading { font-size: 20px; font-weight: 600; }
.tick { fill: var(--faint); font-variant-numeric: tabular-nums; }
@media (min-width: 900px) { text { font-size: 13px; } .heading { font-size: 17px; } }
.paper { fill: var(--paper); }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--faint); stroke-width: 1; }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round; }
.mark { stroke: var(--paper); stroke-width: 1.5; }
.line-0 { stroke: var(--line-0); } .mark-0 { fill: var(--line-0); }
.line-1 { stroke: var(--line-1); stroke-dasharray: 7 5; } .mark-1 { fill: var(--line-1); }
"""


@dataclass(frozen=True)
class Line:
    """One line: its name and its points (x, y), from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of one or two lines; values that are not finite are left out.

    Attributes:
        title: What it shows, in a few words.
        subtitle: Under what circumstances, in a line.
        description: What it shows, in a sentence, for who cannot see it.
        x: Name of the horizontal axis, whose marks are whole numbers.
        y: Name of the vertical axis; empty where the title says it.
        lines: At most two.
    """

    title: str
    subtitle: str
    description: str
    x: str
    y: str
    lines: Sequence[Line]

    def svg(self, name: str = "chart") -> str:
        """The SVG document, or a part of an HTML page.

        Args:
            name: Begins the ids in it, so that a page may hold several.

        Raises:
            ValueError: There is no finite point, or there are more than two lines.
        """
        points = [point for line in self.lines for point in _finite(line)]
        if not points or len(self.lines) > 2:
            raise ValueError("a chart needs one or two lines and a point")
        frame = _Frame([x for x, _ in points], [y for _, y in points])
        body = "\n".join(
            [
                *_axes(frame, self.x, self.y),
                *_legend(self.lines),
                *_drawn(frame, self.lines, self.x),
            ]
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="100%" role="img" aria-labelledby="{name}-title {name}-description">\n'
            f'<title id="{name}-title">{_text(self.title)}</title>\n'
            f'<desc id="{name}-description">{_text(self.description)}</desc>\n'
            f"<style>{_STYLE}</style>\n"
            f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>\n'
            f'<text class="heading" x="{LEFT}" y="34">{_text(self.title)}</text>\n'
            f'<text class="tick" x="{LEFT}" y="58">{_text(self.subtitle)}</text>\n'
            f"{body}\n</svg>\n"
        )


class _Frame:
    """From data to the plotting area; the vertical axis begins and ends with a round number."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        marks = ticks(xs, at_most=9, whole=True)
        first, last = (min(xs), max(xs)) if min(xs) < max(xs) else (marks[0], marks[-1])
        self._first, self._last = first, last
        self.across = [mark for mark in marks if first <= mark <= last]
        self.up = ticks(ys, at_most=7, whole=all(float(y).is_integer() for y in ys))

    def x(self, value: float) -> float:
        share = (value - self._first) / (self._last - self._first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.up[0]) / (self.up[-1] - self.up[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def ticks(values: Sequence[float], *, at_most: int, whole: bool = False) -> list[float]:
    """Round numbers, evenly apart, from not above the least value to not below the greatest.

    Steps are 1, 2 or 5 times a power of ten; at least two numbers, also for a single value.

    Args:
        values: At least one finite number.
        at_most: How many numbers there may be, at least 3.
        whole: Whether they must be whole numbers.
    """
    low, high = min(values), max(values)
    span = (high - low) or max(abs(low) * 0.1, 1e-9)
    power = math.floor(math.log10(span / at_most))
    for exponent in range(power, power + 4):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.floor(low / step), math.ceil(high / step)
            last += last == first
            if last - first < at_most and (step >= 1 or not whole):
                return [round(count * step, max(0, -exponent)) for count in range(first, last + 1)]
    raise ValueError(f"no ticks from {low} to {high}")


def _axes(frame: _Frame, x_name: str, y_name: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    digits = max(_decimals(value) for value in frame.up)
    parts = []
    for value in frame.up:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(_label(LEFT - 10, y + 6, f"{value:.{digits}f}", anchor="end", kind="tick"))
    for value in frame.across:
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 6}"/>')
        parts.append(_label(x, bottom + 25, f"{value:g}", anchor="middle", kind="tick"))
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(_label((LEFT + right) / 2, HEIGHT - 14, x_name, anchor="middle"))
    if y_name:
        turn = f'transform="rotate(-90 20 {(TOP + bottom) / 2})"'
        parts.append(_label(20, (TOP + bottom) / 2, y_name, anchor="middle", extra=turn))
    return parts


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, x = [], float(LEFT)
    for index, line in enumerate(lines):
        parts.append(f'<path class="line line-{index}" d="M{x} 84h34"/>')
        parts.append(_mark(index, x + 17, 84, 5))
        parts.append(_label(x + 42, 90, line.name))
        x += 42 + 12 * len(line.name) + 24
    return parts


def _drawn(frame: _Frame, lines: Sequence[Line], x_name: str) -> list[str]:
    parts = []
    for index, line in enumerate(lines):
        places = [(frame.x(x), frame.y(y)) for x, y in _finite(line)]
        path = " ".join(f"{x},{y}" for x, y in places)
        radius = 5 if len(places) <= 25 else 3
        parts.append(f'<polyline class="line line-{index}" points="{path}"/>')
        for (x, y), place in zip(_finite(line), places, strict=True):
            tip = f"{line.name}, {x_name.lower()} {x:g}: {y:.4f}"
            parts.append(_mark(index, *place, radius, tip))
    return parts


def _mark(index: int, x: float, y: float, radius: int, tip: str = "") -> str:
    title = f"<title>{_text(tip)}</title>" if tip else ""
    if index == 0:
        return f'<circle class="mark mark-0" cx="{x}" cy="{y}" r="{radius}">{title}</circle>'
    size = f'x="{x - radius:g}" y="{y - radius:g}" width="{2 * radius}" height="{2 * radius}"'
    return f'<rect class="mark mark-1" {size}>{title}</rect>'


def _label(
    x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", extra: str = ""
) -> str:
    attributes = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    attributes += f' class="{kind}"' * bool(kind) + f" {extra}" * bool(extra)
    return f"<text {attributes}>{_text(text)}</text>"


def _text(text: str) -> str:
    """Text for XML: escaped, and without the control characters that XML cannot hold."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _finite(line: Line) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]


def _decimals(value: float) -> int:
    return len(f"{value:.10f}".rstrip("0").partition(".")[2])
