from __future__ import annotations

import io
import json
import os
import re

import numpy as np
import pytest

from moshi_fl.console import Console
from moshi_fl.text import Moment, Size


class Screen:
    """A console with both streams at hand."""

    def __init__(self, *, encoding="utf-8", **modes):
        self._streams = [
            io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)
        ]
        self.console = Console(stdout=self._streams[0], stderr=self._streams[1], **modes)

    @property
    def out(self) -> str:
        return self._text(0)

    @property
    def err(self) -> str:
        return self._text(1)

    def _text(self, which: int) -> str:
        stream = self._streams[which]
        return stream.buffer.getvalue().decode(stream.encoding)


class Terminal:
    """A console whose streams are one real pseudo-terminal."""

    def __init__(self):
        self._master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.console = Console(stdout=self.stream, stderr=self.stream)

    def shown(self) -> str:
        self.stream.close()
        data = b"".join(iter(self._read, b""))
        os.close(self._master)
        return data.decode()

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            return b""


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


ROWS = [
    {"round": 9, "contributor": "ada", "size": Size(168_000)},
    {"round": 10, "contributor": "grace\x1b[31m", "size": None},
]


def test_a_table_aligns_numbers_right_and_text_left():
    screen = Screen()
    screen.console.table(ROWS, {"round": "Round", "contributor": "Who", "size": "Delta"})
    assert screen.out.splitlines() == [
        "Round  Who             Delta",
        "    9  ada            168 KB",
        "   10  grace\\x1b[31m       -",
    ]


def test_an_empty_table_still_has_its_heading():
    screen = Screen()
    screen.console.table([], ["round", "held_out"])
    assert screen.out == "round  held out\n"
    screen.console.table([])
    assert screen.out == "round  held out\n", "without columns there is nothing to head"


def test_data_goes_to_stdout_and_words_to_stderr():
    screen = Screen()
    screen.console.note("fetching")
    screen.console.done("Published", round=3, size=Size(1000))
    screen.console.hint("moshi-fl sync")
    assert screen.out == "round  3\nsize   1 KB\n"
    assert screen.err == "fetching\n✓ Published\nHint: moshi-fl sync\n"


def test_json_is_one_document_of_plain_values():
    screen = Screen(json_mode=True)
    screen.console.note("words stay on stderr")
    screen.console.table(ROWS, ["round"], name="contributions")
    screen.console.result(size=Size(5), when=Moment("2026-01-31T12:00:00Z"), loss=np.float64(1.5))
    screen.console.result(bad=float("nan"), worse=float("inf"), several=(1, 2))
    screen.console.line("first")
    screen.console.write("def ")
    screen.console.write("main")
    assert screen.out == ""
    screen.console.finish()
    document = json.loads(screen.out, parse_constant=pytest.fail)
    assert document == {
        "contributions": [
            {"round": 9, "contributor": "ada", "size": 168_000},
            {"round": 10, "contributor": "grace\x1b[31m", "size": None},
        ],
        "size": 5,
        "when": "2026-01-31T12:00:00Z",
        "loss": 1.5,
        "bad": None,
        "worse": None,
        "several": [1, 2],
        "lines": ["first"],
        "text": "def main",
    }
    assert screen.err == "words stay on stderr\n"
    assert "\x1b" not in screen.out


def test_an_error_is_part_of_the_document_and_of_stderr():
    screen = Screen(json_mode=True)
    screen.console.result(round=3)
    screen.console.error("hub gone", hint="try later", exit_code=1)
    screen.console.finish()
    assert json.loads(screen.out) == {
        "round": 3,
        "error": {"message": "hub gone", "hint": "try later", "exit_code": 1},
    }
    assert screen.err == "Error: hub gone\nHint: try later\n"


def test_quiet_keeps_data_warnings_and_errors():
    screen = Screen(quiet=True)
    screen.console.note("n")
    screen.console.hint("h")
    with screen.console.progress("Training", 10) as bar:
        bar.update(10)
    screen.console.done("Sent", id="abc")
    screen.console.warn("low disk")
    screen.console.error("failed", hint="do this")
    assert screen.out == "id  abc\n"
    assert screen.err == "Warning: low disk\nError: failed\nHint: do this\n"


def test_hostile_names_cannot_write_to_the_screen():
    screen = Screen()
    evil = "\x1b[2J\u202e\r"
    screen.console.table([{evil: evil}])
    screen.console.result(**{evil: [evil], "map": {evil: evil}})
    screen.console.done(evil)
    for speak in ("note", "warn", "hint", "error", "line", "write"):
        getattr(screen.console, speak)(evil)
    with screen.console.progress(evil, 1) as bar:
        bar.update(1, **{evil: evil})
    assert not set("\x1b\u202e\r") & set(screen.out + screen.err)


