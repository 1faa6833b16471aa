"""``topk``: the largest weights of each chunk, with 2-bit values (SparseLoCo, arXiv 2508.15706).

A tensor is read flat in chunks of ``chunk`` weights; the last may be shorter. Of ``n`` weights a
chunk keeps the ``k = min(keep, n)`` of largest magnitude, ties to the lower position, so a short
tensor (a bias, a gain) is served better than its share. Per chunk the entry holds, in this order:

- two levels ``low`` and ``high``, as little-endian bfloat16 (4 bytes);
- the sorted positions in Elias-Fano code: the ``w = floor(log2(n / k))`` low bits of each, then the
  high parts in unary, bit ``(position >> w) + index`` set, ``k + ((n - 1) >> w)`` bits;
- one sign bit per value, then one bit per value that chooses ``high``;
- zero bits up to the next byte.

Bits are numbered from the least significant. That is 84 bytes for 64 of 4096, where 12-bit
positions would need 116. The levels are the exact two-means clustering of the kept magnitudes. One
delta has one spelling: a single level is always ``high`` (``low`` is then zero, for zeros alone),
and when fewer than ``k`` weights are not zero, the lowest positions of zeros fill up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moshi_fl.codec.base import F32, F64, Shape
from moshi_fl.errors import ConfigError
from moshi_fl.weights import Array

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

MAX_CHUNK = 1 << 20
LEVEL_BYTES = 4
SMALLEST = 0x0080_0000  # bits of the smallest normal float32; what is below counts as zero
LARGEST_LEVEL = 0x7F7F  # bits of the largest finite bfloat16
BATCH = 1 << 20  # weights encoded or decoded at a time, to bound temporary memory


@dataclass(frozen=True)
class TopK:
    """Top-k sparsification with 2-bit values.

    Args:
        chunk: Weights per chunk.
        keep: How many of them are kept.

    Raises:
        ConfigError: ``chunk`` is not in 1 .. 2^20 or ``keep`` not in 1 .. ``chunk``.
    """

    chunk: int = 4096
    keep: int = 64

    name = "topk"

    def __post_init__(self) -> None:
        for option, limit in (("chunk", MAX_CHUNK), ("keep", self.chunk)):
            value = getattr(self, option)
            if type(value) is not int or not 1 <= value <= limit:
                raise ConfigError(f"codec topk: {option} must be 1 to {limit}, not {value!r}.")

    def layout(self, shape: Shape) -> tuple[str, Shape]:
        """A flat run of bytes, whose length follows from the number of weights."""
        return "U8", (sum(len(part) for part in self._parts(shape)),)

    def encode(self, delta: F32) -> Array:
        """Keep the largest of each chunk."""
        flat = np.ascontiguousarray(delta, dtype=np.float32).reshape(-1)
        pieces = [
            part.spelling.encode(flat[part.weights].reshape(part.rows, part.spelling.n))
            for part in self._batches(delta.shape)
        ]
        return np.concatenate([np.empty(0, np.uint8), *(piece.reshape(-1) for piece in pieces)])

    def check(self, entry: Array, shape: Shape) -> str:
        """Levels, positions and bits as ``encode`` would have chosen and ordered them."""
        reasons = (part.spelling.check(part.of(entry)) for part in self._batches(shape))
        return next(filter(None, reasons), "")

    def decode(self, entry: Array, shape: Shape) -> F32:
        """Zeros, with the kept weights at their levels."""
        flat = np.zeros(math.prod(shape), np.float32)
        for part in self._batches(shape):
            rows = part.spelling.decode(part.of(entry))
            flat[part.flat(rows.positions)] = rows.values().reshape(-1)
        return flat.reshape(shape)

    def add(self, entry: Array, shape: Shape, start: int, total: F64, weight: float) -> None:
        """Add to the kept positions alone; ``total`` must hold no negative zero."""
        stop = start + len(total)
        for part in self._parts(shape, start, stop):
            rows = part.spelling.decode(part.of(entry))
            at = part.flat(rows.positions) - start
            values = rows.values().reshape(-1)
            if part.weights.start < start or part.weights.stop > stop:
                inside = (at >= 0) & (at < len(total))
                at, values = at[inside], values[inside]
            total[at] += weight * values.astype(np.float64)

    def _parts(self, shape: Shape, start: int = 0, stop: int | None = None) -> Iterator[_Part]:
        """The whole chunks, then the short one, as far as they touch ``start .. stop``."""
        size = math.prod(shape)
        stop = size if stop is None else min(stop, size)
        whole, rest = divmod(size, self.chunk)
        body, tail = _Spelling(self.chunk, self.keep), _Spelling(rest, min(self.keep, rest))
        first, last = start // self.chunk, min(whole, -(-stop // self.chunk))
        if first < last:
            yield _Part(body, first, last - first, 0, 0)
        if rest and stop > whole * self.chunk:
            yield _Part(tail, 0, 1, whole * self.chunk, whole * body.bytes)

    def _batches(self, shape: Shape) -> Iterator[_Part]:
        step = max(1, BATCH // self.chunk)
        for part in self._parts(shape):
            for first in range(part.first, part.first + part.rows, step):
                rows = min(step, part.first + part.rows - first)
                yield _Part(part.spelling, first, rows, part.weights_before, part.bytes_before)


class _Rows(NamedTuple):
    """Chunks of equal length; arrays of shape (rows, k) unless said otherwise."""

    low: Words  # (rows,), bfloat16 bits
    high: Words  # (rows,)
    positions: Integers
    negative: Mask
    is_high: Mask

    def levels(self) -> Words:
        return np.where(self.is_high, self.high[:, None], self.low[:, None])

    def values(self) -> F32:
        return (self.levels() << 16 | self.negative.astype(np.uint32) << 31).view(np.float32)


@dataclass(frozen=True)
class _Spelling:
    """How chunks of ``n`` weights of which ``k`` are kept are written."""

    n: int
    k: int

    @property
    def width(self) -> int:
        return (self.n // self.k).bit_length() - 1

    @property
    def unary(self) -> int:
        return self.k + ((self.n - 1) >> self.width)

    @property
    def bits(self) -> int:
        return self.k * self.width + self.unary + 2 * self.k

    @property
    def bytes(self) -> int:
        return LEVEL_BYTES + -(-self.bits // 8) if self.n else 0

    def encode(self, chunks: F32) -> Bytes:
        words = chunks.view(np.uint32)
        magnitudes = words & np.uint32(0x7FFF_FFFF)
        magnitudes[magnitudes < SMALLEST] = 0
        positions = _largest(magnitudes, self.k)
        kept = np.take_along_axis(magnitudes, positions, axis=1).view(np.float32)
        low, high, is_high = _two_means(kept.astype(np.float64))
        negative = np.take_along_axis(words >> 31 != 0, positions, axis=1)
        negative &= is_high | (low != 0)[:, None]
        return self._pack(_Rows(low, high, positions, negative, is_high))

    def _pack(self, rows: _Rows) -> Bytes:
        count = len(rows.positions)
        low_bits = (rows.positions[:, :, None] >> np.arange(self.width)) & 1
        unary = np.zeros((count, self.unary), np.uint8)
        ones = (rows.positions >> self.width) + np.arange(self.k)
        np.put_along_axis(unary, ones, 1, axis=1)
        bits = [low_bits.reshape(count, -1).astype(np.uint8), unary, rows.negative, rows.is_high]
        packed = np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little")
        levels = np.stack([rows.low, rows.high], axis=1).astype("<u2").view(np.uint8)
        return np.concatenate([levels, packed], axis=1)

    def _fields(self, entry: Bytes) -> tuple[NDArray[np.uint16], Bytes, Bytes, Bytes, Bytes]:
        levels = np.ascontiguousarray(entry[:, :LEVEL_BYTES]).view("<u2")
        bits = np.unpackbits(entry[:, LEVEL_BYTES:], axis=1, bitorder="little")
        ends = np.cumsum([self.k * self.width, self.unary, 2 * self.k])
        low_bits, unary, choices, padding = np.split(bits, ends, axis=1)
        return levels, low_bits, unary, choices, padding

    def decode(self, entry: Bytes) -> _Rows:
        """Read checked rows of shape (rows, bytes)."""
        levels, low_bits, unary, choices, _ = self._fields(entry)
        count = len(entry)
        ones = np.flatnonzero(unary).reshape(count, self.k)
        ones -= np.arange(count)[:, None] * self.unary + np.arange(self.k)
        positions = ones << self.width
        places = low_bits.reshape(count, self.k, self.width)
        for place in range(self.width):
            positions |= places[:, :, place].astype(np.int64) << place
        low, high = levels.astype(np.uint32).T
        negative, is_high = choices[:, : self.k] != 0, choices[:, self.k :] != 0
        return _Rows(low, high, positions, negative, is_high)

    def check(self, entry: Bytes) -> str:
        _, _, unary, _, padding = self._fields(entry)
        if padding.any():
            return "has padding bits that are not zero"
        if (np.count_nonzero(unary, axis=1) != self.k).any():
            return "has a chunk with the wrong number of positions"
        rows = self.decode(entry)
        if (np.diff(rows.positions, axis=1) <= 0).any() or (rows.positions >= self.n).any():
            return "has positions that are out of order or out of range"
        return _check_levels(rows) or _check_zeros(rows)


@dataclass(frozen=True)
class _Part:
    """A run of chunks of one spelling, and where it lies in the tensor and in the entry."""

    spelling: _Spelling
    first: int
    rows: int
    weights_before: int
    bytes_before: int

    def __len__(self) -> int:
        return self.rows * self.spelling.bytes

    @property
    def weights(self) -> slice:
        start = self.weights_before + self.first * self.spelling.n
        return slice(start, start + self.rows * self.spelling.n)

    def of(self, entry: Array) -> Bytes:
        start = self.bytes_before + self.first * self.spelling.bytes
        return entry[start : start + len(self)].reshape(self.rows, self.spelling.bytes)

    def flat(self, positions: Integers) -> Integers:
        starts = self.weights.start + np.arange(self.rows) * self.spelling.n
        flat: Integers = (positions + starts[:, None]).reshape(-1)
        return flat


def _largest(magnitudes: Words, k: int) -> Integers:
    """Sorted positions of the k largest of each row; of equals, the lower positions."""
    rows, n = magnitudes.shape
    threshold = np.partition(magnitudes, n - k, axis=1)[:, n - k : n - k + 1]
    chosen = magnitudes >= threshold
    crowded = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
    if len(crowded):
        above = magnitudes[crowded] > threshold[crowded]
        ties = chosen[crowded] & ~above
        room = k - np.count_nonzero(above, axis=1)
        chosen[crowded] = above | (ties & (np.cumsum(ties, axis=1) <= room[:, None]))
    positions: Integers = np.flatnonzero(chosen).reshape(rows, k)
    positions -= np.arange(rows)[:, None] * n
    return positions


def _two_means(kept: F64) -> tuple[Words, Words, Mask]:
    """Exact clustering of each row of magnitudes into two levels, by trying every split.

    A row that holds zeros keeps ``low`` for them.
    """
    k = kept.shape[1]
    ordered = -np.sort(-kept, axis=1)
    sums = np.cumsum(ordered, axis=1)
    counts = np.arange(1, k + 1)
    # Minimising the squared error is maximising sum^2 / count over the two clusters.
    gain = sums**2 / counts + (sums[:, -1:] - sums) ** 2 / np.maximum(k - counts, 1)
    nonzero = np.count_nonzero(kept, axis=1)
    split = np.where(nonzero < k, nonzero, np.argmax(gain, axis=1) + 1)
    border = np.take_along_axis(ordered, np.maximum(split - 1, 0)[:, None], axis=1)
    is_high = (kept >= border) & (kept > 0)
    high = _bfloat16(_mean(kept, is_high))
    low = _bfloat16(_mean(kept, ~is_high))
    single = low == high
    low[single] = 0
    is_high |= single[:, None] & (kept > 0)
    return low, high, is_high


def _mean(values: F64, chosen: Mask) -> F64:
    # A running sum, unlike a sum, adds in the same order on every machine.
    total = np.cumsum(np.where(chosen, values, 0.0), axis=1)[:, -1]
    mean: F64 = total / np.maximum(np.count_nonzero(chosen, axis=1), 1)
    return mean


def _bfloat16(values: F64) -> Words:
    """Bits of the nearest bfloat16 that is finite, for values that are not negative."""
    words = values.astype(np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    finite: Words = np.minimum(rounded, np.uint32(LARGEST_LEVEL))
    return finite


def _check_levels(rows: _Rows) -> str:
    low, high = rows.low, rows.high
    if (high > LARGEST_LEVEL).any():
        return "has a level that is negative or not finite"
    smallest = SMALLEST >> 16
    if ((low > 0) & (low < smallest) | (high > 0) & (high < smallest)).any():
        return "has a level below the smallest normal number"
    if ((low >= high) & (high > 0) | (low > high)).any():
        return "has levels that are not in order"
    unused = (high > 0) & ~rows.is_high.any(axis=1) | (low > 0) & rows.is_high.all(axis=1)
    return "has a level that no value uses" if unused.any() else ""


def _check_zeros(rows: _Rows) -> str:
    zero = rows.levels() == 0
    if (zero & (rows.negative | rows.is_high)).any():
        return "has a zero with a sign or at the high level"
    # A zero at index i is the lowest possible when everything up to it is kept: position i.
    if (zero & (rows.positions != np.arange(rows.positions.shape[1]))).any():
        return "has zeros that are not at the lowest positions"
    return ""
