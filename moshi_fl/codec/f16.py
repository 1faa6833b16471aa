"""``f16``: half precision. Half the bytes of ``f32``, with about three decimal digits kept."""

from __future__ import annotations

import numpy as np

from moshi_fl.codec.base import F32, F64, Shape
from moshi_fl.weights import Array

LARGEST = np.float32(65504.0)  # of float16


class Float16:
    """IEEE half precision, rounded to nearest even.

    Values beyond the range are clipped to its end, and values below it become zero: error feedback
    carries what is missing into the next round.
    """

    name = "f16"

    def layout(self, shape: Shape) -> tuple[str, Shape]:
        """The tensor's own shape."""
        return "F16", shape

    def encode(self, delta: F32) -> Array:
        """The nearest half-precision values."""
        return np.clip(delta, -LARGEST, LARGEST).astype("<f2").reshape(delta.shape)

    def check(self, entry: Array, shape: Shape) -> str:
        """Every finite value is fine."""
        return "" if np.isfinite(entry).all() else "holds a value that is not finite"

    def decode(self, entry: Array, shape: Shape) -> F32:
        """The same values, widened."""
        return entry.astype(np.float32).reshape(shape)

    def add(self, entry: Array, shape: Shape, start: int, total: F64, weight: float) -> None:
        """Widen, scale, add."""
        term = entry.reshape(-1)[start : start + len(total)].astype(np.float64)
        term *= weight
        total += term
