"""The one sink for output: commands state facts, the console renders them.

Data goes to stdout, words and progress to stderr. With ``--json`` stdout carries exactly one JSON
document, also when the command fails. Everything printed passes through ``moshi_fl.text.clean``:
names and messages may come from a hostile hub.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moshi_fl.progress import Progress, terminal_columns
from moshi_fl.text import clean, human, shorten, spell, width, words

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _CYAN = "1", "2", "31;1", "32", "33", "36"
_GAP = "  "
_NARROWEST = 7  # of a column that is cut
_READABLE = 16  # columns: names, ids and settings are not cut below for the last column's sake


class Console:
    """Where a command's facts, words and progress go.

    Args:
        json_mode: Collect facts and write them as one JSON document in ``finish``.
        quiet: No notes, hints or progress; data, warnings and errors remain.
        stdout: Stream for data; the process's own by default.
        stderr: Stream for words; the process's own by default.
    """

    def __init__(
        self,
        *,
        json_mode: bool = False,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self.resume_command = ""
        """What continues this work after Ctrl-C; a command sets it as soon as it can be resumed."""
        self.resume_note = "continues where it stopped"
        """What that command then does."""
        self._out = stdout or sys.stdout or _nowhere()
        self._err = stderr or sys.stderr or _nowhere()
        self._document: dict[str, Any] = {}
        self._bar: Progress | None = None

    # Data, on stdout.

    def table(
        self,
        rows: Iterable[Mapping[str, object]],
        columns: Sequence[str] | Mapping[str, str] | None = None,
        *,
        name: str = "rows",
    ) -> None:
        """Print rows under headings; in JSON, a list under ``name`` with everything in each row.

        Args:
            rows: One mapping per row.
            columns: Keys to show, in order, or keys with their headings; default: the first row's.
            name: Key of the list in the JSON document.
        """
        rows = list(rows)
        if self.json_mode:
            self._document.setdefault(name, []).extend(map(_plain, rows))
            return
        if columns is None:
            columns = list(rows[0]) if rows else []
        if not columns:
            return  # no rows, and nobody said what they would have
        titles = columns if isinstance(columns, Mapping) else {c: words(c) for c in columns}
        titles = {key: clean(title) for key, title in titles.items()}
        for line in self._table_lines(rows, titles):
            self._print(line)

    def result(self, **facts: object) -> None:
        """State facts: aligned ``name value`` lines, or keys of the JSON document."""
        if self.json_mode:
            self._document.update(_plain(facts))
            return
        names = {key: words(key) for key in facts}
        widest = max(map(width, names.values()), default=0)
        for key, value in facts.items():
            padding = " " * (widest - width(names[key]))
            self._print(self._paint(self._out, _DIM, names[key]) + padding + _GAP + human(value))

    def done(self, what: str, **facts: object) -> None:
        """Say that something is achieved (in words), with its facts (as data)."""
        self._say(self._paint(self._err, _GREEN, "✓") + " " + clean(what), "words")
        self.result(**facts)

    def line(self, text: str) -> None:
        """Print a line of data; in JSON, an item of ``lines``."""
        if self.json_mode:
            self._document.setdefault("lines", []).append(text)
        else:
            self._print(clean(text, keep="\n\t"))

    def write(self, text: str) -> None:
        """Print a piece of streamed text at once, no newline added; in JSON, part of ``text``."""
        if self.json_mode:
            self._document["text"] = self._document.get("text", "") + text
        else:
            self._emit(self._out, clean(text, keep="\n\t"))
            self._out.flush()

    # Words and progress, on stderr.

    def note(self, text: str) -> None:
        """Say what is going on."""
        self._say(clean(text, keep="\n"), "words")

    def warn(self, text: str) -> None:
        """Say what may be wrong, although the work goes on."""
        self._say(self._paint(self._err, _YELLOW, "Warning:") + " " + clean(text, keep="\n"))

    def hint(self, text: str) -> None:
        """Say what to do next."""
        self._say(self._paint(self._err, _CYAN, "Hint:") + " " + clean(text, keep="\n"), "words")

    def error(self, message: str, *, hint: str = "", exit_code: int = 1) -> None:
        """State a failure: ``Error: …`` and ``Hint: …``, and ``error`` in the JSON document."""
        facts = {"message": message, "hint": hint, "exit_code": int(exit_code)}
        self._document["error"] = facts
        self._say(self._paint(self._err, _RED, "Error:") + " " + clean(message, keep="\n"))
        if hint:
            self._say(self._paint(self._err, _CYAN, "Hint:") + " " + clean(hint, keep="\n"))

    def progress(
        self, what: str, total: float | None = None, *, unit: str = "", in_logs: bool = True
    ) -> Progress:
        """A progress bar for ``total`` units of work (None: unknown), for a ``with`` block.

        Where there is no terminal it is a few lines, or nothing without ``in_logs``.
        """
        live = _is_terminal(self._err)
        stream = None if self.quiet or not (live or in_logs) else self._err
        self._bar = Progress(clean(what), total, unit, stream, live=live)
        return self._bar

    def finish(self) -> None:
        """Write what was collected; called once, by ``main``."""
        if self.json_mode:
            import json

            self._out.write(json.dumps(self._document, indent=2, allow_nan=False) + "\n")
        self._out.flush()

    # Rendering.

    def _table_lines(
        self, rows: list[Mapping[str, object]], titles: Mapping[str, str]
    ) -> Iterable[str]:
        cells = [[human(row.get(key)) for key in titles] for row in rows]
        right = [all(_is_number(row.get(key)) for row in rows) for key in titles]
        widths = [
            max(width(cell) for cell in column)
            for column in zip(list(titles.values()), *cells, strict=True)
        ]
        self._fit(widths, right, [width(title) for title in titles.values()])
        heading = _row(list(titles.values()), widths, right)
        yield self._paint(self._out, _BOLD, heading)
        for row in cells:
            first, *rest = self._folded(row[-1], widths[:-1])
            yield _row([*row[:-1], first], widths, right)
            indent = " " * (sum(widths[:-1]) + len(_GAP) * (len(widths) - 1))
            yield from (indent + line for line in rest)

    def _folded(self, cell: str, others: list[int]) -> list[str]:
        """The last cell of a row, on as many lines as the terminal makes of its words."""
        room = terminal_columns() - sum(others) - len(_GAP) * len(others)
        if not self._out.isatty() or width(cell) <= room or room < _READABLE:
            return [cell]
        return textwrap.wrap(cell, room, break_long_words=False, break_on_hyphens=False) or [cell]

    def _fit(self, widths: list[int], right: list[bool], headings: list[int]) -> None:
        """Shrink the widest text columns until a row fits the terminal, none below its heading.

        Numbers stay whole, and so does the last column: its words go on in the next line.
        """
        if not self._out.isatty():
            return
        room = terminal_columns() - len(_GAP) * (len(widths) - 1)
        texts = [i for i, is_right in enumerate(right[:-1]) if not is_right]
        for floor, last in ((_READABLE, widths[-1]), (_NARROWEST, min(widths[-1], _READABLE))):
            floors = {i: max(floor, headings[i]) for i in texts}
            while sum(widths[:-1]) + last > room:
                wide = [i for i in texts if widths[i] > floors[i]]
                if not wide:
                    break
                widths[max(wide, key=lambda i: widths[i])] -= 1

    def _print(self, text: str) -> None:
        self._emit(self._out, text + "\n")

    def _say(self, text: str, kind: str = "") -> None:
        if kind == "words" and self.quiet:
            return
        self._emit(self._err, text + "\n")
        self._err.flush()

    def _emit(self, stream: TextIO, text: str) -> None:
        if self._bar:
            self._bar.erase()
        if stream is self._err:
            self._out.flush()  # keeps the two in order where both show on one screen
        stream.write(spell(text, stream.encoding or "utf-8"))
        if self._bar:
            self._bar.redraw()

    def _paint(self, stream: TextIO, style: str, text: str) -> str:
        text = clean(text)
        if not _is_terminal(stream) or os.environ.get("NO_COLOR"):
            return text
        return f"\033[{style}m{text}\033[0m"


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts = []
    for cell, columns, is_right in zip(cells, widths, right, strict=True):
        text = shorten(cell, columns)
        padding = " " * (columns - width(text))
        parts.append(padding + text if is_right else text + padding)
    return _GAP.join(parts).rstrip()


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _nowhere() -> TextIO:
    """What stands for a stream that the caller closed (``>&-``)."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _plain(value: Any) -> Any:
    """The same in JSON's own types; not-a-number and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.item()) if hasattr(value, "item") else str(value)
