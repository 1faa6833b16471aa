"""``int8``: one signed byte per weight and one float32 scale per row.

A row of the entry is the scale, little-endian, then the row's values as two's complement bytes from
-127 to 127. A tensor of one dimension or none is a single row; any other has ``shape[0]`` rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moshi_fl.codec.base import F32, F64, Shape
from moshi_fl.weights import Array

SCALE_BYTES = 4
LARGEST = 127
SMALLEST_SCALE = np.finfo(np.float32).tiny  # smaller ones would lose the row's precision
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LARGEST), np.float32(0))


class Int8:
    """Linear quantisation with the row's largest magnitude at 127, rounded to nearest even."""

    name = "int8"

    def layout(self, shape: Shape) -> tuple[str, Shape]:
        """``(rows, 4 + columns)`` bytes."""
        rows, columns = _matrix(shape)
        return "U8", (rows, SCALE_BYTES + columns)

    def encode(self, delta: F32) -> Array:
        """Quantise each row; a row below 1.5e-36 becomes zero."""
        rows, columns = _matrix(delta.shape)
        matrix = np.ascontiguousarray(delta, dtype=np.float32).reshape(rows, columns)
        largest = np.abs(matrix).max(axis=1, initial=0)
        scale = np.minimum(largest / np.float32(LARGEST), LARGEST_SCALE)
        scale[scale < SMALLEST_SCALE] = 0
        divisor = np.where(scale == 0, np.float32(np.inf), scale)[:, None]
        values = np.clip(np.rint(matrix / divisor), -LARGEST, LARGEST).astype(np.int8)
        return np.concatenate([_as_bytes(scale), values.view(np.uint8)], axis=1)

    def check(self, entry: Array, shape: Shape) -> str:
        """Scales in range, the largest value of each row 127, rows of scale zero all zero."""
        scale, values = _parts(entry)
        zero = scale.view(np.uint32) == 0
        # The negation also catches a scale that is no number.
        if not (zero | ((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE))).all():
            return "has a row whose scale is out of range"
        magnitudes = np.abs(values.astype(np.int16))
        largest = magnitudes.max(axis=1, initial=0)
        if not (largest == np.where(zero, 0, LARGEST)).all():
            return "has a row that does not use its scale"
        return ""

    def decode(self, entry: Array, shape: Shape) -> F32:
        """Scale times value, rounded once to float32."""
        return _dequantise(*_parts(entry)).reshape(shape)

    def add(self, entry: Array, shape: Shape, start: int, total: F64, weight: float) -> None:
        """Dequantise only the rows and columns in question."""
        scale, values = _parts(entry)
        _, columns = _matrix(shape)
        position = 0
        for rows, part in _rectangles(start, start + len(total), columns):
            term = _dequantise(scale[rows], values[rows, part]).reshape(-1).astype(np.float64)
            term *= weight
            total[position : position + len(term)] += term
            position += len(term)


def _matrix(shape: Shape) -> tuple[int, int]:
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _as_bytes(scale: F32) -> NDArray[np.uint8]:
    return scale.astype("<f4").view(np.uint8).reshape(-1, SCALE_BYTES)


def _parts(entry: Array) -> tuple[F32, NDArray[np.int8]]:
    scale = np.ascontiguousarray(entry[:, :SCALE_BYTES]).view("<f4").astype(np.float32)
    return scale.reshape(-1), entry[:, SCALE_BYTES:].view(np.int8)


def _dequantise(scale: F32, values: NDArray[np.int8]) -> F32:
    return np.multiply(values, scale[:, None], dtype=np.float32)


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that make up a flat range: at most a tail, whole rows, and a head."""
    while start < stop:
        row, column = divmod(start, columns)
        whole = (stop - start) // columns
        if column or not whole:
            end = min(columns, column + stop - start)
            yield slice(row, row + 1), slice(column, end)
            start += end - column
        else:
            yield slice(row, row + whole), slice(None)
            start += whole * columns
