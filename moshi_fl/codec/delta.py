"""A whole delta: error feedback, the file, and the view of a stranger's file.

A delta file is a canonical safetensors file with one entry per changed tensor, as the codec lays it
out, and the codec's name in its metadata. ``Delta.parse`` believes nothing: size, header, names and
layouts are compared with the base before a value is looked at, and every value before one is used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moshi_fl.codec.base import F32, F64, Codec, Shape
from moshi_fl.errors import CorruptRecord, Rejected, TrainingError
from moshi_fl.weights import DTYPES, Array, Weights, header_bytes, serialize, tensors_in

FORMAT = "moshi-fl-delta-1"
BLOCK = 1 << 16  # weights looked at in one go; float64 temporaries of this size stay in the cache

SLACK = 1 << 10  # bytes by which a header may be too long and still be read, to say what is wrong


class DeltaProblem(Rejected):
    """A delta file that breaks a rule.

    ``code`` is one of ``not-safetensors``, ``unknown-tensor``, ``wrong-layout``, ``bad-values``,
    ``oversize`` and ``empty``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode_delta(
    delta: Weights, codec: Codec, carry: Weights | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Encode a delta with error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847).

    What the codec cannot express of ``delta + carry`` is the carry of the next round. Tensors of
    which nothing would be sent are left out. A carry from before a vocabulary growth, with fewer
    rows, is continued with zeros.

    Returns:
        Entries for ``delta_bytes``, and the new carry (float32; tensors that are zero left out).

    Raises:
        TrainingError: A value is not finite.
        CorruptRecord: The carry belongs to another model.
    """
    entries: dict[str, Array] = {}
    rest: dict[str, Array] = {}
    for name in sorted({*delta, *(carry or {})}):
        wanted = _wanted(name, delta, carry or {})
        entry = codec.encode(wanted)
        sent = codec.decode(entry, wanted.shape)
        if sent.any():
            entries[name] = entry
            wanted = wanted - sent
        if wanted.any():
            rest[name] = wanted
    return entries, rest


def _wanted(name: str, delta: Weights, carry: Weights) -> F32:
    if name not in carry:
        wanted = np.asarray(delta[name], dtype=np.float32)
    elif name not in delta:
        wanted = np.asarray(carry[name], dtype=np.float32)
    else:
        wanted = np.array(delta[name], dtype=np.float32)
        part = carry[name]
        if not is_prefix(part.shape, wanted.shape):
            raise CorruptRecord(
                f"the error feedback of {name!r} has shape {part.shape}, the model {wanted.shape}."
            )
        with np.errstate(over="ignore"):
            wanted.reshape(-1)[: part.size] += part.reshape(-1)
    if not np.isfinite(wanted).all():
        raise TrainingError(f"the delta of {name!r} holds a value that is not finite.")
    return wanted


def is_prefix(older: Shape, newer: Shape) -> bool:
    """Whether a tensor of this shape may have grown, by rows, to the newer one."""
    if not older or not newer:
        return older == newer
    return older[1:] == newer[1:] and older[0] <= newer[0]


def delta_bytes(entries: Weights, codec: Codec) -> bytes:
    """The delta file: equal entries, equal bytes."""
    return b"".join(serialize(entries, _metadata(codec)))


def max_delta_bytes(shapes: Mapping[str, Shape], codec: Codec) -> int:
    """Size of a delta that carries every tensor: no valid one is larger."""
    layouts = _layouts(shapes, codec)
    sizes = (math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in layouts.values())
    return len(header_bytes(layouts, _metadata(codec))) + sum(sizes)


def _layouts(shapes: Mapping[str, Shape], codec: Codec) -> dict[str, tuple[str, Shape]]:
    return {name: codec.layout(shape) for name, shape in shapes.items()}


def _metadata(codec: Codec) -> dict[str, str]:
    return {"codec": codec.name, "format": FORMAT}


class Delta:
    """A checked delta file. Decodes nothing until asked, and no more than asked."""

    def __init__(
        self,
        entries: Weights,
        shapes: Mapping[str, Shape],
        codec: Codec,
        mapped: mmap.mmap | None = None,
    ) -> None:
        self._entries = entries
        self._codec = codec
        self._mapped = mapped
        self.shapes = {name: shapes[name] for name in sorted(entries)}
        """Shape of each tensor that the delta carries, in canonical order."""

    @classmethod
    def parse(
        cls, data: bytes | memoryview, shapes: Mapping[str, Shape], codec: Codec, name: str
    ) -> Delta:
        """Check a delta file from anywhere.

        Args:
            data: The whole file.
            shapes: Tensor shapes of the base that the delta was made for.
            codec: The codec that the hub prescribes.
            name: What to call the file in an error.

        Raises:
            DeltaProblem: It breaks a rule; ``code`` says which.
        """
        _check_size(len(data), shapes, codec, name)
        delta = cls(_entries(data, shapes, codec, name), shapes, codec)
        delta._check_values(name)
        return delta

    @classmethod
    def open(
        cls, path: Path, shapes: Mapping[str, Shape], codec: Codec, *, checked: bool = False
    ) -> Delta:
        """Memory-map a delta file and check it; ``release`` lets go of the pages read so far.

        Args:
            path: The file.
            shapes: Tensor shapes of the base that the delta was made for.
            codec: The codec that the hub prescribes.
            checked: These very bytes passed before; spares the pass over all values.

        Raises:
            DeltaProblem: It breaks a rule; ``code`` says which.
        """
        _check_size(path.stat().st_size, shapes, codec, path.name)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = _entries(memoryview(mapped), shapes, codec, path.name)
        delta = cls(entries, shapes, codec, mapped)
        if not checked:
            delta._check_values(path.name)
        return delta

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it carries, in canonical order."""
        return tuple(self.shapes)

    def decode(self, name: str) -> F32:
        """One tensor of the delta, in the shape it had in its base."""
        return self._codec.decode(self._entries[name], self.shapes[name])

    def add(self, name: str, start: int, total: F64, weight: float) -> None:
        """``total += weight * delta[start : start + len(total)]``, flat, in float64, in place.

        Where the delta carries nothing, be it the whole tensor or the rows by which the tensor has
        grown since, nothing is added.
        """
        if name not in self.shapes:
            return
        inside = total[: max(0, math.prod(self.shapes[name]) - start)]
        if len(inside):
            self._codec.add(self._entries[name], self.shapes[name], start, inside, weight)

    def norm(self) -> float:
        """Euclidean norm over all tensors, in float64, the same on every machine."""
        total = 0.0
        for name, shape in self.shapes.items():
            for start in range(0, math.prod(shape), BLOCK):
                block = np.zeros(min(BLOCK, math.prod(shape) - start))
                self.add(name, start, block, 1.0)
                # A running sum, unlike a sum, adds in the same order on every machine.
                total += float(np.add.accumulate(block * block)[-1])
            self.release()
        return math.sqrt(total)

    def largest(self) -> float:
        """The largest magnitude of all values."""
        found = 0.0
        for name, shape in self.shapes.items():
            for start in range(0, math.prod(shape), BLOCK):
                block = np.zeros(min(BLOCK, math.prod(shape) - start))
                self.add(name, start, block, 1.0)
                found = max(found, float(block.max()), -float(block.min()))
            self.release()
        return found

    @property
    def is_zero(self) -> bool:
        """Whether it would change nothing."""
        return self.norm() == 0.0  # no square of a float32 underflows in float64

    def release(self) -> None:
        """Let go of the file's pages read so far, so that many open deltas cost no memory."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _check_values(self, name: str) -> None:
        for tensor, shape in self.shapes.items():
            reason = self._codec.check(self._entries[tensor], shape)
            if reason:
                raise DeltaProblem("bad-values", f"{name}: {tensor!r} {reason}.")
            self.release()


def _check_size(size: int, shapes: Mapping[str, Shape], codec: Codec, name: str) -> None:
    limit = max_delta_bytes(shapes, codec)
    if size > limit:
        raise DeltaProblem("oversize", f"{name}: {size} bytes, a delta has at most {limit}.")
    if not size:  # and a file of no bytes cannot be mapped
        raise DeltaProblem("not-safetensors", f"{name}: the file is empty.")


def _entries(
    data: bytes | memoryview, shapes: Mapping[str, Shape], codec: Codec, name: str
) -> dict[str, Array]:
    """The tensors of a file whose header is exactly what ``delta_bytes`` would write."""
    longest = 2 * len(header_bytes(_layouts(shapes, codec), _metadata(codec))) + SLACK
    if int.from_bytes(data[:8], "little") > longest:  # as objects it would take many times as much
        raise DeltaProblem("not-safetensors", f"{name}: its header has more than {longest} bytes.")
    try:
        entries = tensors_in(data, name=name)
    except CorruptRecord as error:
        raise DeltaProblem("not-safetensors", str(error)) from error
    if not entries:
        raise DeltaProblem("empty", f"{name}: carries no tensor.")
    for tensor, entry in entries.items():
        _check_entry(tensor, entry, shapes, codec, name)
    header = header_bytes(
        {tensor: codec.layout(shapes[tensor]) for tensor in entries}, _metadata(codec)
    )
    if bytes(data[: len(header)]) != header:
        raise DeltaProblem(
            "wrong-layout", f"{name}: the header is not that of a {FORMAT} file of {codec.name}."
        )
    return entries


def _check_entry(
    tensor: str, entry: Array, shapes: Mapping[str, Shape], codec: Codec, name: str
) -> None:
    if tensor not in shapes:
        raise DeltaProblem("unknown-tensor", f"{name}: the base has no tensor {tensor!r}.")
    dtype, shape = codec.layout(shapes[tensor])
    if entry.dtype != DTYPES[dtype] or entry.shape != shape:
        raise DeltaProblem(
            "wrong-layout",
            f"{name}: {tensor!r} is {entry.dtype} {entry.shape}, "
            f"{codec.name} makes {DTYPES[dtype]} {shape}.",
        )