def test_streamed_text_keeps_its_lines_and_tabs():
    screen = Screen()
    screen.console.write("def f():\n\treturn")
    screen.console.write(" 1\x07\n")
    assert screen.out == "def f():\n\treturn 1\\x07\n"


def test_a_stream_that_is_not_utf8_gets_plain_letters():
    screen = Screen(encoding="ascii")
    screen.console.done("Round 3 → 4", contributor="Zoë")
    assert screen.err == "ok Round 3 -> 4\n"
    assert screen.out == "contributor  Zo\\xeb\n"


def test_progress_in_a_log_is_a_line_for_each_tenth():
    screen = Screen()
    with screen.console.progress("Training", 1000, unit="steps") as bar:
        for step in range(1, 1001):
            bar.update(step, loss=2.5)
    lines = screen.err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "Training   10 %  100/1,000 steps  loss 2.5000"
    assert re.fullmatch(
        r"Training  100 %  1,000/1,000 steps  loss 2\.5000  in \d+\.\d s", lines[-1]
    )


def test_progress_without_a_total_ends_with_its_count():
    screen = Screen()
    with screen.console.progress("Reading", unit="files") as bar:
        for _ in range(12):
            bar.advance()
    assert re.fullmatch(r"Reading  12 files  in \d+\.\d s\n", screen.err)


def test_progress_that_resumes_counts_on():
    screen = Screen()
    with screen.console.progress("Training", 100) as bar:
        bar.update(95)
    assert screen.err.splitlines()[0].startswith("Training   95 %")


def test_interrupted_progress_says_how_far_it_came():
    screen = Screen()

    def work():
        with screen.console.progress("Training", 100) as bar:
            bar.update(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert screen.err == "Training    5 %\n"


def test_work_that_fails_before_it_began_shows_no_bar(terminal):
    def work(console):
        with console.progress("Auditing", 1):
            raise KeyboardInterrupt

    screen = Screen()
    for console in (screen.console, terminal.console):
        with pytest.raises(KeyboardInterrupt):
            work(console)
    assert screen.err == ""
    assert terminal.shown().endswith("\r\x1b[K")


def test_a_terminal_shows_one_line_that_makes_room_for_words(terminal):
    with terminal.console.progress("Training", 4, unit="steps") as bar:
        bar.update(2, loss=2.31)
        terminal.console.warn("clock is off")
    shown = terminal.shown()
    assert "\r\x1b[K\x1b[33mWarning:\x1b[0m clock is off\r\n" in shown
    assert "━━━━━━━━━━━━────────────" in shown
    assert shown.count("\n") == 2  # the warning, and the end of the bar
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*[mK]", "", shown)):
        assert len(line) < 60


def test_a_bar_that_is_not_for_logs_shows_on_a_terminal_alone(terminal):
    screen = Screen()
    for console in (terminal.console, screen.console):
        with console.progress("Encoding", 2, in_logs=False) as bar:
            bar.update(1)
    assert "Encoding" in terminal.shown()
    assert screen.err == ""


def test_a_table_fits_the_terminal(terminal):
    terminal.console.table([{"round": 1, "contributor": "x" * 200, "delta": Size(168_000)}])
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.shown())
    assert [len(line) for line in shown.splitlines()] == [60, 60]
    assert "…" in shown
    assert "168 KB" in shown


def test_names_to_be_typed_again_are_not_cut_for_a_long_last_column(terminal):
    row = {"setting": "min_attestations", "value": "v" * 30, "meaning": "m" * 60}
    terminal.console.table([row])
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.shown())
    assert "min_attestations  vvvvvvvvvvvvvvv…  m" in shown


def test_no_column_of_text_is_cut_below_its_heading(terminal):
    numbers = dict.fromkeys(("examples", "attesters", "share"), 12)
    row = {"contribution": "c" * 12, "contributor": "n" * 40, **numbers, "verdict": "accepted"}
    terminal.console.table([row])
    heading, cells = re.sub(r"\x1b\[[\d;]*m", "", terminal.shown()).splitlines()
    assert heading.startswith("contribution  contributor  examples")
    assert cells.startswith("cccccccccccc  nnnnnnnnnn…        12")


def test_a_long_last_cell_goes_on_below_itself(terminal):
    terminal.console.table([{"setting": "min_attestations", "meaning": "who agrees, " * 6}])
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.shown()).splitlines()
    assert lines == [
        "setting           meaning",
        "min_attestations  who agrees, who agrees, who agrees, who",
        "                  agrees, who agrees, who agrees,",
    ]


def test_no_color_means_no_escapes(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.console.warn("careful")
    assert terminal.shown() == "Warning: careful\r\n"


def test_a_dumb_terminal_is_treated_as_a_log(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal.console.progress("Training", 2) as bar:
        bar.update(1)
        bar.update(2)
    assert "\x1b" not in terminal.shown()
