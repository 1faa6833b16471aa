"""Blocks of float32 differences as compressed byte planes: the inside of a snapshot's files.

A block holds what leads from old weights to new ones, or from zero. The difference is taken between
the bit patterns as integers in numeric order, and its sign goes to the lowest bit: a small change
has small bits, and a difference from zero has the bare exponent in its top byte, the only byte of
trained weights that compresses. A block is:

- five little-endian uint32 lengths in bytes: mask, plane 0 (lowest bytes) to plane 3;
- the mask, one bit per weight that changes (absent, length 0, when all values are stored);
- four planes with one byte of each stored value.

Mask and planes are zstd frames, or raw where that is not longer; the length tells which. Reading
allocates nothing unchecked: sizes follow from the number of weights, which the caller knows.
"""

from __future__ import annotations

import struct
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

from moshi_fl.errors import CorruptRecord

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

LENGTHS = struct.Struct("<5I")
MASK_BELOW = 15 / 16  # share of changed weights from which the mask no longer pays

# Exponents repeat nothing, they are only unevenly distributed: hardly search, just code entropy.
_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, min_match=7
)
_entropy = zstandard.ZstdCompressor(compression_params=_ENTROPY)
_matches = zstandard.ZstdCompressor(3)
_decompressor = zstandard.ZstdDecompressor()


def difference(old: Words, new: Words) -> Words:
    """New minus old bit patterns in numeric order, the sign in the lowest bit."""
    change = (_ordered(new) - _ordered(old)).view(np.int32)
    folded: Words = ((change << 1) ^ (change >> 31)).view(np.uint32)
    return folded


def changed(old: Words, difference: Words) -> Words:
    """New bit patterns from old ones and ``difference(old, new)``."""
    change = (difference >> 1) ^ -(difference & 1)
    return _ordered(_ordered(old) + change)


def _ordered(words: Words) -> Words:
    """Bit patterns to integers modulo 2^32 that are in the order of the numbers, and back."""
    signed = words.view(np.int32)
    ordered: Words = (signed ^ ((signed >> 31) & 0x7FFF_FFFF)).view(np.uint32)
    return ordered


def encode_block(words: Words) -> bytes:
    """Differences as one block."""
    nonzero = words != 0
    mask = b""
    if np.count_nonzero(nonzero) < MASK_BELOW * len(words):
        mask = _squeeze(np.packbits(nonzero, bitorder="little"))
        words = words[nonzero]
    planes = [_squeeze((words >> shift).astype(np.uint8)) for shift in (0, 8, 16, 24)]
    return b"".join([LENGTHS.pack(len(mask), *map(len, planes)), mask, *planes])


def decode_block(file: IO[bytes], count: int, name: str) -> Words:
    """Read one block of ``count`` differences.

    Raises:
        CorruptRecord: The file (called ``name``) ends early or its block is no such block.
    """
    mask_length, *plane_lengths = LENGTHS.unpack(_read(file, LENGTHS.size, name))
    if not mask_length:
        return _join([_expand(file, length, count, name) for length in plane_lengths])
    packed = _expand(file, mask_length, -(-count // 8), name)
    mask = np.unpackbits(packed, count=count, bitorder="little") != 0
    stored = int(np.count_nonzero(mask))
    words = np.zeros(count, np.uint32)
    words[mask] = _join([_expand(file, length, stored, name) for length in plane_lengths])
    return words


def _squeeze(data: Bytes) -> bytes:
    """The shortest of raw and compressed; of equal length, raw."""
    raw = data.tobytes()
    coded = _entropy.compress(raw)
    # Three planes in four are random bits: what has no entropy to spare is not searched further.
    return min(coded, _matches.compress(raw), key=len) if len(coded) < len(raw) else raw


def _expand(file: IO[bytes], length: int, size: int, name: str) -> Bytes:
    """Read ``size`` bytes that are stored in ``length`` bytes."""
    if length > size:
        raise CorruptRecord(f"{name}: a plane of {length} bytes where {size} is the most.")
    data = _read(file, length, name)
    if length < size:
        data = _decompress(data, size, name)
    return np.frombuffer(data, np.uint8)


def _read(file: IO[bytes], length: int, name: str) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise CorruptRecord(f"{name}: truncated.")
    return data


def _decompress(data: bytes, size: int, name: str) -> bytes:
    try:
        # The size that a frame declares is what the library allocates.
        if zstandard.get_frame_parameters(data).content_size != size:
            raise CorruptRecord(f"{name}: a compressed plane declares another size than {size}.")
        return _decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptRecord(f"{name}: {error}.") from error


def _join(planes: list[Bytes]) -> Words:
    return np.stack(planes, axis=1).view("<u4").reshape(-1)
