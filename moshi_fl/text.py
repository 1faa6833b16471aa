"""Text for people: numbers with units, and strangers' text made safe to print.

The number types are ordinary ints and floats that know how to be read aloud, so one fact serves
both a person (``168 KB``) and a program (``168000`` in ``--json``).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

MOST_LISTED = 20  # words in an error

_PLAIN = str.maketrans(
    {
        "…": "...", "→": "->", "←": "<-", "–": "-", "—": "-", "×": "x", "±": "+/-", "≤": "<=",
        "≥": ">=", "·": "-", "✓": "ok", "✗": "x", "━": "=", "─": "-", "‘": "'", "’": "'",
        "“": '"', "”": '"', "²": "^2", "\N{NO-BREAK SPACE}": " ",
    }
)  # fmt: skip


class Size(int):
    """A number of bytes, read in decimal units as transfer tools do: ``168 KB``."""

    def __str__(self) -> str:
        return _scaled(int(self), 1000, ("bytes", "KB", "MB", "GB", "TB", "PB"))


class Count(int):
    """A number of things, short when it is large: ``8.4 M``."""

    def __str__(self) -> str:
        return f"{int(self):,}" if abs(self) < 100_000 else _scaled(int(self), 1000, "_kMGTP")


class Percent(float):
    """A fraction, read in hundredths: ``0.85 %``."""

    def __str__(self) -> str:
        return f"{_three_digits(float(self) * 100)} %"


class Figure(float):
    """A measured number, read with three digits: ``0.23``, ``17.4``, ``12,450``, ``1.2e+40``."""

    def __str__(self) -> str:
        value, size = float(self), abs(self)
        if not math.isfinite(value):
            return str(value)
        if size >= 1e9 or 0 < size < 0.1:  # such as the perplexity of a model that went astray
            return f"{value:.3g}"
        return f"{value:,.0f}" if size >= 1000 else _three_digits(value)


class Duration(float):
    """A number of seconds: ``0.6 s``, ``1 m 20 s``, ``3 h 05 m``, ``4 d 7 h``."""

    def __str__(self) -> str:
        if not math.isfinite(self):
            return "unknown"
        if self < 60:
            return f"{float(self):.1f} s" if self < 10 else f"{float(self):.0f} s"
        minutes, seconds = divmod(round(self), 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        if days:
            return f"{days} d {hours} h"
        return f"{hours} h {minutes:02} m" if hours else f"{minutes} m {seconds:02} s"


class Moment(str):
    """A time as records spell it (``2026-01-31T12:00:00Z``), read as an age: ``3 minutes ago``."""

    __slots__ = ()

    def __str__(self) -> str:
        return age(self)


def age(moment: str, now: datetime | None = None) -> str:
    """How long ago a record's time was; the text itself when it is no time."""
    try:
        then = datetime.fromisoformat(str.__str__(moment))
    except ValueError:
        return str.__str__(moment)
    now = now or datetime.now(UTC)
    seconds = (now - then.replace(tzinfo=then.tzinfo or UTC)).total_seconds()
    if abs(seconds) < 10:
        return "just now"
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        number = int(abs(seconds) // length)
        if number:
            words = f"{number} {unit}{'s' if number > 1 else ''}"
            return f"{words} ago" if seconds > 0 else f"in {words}"
    return "just now"


def _scaled(number: int, base: int, units: tuple[str, ...] | str) -> str:
    if abs(number) < base:
        return f"{number} {units[0]}" if units[0] != "_" else str(number)
    value, power = float(number), 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{_three_digits(value)} {units[power]}"


def round_up(value: float) -> float:
    """The value with four decimals, and not less."""
    return math.ceil(value * 1e4) / 1e4


def _three_digits(value: float) -> str:
    """At least three significant digits, never an exponent; whole numbers stay whole."""
    if value == int(value):
        return f"{value:.0f}"
    for limit, form in ((10, ".2f"), (100, ".1f")):
        if abs(value) < limit * 0.9995:
            return f"{value:{form}}"
    return f"{value:.0f}"


def human(value: object) -> str:
    """A fact as a person reads it; one line, safe to print."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if type(value) is float:
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(str(key))} {human(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(human, value)) or "-"
    return clean(str(value))


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of ``known`` that is spelled most alike; empty when none is."""
    import difflib  # takes longer to import than most commands take

    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def suggestion(word: str, known: Iterable[str], *, listed: str = "") -> str:
    """What ends a sentence about an unknown word: the nearest, or else all that there are.

    Args:
        word: What is not known.
        known: What is.
        listed: Where to read of all of them, when they are too many to be listed here.
    """
    known = sorted(known)
    many = listed and len(known) > MOST_LISTED
    where = f"{listed} lists all {len(known)}." if many else ""
    if near := nearest(word, known):
        return f"did you mean {near!r}? {where}".rstrip()
    return where or f"known: {', '.join(known)}."


def words(key: str) -> str:
    """The name of a fact as a person reads it: ``held_out`` becomes ``held out``."""
    return clean(key.replace("_", " "))


def clean(text: str, *, keep: str = "") -> str:
    r"""Text from anywhere, safe for a terminal: controls become visible escapes such as ``\x1b``.

    Covers ANSI escapes, carriage returns, bidirectional overrides, invisible and private
    characters, and lone surrogates. Characters in ``keep`` stay (a newline, say).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or _harmless(c) else _escape(c) for c in text)


def _harmless(character: str) -> bool:
    if character == "\N{NO-BREAK SPACE}" or character.isprintable():
        return True
    return unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def spell(text: str, encoding: str) -> str:
    """Text in the characters that a stream can carry; plain substitutes where it cannot."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii")
    return text


def width(text: str) -> int:
    """Columns that cleaned text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def shorten(text: str, columns: int) -> str:
    """Text cut to so many columns, with ``…`` where something was left out."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for character in text:
        used += width(character)
        if used > columns - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def markdown(text: str, limit: int = 80) -> str:
    """Text from a stranger as harmless inline Markdown, without line breaks, cut to ``limit``.

    A forge looks for people (``@name``), issues (``#1``) and addresses (``www.``) in what is left
    after Markdown: a space of no width keeps them from being found.
    """
    flat = "".join(character if character.isprintable() else " " for character in text)[:limit]
    escaped = re.sub(r"([\\`*_{}\[\]()<>#+!|~&@:])", r"\\\1", flat)
    return re.sub(r"([@#]|www(?=\.))", "\\1\N{ZERO WIDTH SPACE}", escaped, flags=re.IGNORECASE)
