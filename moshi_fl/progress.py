"""One progress bar on stderr: a line rewritten on a terminal, a few plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TextIO

from moshi_fl.text import Count, Duration, human, shorten, spell, words

REDRAW_SECONDS = 0.1
LOG_SECONDS = 10.0
BAR_COLUMNS = 24


def terminal_columns() -> int:
    """Width of the terminal, or what ``COLUMNS`` says."""
    import shutil

    return shutil.get_terminal_size().columns


class Progress:
    """Shows how far a piece of work is; use as ``with console.progress("Training", 200) as bar``.

    On a terminal one line is redrawn at most ten times a second. Elsewhere a plain line appears
    about every tenth of the work (or, when the total is unknown, every ten seconds).

    Args:
        description: What is going on, such as ``Training``.
        total: Units of work, or None when nobody knows.
        unit: What is counted, such as ``steps``; empty for a bare percentage.
        stream: Where to write, or None for a bar that stays silent.
        live: Whether the stream is a terminal whose line can be rewritten.
    """

    def __init__(
        self, description: str, total: float | None, unit: str, stream: TextIO | None, *, live: bool
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._stream, self._live = stream, live
        self._done = 0.0
        self._first: float | None = None
        self._fields: dict[str, object] = {}
        self._start = self._shown_at = time.monotonic()
        self._tenth = 0
        self._visible = False

    def update(self, done: float, **fields: object) -> None:
        """State how many units are done in all, and any fields worth showing (``loss=2.31``).

        The first call may start above zero (resumed work): the time left counts from there.
        """
        if self._first is None:
            self._first = done
        self._done = done
        self._fields.update(fields)
        if self._due():
            self._show()

    def advance(self, units: float = 1, **fields: object) -> None:
        """State that so many more units are done."""
        if self._first is None:
            self._first = self._done
        self.update(self._done + units, **fields)

    def __enter__(self) -> Self:
        if self._live:
            self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._first is None:
            self.erase()  # what failed before it began has no progress to tell
        elif self._stream is not None:
            self._show(last=kind is None)
            if self._live:
                self._write("\n")
        self._stream, self._visible = None, False

    def erase(self) -> None:
        """Take the bar off the terminal to make room for a line; ``redraw`` brings it back."""
        if self._visible:
            self._write("\r\033[K")
            self._visible = False

    def redraw(self) -> None:
        """Show the bar again after ``erase``."""
        if self._live:
            self._show()

    def _due(self) -> bool:
        if self._stream is None:
            return False
        waited = time.monotonic() - self._shown_at
        if self._live:
            return waited >= REDRAW_SECONDS
        if not self._total:
            return waited >= LOG_SECONDS
        return int(10 * self._done / self._total) > self._tenth and self._done < self._total

    def _show(self, *, last: bool = False) -> None:
        if self._stream is None:
            return
        self._shown_at = time.monotonic()
        if self._total:
            self._tenth = int(10 * self._done / self._total)
        text = "  ".join(part for part in self._parts(last) if part)
        if self._live:
            self._write("\r" + shorten(text, terminal_columns() - 1) + "\033[K")
            self._visible = True
        else:
            self._write(text + "\n")

    def _parts(self, last: bool) -> list[str]:
        elapsed = self._shown_at - self._start
        fields = [f"{words(name)} {human(value)}" for name, value in self._fields.items()]
        return [
            self._description,
            self._bar() if self._live and not last else "",
            self._how_far(),
            *fields,
            f"in {Duration(elapsed)}" if last else self._time_left(elapsed),
        ]

    def _bar(self) -> str:
        if not self._total:
            return ""
        filled = min(BAR_COLUMNS, int(BAR_COLUMNS * self._done / self._total))
        return "━" * filled + "─" * (BAR_COLUMNS - filled)

    def _how_far(self) -> str:
        count = f"{Count(int(self._done))}"
        if not self._total:
            return f"{count} {self._unit}".rstrip()
        percent = f"{min(100, int(100 * self._done / self._total)):3} %"
        return (
            f"{percent}  {count}/{Count(int(self._total))} {self._unit}" if self._unit else percent
        )

    def _time_left(self, elapsed: float) -> str:
        worked = self._done - (self._first or 0)
        if not self._total or worked <= 0 or elapsed < 1 or self._done >= self._total:
            return ""
        return f"{Duration(elapsed / worked * (self._total - self._done))} left"

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(spell(text, self._stream.encoding or "ascii"))
        self._stream.flush()
