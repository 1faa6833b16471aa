"""Files that no client makes: each must be refused by the gate, with its own reason.

Every file is as small as an honest one unless its size is the attack, and its record tells the
truth about it: size, hash and place are right, so that the file itself is what is judged.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moshi_fl.codec.base import Codec, Shape
from moshi_fl.codec.delta import delta_bytes, encode_delta, max_delta_bytes
from moshi_fl.weights import Weights

NAN, INFINITY = 0x7FC0, 0x7F80  # bfloat16
TENSOR = "fc_out.weight"


@dataclass(frozen=True)
class Honest:
    """What an attacker begins with: an honest delta, and the hub's codec."""

    delta: Weights
    codec: Codec
    shapes: Mapping[str, Shape]

    def entries(self) -> dict[str, np.ndarray]:
        """The honest delta's entries, to be falsified."""
        return dict(encode_delta(self.delta, self.codec)[0])

    def file(self, entries: Weights | None = None) -> bytes:
        """A file of these entries."""
        return delta_bytes(self.entries() if entries is None else entries, self.codec)


@dataclass(frozen=True)
class Broken:
    """A file that is refused: what it is called, the reason code, and how it is made."""

    name: str
    code: str
    make: Callable[[Honest], bytes]


def _with_level(bits: int) -> Callable[[Honest], bytes]:
    """The high level of the first chunk is this bfloat16."""

    def make(honest: Honest) -> bytes:
        entries = honest.entries()
        entry = entries[TENSOR].copy()
        entry[2:4] = np.frombuffer(struct.pack("<H", bits), np.uint8)
        return honest.file(entries | {TENSOR: entry})

    return make


def _with_header(header: object) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


def header_bomb(_honest: Honest) -> bytes:
    """A few bytes that claim a header of an exbibyte."""
    return struct.pack("<Q", 1 << 60) + b"{" + b" " * 100


def tensor_bomb(_honest: Honest) -> bytes:
    """A hundred bytes that claim a tensor of a pebibyte."""
    size = 1 << 50
    return _with_header({TENSOR: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})


def overlap(_honest: Honest) -> bytes:
    """Many tensors that all unfold from the same few bytes."""
    same = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    return _with_header({f"t{number}": same for number in range(20)}) + bytes(8)


def nesting(_honest: Honest) -> bytes:
    """A header that is nothing but brackets."""
    text = b'{"a":' + b"[" * 2000
    return struct.pack("<Q", len(text)) + text


def wrong_shape(honest: Honest) -> bytes:
    """One tensor is a byte shorter than the codec makes it."""
    entries = honest.entries()
    return honest.file(entries | {TENSOR: entries[TENSOR][:-1]})


def wrong_dtype(honest: Honest) -> bytes:
    """One tensor has the right length, but another type."""
    entries = honest.entries()
    return honest.file(entries | {TENSOR: entries[TENSOR].view(np.int8)})


def unknown_tensor(honest: Honest) -> bytes:
    """A tensor that the model does not have."""
    return honest.file({"fc_out.extra": honest.entries()[TENSOR]})


def oversize(honest: Honest) -> bytes:
    """More bytes than any delta of this model has."""
    return honest.file() + bytes(max_delta_bytes(honest.shapes, honest.codec))


def nothing(honest: Honest) -> bytes:
    """A file without a tensor."""
    return honest.file({})


def zeros(honest: Honest) -> bytes:
    """Every weight stays as it is."""
    shapes = honest.shapes.items()
    return honest.file(
        {name: honest.codec.encode(np.zeros(shape, np.float32)) for name, shape in shapes}
    )


def too_large(honest: Honest) -> bytes:
    """Well-formed, but farther than any hub's ``max_norm``."""
    moved = {name: (array * 1e6).astype(np.float32) for name, array in honest.delta.items()}
    return honest.file(encode_delta(moved, honest.codec)[0])


BROKEN = (
    Broken("NaN", "bad-values", _with_level(NAN)),
    Broken("infinity", "bad-values", _with_level(INFINITY)),
    Broken("header bomb", "not-safetensors", header_bomb),
    Broken("tensor bomb", "not-safetensors", tensor_bomb),
    Broken("overlapping tensors", "not-safetensors", overlap),
    Broken("endless nesting", "not-safetensors", nesting),
    Broken("wrong shape", "wrong-layout", wrong_shape),
    Broken("wrong type", "wrong-layout", wrong_dtype),
    Broken("unknown tensor", "unknown-tensor", unknown_tensor),
    Broken("oversize", "oversize", oversize),
    Broken("no tensor", "empty", nothing),
    Broken("zero delta", "zero-delta", zeros),
    Broken("beyond max_norm", "over-norm", too_large),
)
"""Every file that is refused for what it is."""
