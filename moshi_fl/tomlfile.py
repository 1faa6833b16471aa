"""A small TOML file that people edit too: changed one line at a time, so comments stay."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi_fl.errors import ConfigError

MAX_BYTES = 1 << 18

Table = dict[str, Any]


def read(path: Path) -> tuple[str, Table]:
    """Text and content of a file; both empty when it does not exist.

    Raises:
        ConfigError: Unreadable, too long, not UTF-8 or not TOML.
    """
    text = _text(path)
    return text, _parse(path, text)


def place(path: Path, text: str, key: str) -> str:
    """File name and line where a key of the top table is written."""
    for number, line in enumerate(text.splitlines(), 1):
        if _assigns(line, key):
            return f"{path.name}, line {number}"
    return path.name


def put(path: Path, key: str, value: str | int | list[str]) -> None:
    """Set a key of the top table.

    Raises:
        ConfigError: The file is broken already, or the key is written in a way that we cannot edit.
    """
    text, table = read(path)
    lines = text.splitlines()
    start, stop = _span(lines, key) or (_end_of_keys(lines),) * 2
    lines[start:stop] = [f"{key} = {_literal(value)}"]
    _write(path, lines, {**table, key: value})


def drop(path: Path, key: str) -> None:
    """Remove a key of the top table that is there.

    Raises:
        ConfigError: As for ``put``.
    """
    text, table = read(path)
    lines = text.splitlines()
    start, stop = _span(lines, key) or (0, 0)
    del lines[start:stop]
    _write(path, lines, {name: value for name, value in table.items() if name != key})


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_BYTES} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def _parse(path: Path, text: str) -> Table:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}.") from error


def _assigns(line: str, key: str) -> bool:
    name = rf"""["']?{re.escape(key)}["']?"""
    return re.match(rf"\s*{name}\s*[=.]|\s*\[+\s*{name}\s*[\].]", line) is not None


def _span(lines: list[str], key: str) -> tuple[int, int] | None:
    """First line and line after the last of a key's value, which may go on over several lines."""
    start = next((i for i, line in enumerate(lines) if _assigns(line, key)), None)
    if start is None:
        return None
    for stop in range(start + 1, len(lines) + 1):
        try:
            tomllib.loads("\n".join(lines[start:stop]))
        except tomllib.TOMLDecodeError:
            continue
        return start, stop
    return start, start + 1


def _end_of_keys(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))


def _write(path: Path, lines: list[str], expected: Mapping[str, Any]) -> None:
    from moshi_fl.weights import write_atomic

    text = "".join(f"{line}\n" for line in lines)
    try:
        as_meant = tomllib.loads(text) == expected
    except tomllib.TOMLDecodeError:
        as_meant = False
    if not as_meant:
        raise ConfigError(f"{path}: this key is written in an unusual way.", hint=f"Edit {path}.")
    write_atomic(path, text.encode())


def _literal(value: str | int | list[str]) -> str:
    """A value as TOML; text in TOML's basic form is text in JSON's, but for DEL."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
