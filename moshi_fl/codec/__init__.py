"""Delta codecs: what a contribution's tensors look like on the wire.

Each codec stores one entry per tensor, under the tensor's own name, whose dtype and shape follow
from the tensor's shape alone. So a file can be checked against the base before it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_fl.codec.base import Codec
from moshi_fl.codec.f16 import Float16
from moshi_fl.codec.f32 import Float32
from moshi_fl.codec.int8 import Int8
from moshi_fl.codec.topk import TopK
from moshi_fl.errors import ConfigError
from moshi_fl.records import Scalar

CODECS: dict[str, tuple[type[Any], frozenset[str]]] = {
    "f32": (Float32, frozenset()),
    "f16": (Float16, frozenset()),
    "int8": (Int8, frozenset()),
    "topk": (TopK, frozenset({"chunk", "keep"})),
}
"""Codec name to its class and the options it takes."""


def get_codec(name: str, options: Mapping[str, Scalar]) -> Codec:
    """The codec that a ``hub.toml`` or a record names.

    Raises:
        ConfigError: No such codec, an option it does not take, or a value out of range.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; known: {', '.join(CODECS)}.")
    kind, known = CODECS[name]
    unknown = sorted(set(options) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"codec {name}: unknown option {unknown[0]!r}; it takes: {takes}.")
    codec: Codec = kind(**options)
    return codec
