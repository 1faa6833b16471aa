"""Mutations that know what they mutate: bytes, JSON as text and as a tree, headers of safetensors.

All randomness comes from the generator that is passed in, so an input can be made again from its
seed. Many mutants are spelled canonically again, or have their lengths and offsets put right:
otherwise nearly all would die at the first check and say nothing about the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from moshi_fl.weights import DTYPES

Json = Any
DEEP = 3000
MOST_NESTED = 150  # as a tree; deeper text is among the special bytes

SPECIAL_TEXT = [
    *("", "\0", "..", "../../x", "refs/heads/main", "\ud800", "\u202e", "é", "😀", "NaN", "-1"),
    *("0" * 16, "0" * 32, "0" * 40, "0" * 64, "0" * 63, "A" * 64, "f" * 32, "\n", '"', "\\", "%s"),
    *("refs/x/" + "y/" * 90, "x" * 201, "x" * 1001, "__metadata__", "<script>", "contribution"),
]
SPECIAL_NUMBERS: list[Json] = [
    *(0, 1, -1, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.1, 1e-320, 1e308, -1e308, 1.5, math.nan, math.inf, -math.inf, True, False),
]
SPECIAL_BYTES = [
    *(b"9" * 5000, b"-1", b"1e999", b"NaN", b"nan", b"inf", b"null", b"true", b'"', b"\\u0000"),
    *(b"{" * DEEP, b"[" * DEEP, b"\\ud800", b"\xff", b"\0", b"../../x", b"\xe2\x80\xae", b","),
    *(b"18446744073709551616", b"9007199254740993", b"0.1", b"[]", b"{}", b"\n[hub]\n", b"\r\n"),
    *(b"[[", b"= {", b'"""', b"'''", b"1979-05-27", b"0x10", b"\xed\xa0\x80", b" " * 300),
]


def any_of(random: Random, *ways: tuple[int, Callable[[], Any]]) -> Any:
    """The result of one of the functions, chosen by weight."""
    return random.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()


# Bytes.


