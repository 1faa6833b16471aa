"""The interface that every delta codec implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_fl.weights import Array

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Shape = tuple[int, ...]


class Codec(Protocol):
    """Turns the delta of one tensor into an array that safetensors can hold, and back.

    Instances are stateless; error feedback is kept by ``moshi_fl.codec.delta``.
    """

    @property
    def name(self) -> str:
        """Name in ``hub.toml`` and in records."""
        ...

    def layout(self, shape: Shape) -> tuple[str, Shape]:
        """Safetensors dtype and shape of the entry for a tensor of this shape."""
        ...

    def encode(self, delta: F32) -> Array:
        """Entry for a finite float32 tensor of any shape."""
        ...

    def check(self, entry: Array, shape: Shape) -> str:
        """Why a stranger's entry (of the right layout) is not something ``encode`` could have made.

        Empty when it is fine. Refuses non-finite values, positions out of range, and a second
        spelling of the same delta. Must be cheap: it runs on every contribution.
        """
        ...

    def decode(self, entry: Array, shape: Shape) -> F32:
        """The float32 tensor that a checked entry stands for, exactly."""
        ...

    def add(self, entry: Array, shape: Shape, start: int, total: F64, weight: float) -> None:
        """``total += weight * decode(entry)[start:][:len(total)]``, flat, float64, in place.

        Bit for bit what that expression gives with numpy ufuncs, but without decoding the rest.
        """
        ...
