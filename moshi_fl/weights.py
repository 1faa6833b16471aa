"""Named tensors on disk: safetensors in and out, canonical order, digests.

Knows the container only; what tensors mean is up to models and codecs. Reading is by memory map, so
opening a model costs nothing and aggregating many costs the memory of a block.

The header is parsed here rather than by the safetensors library because files come from strangers:
every length is bounded before it is believed, and a repeated key, a gap, an overlap or a trailing
byte is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moshi_fl.errors import CorruptRecord

Array = NDArray[Any]
Weights = Mapping[str, Array]
"""Tensor name to array. Global weights are float32; canonical order is that of ``sorted``."""

MAX_HEADER_BYTES = 1 << 20
MAX_NAME_LENGTH = 200
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WITH_BFLOAT16 = {**DTYPES, "BF16": np.dtype("<u2")}
"""Of released checkpoints: a number that numpy has no type for, as the bits that it is."""


@dataclass(frozen=True)
class TensorSpec:
    """One entry of a header: dtype name, shape, and byte range within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors, the metadata, and where the data section starts."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int


def dtype_name(array: Array) -> str:
    """Safetensors name of an array's dtype.

    Raises:
        TypeError: The dtype has no name in the format.
    """
    try:
        return _NAMES[array.dtype.newbyteorder("<")]
    except KeyError:
        raise TypeError(f"dtype {array.dtype} cannot be stored") from None


def parse_header(
    prefix: bytes, size: int, *, name: str, dtypes: Mapping[str, np.dtype[Any]] = DTYPES
) -> Header:
    """Check the header of a safetensors file and return it.

    Args:
        prefix: The first bytes of the file, up to ``8 + MAX_HEADER_BYTES``; more does no harm.
        size: Length of the whole file in bytes.
        name: What to call the file in an error.
        dtypes: Those that are accepted, by name.

    Raises:
        CorruptRecord: Anything that is not exactly one well-formed safetensors file.
    """
    if len(prefix) < 8:
        raise CorruptRecord(f"{name}: {size} bytes is too short for a safetensors file.")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptRecord(f"{name}: header of {length} bytes, the limit is {MAX_HEADER_BYTES}.")
    if 8 + length > min(len(prefix), size):
        raise CorruptRecord(f"{name}: truncated inside the header.")
    table = _json_object(prefix[8 : 8 + length], name)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptRecord(f"{name}: metadata must map text to text.")
    tensors = {key: _tensor_spec(key, value, name, dtypes) for key, value in table.items()}
    _check_layout(tensors, size - 8 - length, name)
    return Header(tensors, metadata, 8 + length)


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise CorruptRecord(f"{name}: a key appears twice in the header.")
        return table

    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{name}: the header is not JSON ({error}).") from error
    if not isinstance(table, dict):
        raise CorruptRecord(f"{name}: the header is not a JSON object.")
    return table


