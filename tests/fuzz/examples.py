"""A valid example of any record, made from its type: a new record needs no example by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from random import Random
from re import _parser  # what a pattern is made of
from typing import Any

import msgspec
from msgspec import inspect

from moshi_fl.records import Record

TEXTS = ("a", "A", "text", "", "x" * 60)  # where there is no pattern


def records_below(kind: type[Record] = Record) -> Iterator[type[Record]]:
    """All record types that are imported by now, in order of name."""
    found: set[type[Record]] = set()
    waiting = [kind]
    while waiting:
        for below in waiting.pop().__subclasses__():
            found.add(below)
            waiting.append(below)
    yield from sorted(found, key=lambda one: (one.__module__, one.__qualname__))


def example(kind: type[Record], random: Random, *, full: bool) -> dict[str, Any]:
    """A valid record as a JSON tree.

    Args:
        kind: The record.
        random: Chooses lengths and values.
        full: Whether what may be null or empty is there.
    """
    tree = _make(_type_of(kind), random, full)
    msgspec.convert(tree, kind)
    assert isinstance(tree, dict)
    return tree


@cache
def _type_of(kind: type[Record]) -> inspect.Type:
    return inspect.type_info(kind)


def _make(info: inspect.Type, random: Random, full: bool) -> Any:
    make = _MAKERS.get(type(info))
    if make is None:
        raise TypeError(f"tests/fuzz/examples.py cannot make an example of {info}")
    return make(info, random, full)


def _struct(info: Any, random: Random, full: bool) -> Any:
    return {
        field.encode_name: _make(field.type, random, full)
        for field in info.fields
        if field.default is not msgspec.UNSET or full
    }


def _union(info: Any, random: Random, full: bool) -> Any:
    real = [kind for kind in info.types if not isinstance(kind, inspect.NoneType)]
    if len(real) < len(info.types) and not full:
        return None
    return _make(random.choice(real), random, full)


def _text(info: Any, random: Random, full: bool) -> str:
    low, high = info.min_length or 0, info.max_length or 1 << 20
    for _ in range(100):
        text = matching(info.pattern, random) if info.pattern else random.choice(TEXTS)
        text = text if len(text) >= low else text + "x" * low
        if len(text) <= high and (not info.pattern or re.search(info.pattern, text)):
            return text
    raise TypeError(f"tests/fuzz/examples.py cannot make a text that fits {info}")


def matching(pattern: str, random: Random) -> str:
    """A short text that matches a simple pattern: literals, sets, choices, groups, repetition."""
    return "".join(_piece(random, *node) for node in _parsed(pattern))


@cache
def _parsed(pattern: str) -> Any:
    return _parser.parse(pattern)


def _piece(random: Random, kind: Any, what: Any) -> str:  # noqa: PLR0911 - one for each kind
    name = str(kind)
    if name == "LITERAL":
        return chr(what)
    if name == "IN":
        return _piece(random, *random.choice(what))
    if name == "RANGE":
        return chr(random.randint(*what))
    if name == "CATEGORY":
        return random.choice("0123456789")
    if name == "BRANCH":
        return "".join(_piece(random, *node) for node in random.choice(what[1]))
    if name == "SUBPATTERN":
        return "".join(_piece(random, *node) for node in what[-1])
    if name == "MAX_REPEAT":
        least, most, inner = what
        count = random.randint(least, min(int(most), least + 3))
        return "".join(_piece(random, *node) for _ in range(count) for node in inner)
    return ""  # the beginning or the end


def _whole(info: Any, random: Random, full: bool) -> int:
    low = info.ge if info.ge is not None else (info.gt + 1 if info.gt is not None else 0)
    high = info.le if info.le is not None else (info.lt - 1 if info.lt is not None else low + 99)
    return random.randint(low, min(high, low + 99))


def _number(info: Any, random: Random, full: bool) -> float:
    low = info.ge if info.ge is not None else (info.gt if info.gt is not None else 0.0)
    high = info.le if info.le is not None else (info.lt if info.lt is not None else low + 2.0)
    return low + (min(high, low + 2.0) - low) * random.choice((0.25, 0.5))


def _list(info: Any, random: Random, full: bool) -> list[Any]:
    least = info.min_length or 0
    count = max(least, random.randint(1, 3)) if full else least
    return [_make(info.item_type, random, full) for _ in range(count)]


def _tuple(info: Any, random: Random, full: bool) -> list[Any]:
    return [_make(item, random, full) for item in info.item_types]


def _dict(info: Any, random: Random, full: bool) -> dict[str, Any]:
    count = max(info.min_length or 0, 2 if full else 0)
    pairs = (
        (_make(info.key_type, random, full), _make(info.value_type, random, full))
        for _ in range(count)
    )
    return dict(pairs)


_MAKERS: dict[type, Any] = {
    inspect.StructType: _struct,
    inspect.UnionType: _union,
    inspect.StrType: _text,
    inspect.IntType: _whole,
    inspect.FloatType: _number,
    inspect.BoolType: lambda info, random, full: random.random() < 0.5,
    inspect.LiteralType: lambda info, random, full: random.choice(list(info.values)),
    inspect.VarTupleType: _list,
    inspect.ListType: _list,
    inspect.TupleType: _tuple,
    inspect.DictType: _dict,
    inspect.NoneType: lambda info, random, full: None,
    inspect.AnyType: lambda info, random, full: random.choice((0, "x", None)),
}