def mutate_bytes(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """One to four cuts, copies, flips, splices with another input, or odd pieces put in."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(_BYTE_WAYS)(random, data, other or data)
    return data


def _span(random: Random, data: bytes, most: int = 48) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.randint(0, most))


def _cut(random: Random, data: bytes, other: bytes) -> bytes:
    start, stop = _span(random, data)
    return data[:start] + data[stop:]


def _double(random: Random, data: bytes, other: bytes) -> bytes:
    start, stop = _span(random, data)
    return data[:stop] + data[start:stop] * random.randint(1, 3) + data[stop:]


def _flip(random: Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 8))):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: random.randint(0, len(data))]


def _splice(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def _put(random: Random, data: bytes, other: bytes) -> bytes:
    start, stop = _span(random, data)
    return data[:start] + random.choice(SPECIAL_BYTES) + data[random.choice((start, stop)) :]


def _noise(random: Random, data: bytes, other: bytes) -> bytes:
    start, stop = _span(random, data, 12)
    return data[:start] + random.randbytes(stop - start) + data[stop:]


def _append(random: Random, data: bytes, other: bytes) -> bytes:
    return data + random.choice((b"\0", b"\n", b" ", b"}", random.randbytes(9)))


_BYTE_WAYS = (_cut, _double, _flip, _truncate, _splice, _put, _noise, _append)


# JSON.


def canonical(tree: Json) -> bytes:
    """The spelling that records have (hub/PROTOCOL.md)."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False)
    data = text.encode("utf-8", "surrogatepass")
    try:
        return msgspec.json.format(data, indent=2) + b"\n"
    except msgspec.DecodeError:  # NaN, or too deep
        return data + b"\n"


def spelled(random: Random, tree: Json) -> bytes:
    """Mostly canonical; else compact, unsorted, with a key twice, or hurt as bytes."""
    data = canonical(tree)
    return any_of(  # type: ignore[no-any-return]
        random,
        (14, lambda: data),
        (
            1,
            lambda: json.dumps(tree, ensure_ascii=random.random() < 0.5).encode("utf-8", "replace"),
        ),
        (1, lambda: _repeat_a_line(random, data)),
        (4, lambda: mutate_bytes(random, data)),
    )


def _repeat_a_line(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    return b"\n".join([*lines[: index + 1], *lines[index:]])


def mutate_tree(random: Random, tree: Json) -> Json:
    """A copy with one to three changes; about half of them keep the type of what they change."""
    tree = _copied(tree)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return _odd(random)
        holder, key = random.choice(places)
        try:
            random.choice(_TREE_WAYS)(random, holder, key, places)
        except RecursionError:  # a deep part was put into a deep part
            return _nested(MOST_NESTED)
    return tree


def _copied(tree: Json) -> Json:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _places(tree: Json) -> Any:
    """Every (container, key) below, so that what is there can be replaced."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _odd(random: Random) -> Json:
    return any_of(
        random,
        (3, lambda: random.choice(SPECIAL_TEXT)),
        (3, lambda: random.choice(SPECIAL_NUMBERS)),
        (1, lambda: None),
        (1, lambda: random.choice(([], {}, [[]], [0] * 300, {"x": 1}, [None, None]))),
        (1, lambda: _nested(random.choice((2, 20, MOST_NESTED)))),
    )


def _nested(depth: int) -> Json:
    tree: Json = 0
    for level in range(depth):
        tree = [tree] if level % 2 else {"a": tree}
    return tree


def _replace(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    holder[key] = _odd(random)


def _tweak(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    holder[key] = _tweaked(random, holder[key])


def _tweaked(random: Random, value: Json) -> Json:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, value ^ 1 << 40))
    if isinstance(value, float):
        return random.choice((value + 1.0, -value, value * 1e10, value / 3, value * 1e300, 1e-9))
    if isinstance(value, str):
        return _tweaked_text(random, value)
    if isinstance(value, list):
        return random.choice((value[1:], value + value, value[::-1], [*value, 0], value[:1]))
    return dict(list(value.items())[1:]) if isinstance(value, dict) else 0


def _tweaked_text(random: Random, text: str) -> str:
    at = random.randint(0, len(text))
    digit = random.choice("0123456789abcdefg./-_ Z\u00e9")
    ways = (text[:at], text[at:], text + digit, text[:at] + digit + text[at + 1 :], text * 2)
    return random.choice((*ways, text.upper(), text[::-1]))


def _drop(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    del holder[key]


def _rename(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    if isinstance(holder, dict):
        holder[_tweaked_text(random, str(key))] = holder.pop(key)
    else:
        holder.insert(random.randint(0, len(holder)), _copied(holder[key]))


def _add(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    if isinstance(holder, dict):
        holder[random.choice(SPECIAL_TEXT)] = _odd(random)
    else:
        holder.append(_copied(holder[key]))


def _move(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
    there, other = random.choice(places)
    holder[key] = _copied(there[other]) if _is_at(there, other) else None


def _is_at(holder: Json, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _guarded(way: Callable[..., None]) -> Callable[..., None]:
    def apply(random: Random, holder: Json, key: Any, places: list[Any]) -> None:
        if _is_at(holder, key):  # an earlier change may have taken it away
            way(random, holder, key, places)

    return apply


_TREE_WAYS = tuple(
    map(_guarded, (_tweak, _tweak, _tweak, _tweak, _replace, _replace, _drop, _rename, _add, _move))
)


def dense(random: Random, limit: int) -> bytes:
    """JSON of nearly ``limit`` bytes that is as many values as fit: what costs a reader most."""
    piece = random.choice(
        (b"[],", b"{},", b'"",', b'"ab",', b"0,", b"1.5,", b"[0,0],", b'{"a":1},')
    )
    count = limit // len(piece) - 8
    if random.random() < 0.5:
        return b"[" + piece * count + b"0]"
    field = random.choice((b"options", b"contributions", b"vocabulary_tensors", b"files", b"x"))
    pairs = b",".join(b'"%x":0' % number for number in range(limit // 9))[: limit - 40]
    inner = random.choice(
        (b"[" + piece * (count - 8) + b"0]", b"{" + pairs[: pairs.rfind(b",")] + b"}")
    )
    return b'{"' + field + b'":' + inner + b"}"


# Safetensors.


def split_header(data: bytes) -> tuple[Json, bytes]:
    """Header table and data section of a valid file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(table: Json, body: bytes, random: Random | None = None) -> bytes:
    """A file with this header, padded as the canonical one is; sometimes with a false length."""
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    data = text.encode("utf-8", "surrogatepass")
    data += b" " * (-len(data) % 8)
    length = len(data)
    if random and random.random() < 0.1:
        length = random.choice((0, 1, length - 1, length + 8, 1 << 20, (1 << 20) + 1, 1 << 63))
    return length.to_bytes(8, "little", signed=False) + data + body


def mutate_safetensors(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """Header, values, tensors as wholes, or bytes."""
    table, body = split_header(data)
    return any_of(  # type: ignore[no-any-return]
        random,
        (4, lambda: join_header(mutate_tree(random, table), body, random)),
        (4, lambda: _without_tensors(random, table, body)),
        (4, lambda: data[: len(data) - len(body)] + _mutated_values(random, body)),
        (2, lambda: _reshaped(random, table, body)),
        (3, lambda: mutate_bytes(random, data, other)),
        (1, lambda: random.randrange(1 << 64).to_bytes(8, "little") + data[8:]),
    )


def _mutated_values(random: Random, body: bytes) -> bytes:
    """The same length; patterns that mean something to some codec."""
    changed = bytearray(body)
    kind = random.randrange(4)
    if kind == 0 or not body:
        return bytes(len(body))
    for _ in range(random.choice((1, 4, 64))):
        start = random.randrange(len(body)) & ~3
        piece = random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"))
        if kind == 1:
            piece = random.randbytes(4)
        if kind == 2:
            piece = random.choice((b"\x80\x80\x80\x80", b"\xff\xff\xff\xff", b"\0\x7c\0\xfc"))
        changed[start : start + 4] = piece[: len(body) - start]
    return bytes(changed)


def _without_tensors(random: Random, table: Json, body: bytes) -> bytes:
    """A well-formed file of some of the tensors; names may be exchanged."""
    names = [name for name in table if name != "__metadata__"]
    kept = {name for name in names if random.random() < random.choice((0.1, 0.5, 0.9))}
    parts, new, position = [], {}, 0
    if "__metadata__" in table:
        new["__metadata__"] = table["__metadata__"]
    for name in sorted(kept):
        start, stop = table[name]["data_offsets"]
        parts.append(
            _mutated_values(random, body[start:stop]) if random.random() < 0.2 else body[start:stop]
        )
        called = random.choice(names) if random.random() < 0.05 else name
        new[called] = table[name] | {"data_offsets": [position, position + stop - start]}
        position += stop - start
    return join_header(new, b"".join(parts))


def _reshaped(random: Random, table: Json, body: bytes) -> bytes:
    """Offsets fit shapes and dtypes again, after those were changed."""
    new, position = _copied(table), 0
    for name in sorted(name for name in new if name != "__metadata__"):
        entry = new[name]
        if random.random() < 0.3:
            entry["shape"] = random.choice(
                (entry["shape"][::-1], [*entry["shape"], 1], [math.prod(entry["shape"])], [0], [])
            )
        if random.random() < 0.3:
            entry["dtype"] = random.choice(list(DTYPES))
        size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        entry["data_offsets"] = [position, position + size]
        position += size
    return join_header(new, (body * (position // max(len(body), 1) + 1))[:position])