def _tensor_spec(
    key: str, value: object, name: str, dtypes: Mapping[str, np.dtype[Any]]
) -> TensorSpec:
    if not 0 < len(key) <= MAX_NAME_LENGTH or not key.isprintable():
        raise CorruptRecord(f"{name}: unusable tensor name {key[:60]!r}.")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptRecord(f"{name}: entry {key!r} must have dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CorruptRecord(
            f"{name}: {key!r} has dtype {str(dtype)[:20]!r}, which is not accepted."
        )
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptRecord(f"{name}: {key!r} has an unusable shape.")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CorruptRecord(f"{name}: {key!r} has unusable offsets.")
    if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise CorruptRecord(f"{name}: the length of {key!r} does not match its dtype and shape.")
    return TensorSpec(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_layout(tensors: dict[str, TensorSpec], length: int, name: str) -> None:
    position = 0
    for spec in sorted(tensors.values(), key=lambda spec: (spec.start, spec.stop)):
        if spec.start != position:
            raise CorruptRecord(f"{name}: tensors overlap or leave a gap at byte {position}.")
        position = spec.stop
    if position != length:
        raise CorruptRecord(
            f"{name}: {length} bytes of data where the header describes {position}."
        )


def read_header(path: Path) -> Header:
    """Check and return the header of a file, reading no more of it than that."""
    with path.open("rb") as file:
        prefix = file.read(8 + MAX_HEADER_BYTES)
    return parse_header(prefix, path.stat().st_size, name=path.name)


def tensors_in(data: memoryview | bytes, *, name: str) -> dict[str, Array]:
    """Read-only views of the tensors in a file's bytes.

    Raises:
        CorruptRecord: Not exactly one well-formed safetensors file.
    """
    view = memoryview(data)
    header = parse_header(bytes(view[: 8 + MAX_HEADER_BYTES]), len(view), name=name)
    return {key: _view(view, header, spec) for key, spec in sorted(header.tensors.items())}


def _view(view: memoryview, header: Header, spec: TensorSpec) -> Array:
    count = math.prod(spec.shape)
    start = header.data_start + spec.start
    array = np.frombuffer(view, DTYPES[spec.dtype], count, start).reshape(spec.shape)
    array.flags.writeable = False
    return array


def open_weights(path: Path) -> dict[str, Array]:
    """Memory-map a safetensors file: read-only arrays in canonical order, nothing copied.

    Raises:
        CorruptRecord: Not a well-formed safetensors file.
    """
    if path.stat().st_size < 8:
        raise CorruptRecord(f"{path.name}: {path.stat().st_size} bytes is too short.")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    return tensors_in(mapped.data, name=path.name)


def header_bytes(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Everything before the data of a canonical file: tensor name to dtype name and shape."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in sorted(entries.items()):
        stop = position + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    header = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def serialize(
    tensors: Weights, metadata: Mapping[str, str] | None = None
) -> Iterable[bytes | memoryview]:
    """Pieces of a safetensors file in canonical order: equal input, equal bytes."""
    entries = {name: (dtype_name(array), array.shape) for name, array in tensors.items()}
    yield header_bytes(entries, metadata)
    for name in sorted(tensors):
        yield _bytes_of(tensors[name])


def _bytes_of(array: Array) -> memoryview:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def save_weights(path: Path, tensors: Weights, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file so that a reader sees the old file or the whole new one."""
    with atomic_file(path) as file:
        for piece in serialize(tensors, metadata):
            file.write(piece)


class atomic_file:  # noqa: N801 - used as a function, as in ``with atomic_file(path) as file``
    """A file that appears under its name only when the block ends without an exception.

    Only its owner can read it, from the first byte on, whatever the umask (``mkstemp``).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes]

    def __enter__(self) -> IO[bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The number of the process tells whether anyone is still writing.
        prefix = f".tmp-{os.getpid()}-"
        handle, self._name = tempfile.mkstemp(prefix=prefix, dir=self._path.parent)
        self._file = os.fdopen(handle, "wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            self._locate(error)
        try:
            if kind is None:
                self._finish()
            else:
                self._close_anyway()
        finally:
            Path(self._name).unlink(missing_ok=True)

    def _finish(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            Path(self._name).replace(self._path)
        except OSError as error:
            self._locate(error)
            self._close_anyway()
            raise

    def _close_anyway(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, which is known by now
            self._file.close()

    def _locate(self, error: OSError) -> None:
        """Name the file: "no space left" alone does not say where."""
        if error.filename is None:
            error.filename = str(self._path)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a small file in one step."""
    with atomic_file(path) as file:
        file.write(data)


def weights_digest(weights: Weights) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor in canonical order, in hex."""
    state = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name]
        shape = ",".join(map(str, array.shape))
        state.update(f"{len(name.encode())}:{name} {dtype_name(array)} [{shape}]\n".encode())
        state.update(_bytes_of(array))
    return state.hexdigest()


def count_parameters(weights: Weights) -> int:
    """How many numbers the weights hold."""
    return sum(array.size for array in weights.values())


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
