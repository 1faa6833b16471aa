"""``f32``: the delta itself, exactly. For tests, small models, and where bytes are cheap."""

from __future__ import annotations

import numpy as np

from moshi_fl.codec.base import F32, F64, Shape
from moshi_fl.weights import Array


class Float32:
    """Lossless: one little-endian float32 per weight."""

    name = "f32"

    def layout(self, shape: Shape) -> tuple[str, Shape]:
        """The tensor's own shape."""
        return "F32", shape

    def encode(self, delta: F32) -> Array:
        """The same values."""
        return delta.astype("<f4")

    def check(self, entry: Array, shape: Shape) -> str:
        """Every finite value is fine."""
        return "" if np.isfinite(entry).all() else "holds a value that is not finite"

    def decode(self, entry: Array, shape: Shape) -> F32:
        """The same values."""
        return entry.astype(np.float32).reshape(shape)

    def add(self, entry: Array, shape: Shape, start: int, total: F64, weight: float) -> None:
        """Widen, scale, add; a weight of 1 scales nothing."""
        if weight == 1.0:
            total += entry.reshape(-1)[start : start + len(total)]
            return
        term = entry.reshape(-1)[start : start + len(total)].astype(np.float64)
        term *= weight
        total += term
