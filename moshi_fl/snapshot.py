"""Whole weights and the steps between them, as they lie in a hub; and how weights grow.

A snapshot is an ``index.json`` and files ``weights-000.zst``, ``weights-001.zst``, … of at most
48 MiB (forges refuse or warn about larger ones). The float32 weights, all tensors in canonical
order as one flat sequence, are cut into blocks of 2^20, as ``moshi_fl.planes`` compresses them; a
block is never split over two files. A *step* holds differences from older weights, a *keyframe*
differences from zero; both give the new weights bit for bit.

Whoever decodes compares the digest of the weights afterwards. Until then the files are hostile:
what is allocated or written follows from the old weights or the round's record, never from them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from moshi_fl.errors import CorruptRecord
from moshi_fl.planes import Words, changed, decode_block, difference, encode_block
from moshi_fl.records import MAX_RECORD_BYTES, Count, File, Record, dump, load
from moshi_fl.weights import (
    MAX_DIMENSIONS,
    MAX_NAME_LENGTH,
    Array,
    Weights,
    atomic_file,
    header_bytes,
    write_atomic,
)

Kind = Literal["keyframe", "step"]

INDEX = "index.json"
MAX_FILE_BYTES = 48 << 20
BLOCK = 1 << 20  # weights


class Tensor(Record, frozen=True, kw_only=True):
    """Name and shape of one float32 tensor."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
    shape: Annotated[tuple[Count, ...], Meta(max_length=MAX_DIMENSIONS)]


class Index(Record, frozen=True, kw_only=True):
    """What the files of a snapshot hold: the tensors in canonical order."""

    format: Literal[1] = 1
    kind: Kind
    files: Annotated[int, Meta(ge=0, le=1000)]
    tensors: tuple[Tensor, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def encode_keyframe(weights: Weights, directory: Path) -> list[File]:
    """Write weights as a keyframe into a directory and return its files, the index last.

    Raises:
        TypeError: A tensor is not float32.
    """
    blocks = (difference(np.zeros_like(new), new) for new in _blocks(weights))
    return _write("keyframe", weights, blocks, directory)


def encode_step(old: Weights, new: Weights, directory: Path) -> list[File]:
    """Write what leads from one model to the next, and return the files, the index last.

    Vocabulary growth is not part of a step: it comes before or after.

    Raises:
        TypeError: A tensor is not float32.
        ValueError: Names or shapes differ.
    """
    if _shapes(old) != _shapes(new):
        raise ValueError("a step leads between models of equal names and shapes")
    blocks = (difference(a, b) for a, b in zip(_blocks(old), _blocks(new), strict=True))
    return _write("step", new, blocks, directory)


def decode_keyframe(directory: Path, out: Path, *, parameters: int) -> None:
    """Write the weights of a keyframe to a safetensors file, which appears only when complete.

    Args:
        directory: Where the keyframe's files lie.
        out: The safetensors file; block by block, so memory does not grow with the model.
        parameters: How many weights the round's record promises.

    Raises:
        CorruptRecord: The files are not a keyframe of that many weights.
    """
    index = _index(directory, "keyframe")
    if index.parameters != parameters:
        raise CorruptRecord(f"{INDEX}: {index.parameters} weights, the round has {parameters}.")
    entries = {name: ("F32", shape) for name, shape in index.shapes.items()}
    with atomic_file(out) as file:
        file.write(header_bytes(entries))
        for words in _differences(index, directory):
            new = changed(np.zeros_like(words), words)
            file.write(new.astype("<u4", copy=False).data)


def decode_step(old: Weights, directory: Path) -> dict[str, Array]:
    """The weights to which a step leads from the old ones, bit for bit those encoded.

    Args:
        old: The weights that the step was made from.
        directory: Where the step's files lie.

    Raises:
        CorruptRecord: The files are not a step between models of these names and shapes.
    """
    index = _index(directory, "step")
    if index.shapes != _shapes(old):
        raise CorruptRecord(f"{INDEX}: the step is for a model of other tensors.")
    flat, start = np.empty(index.parameters, np.uint32), 0
    for words, change in zip(_blocks(old), _differences(index, directory), strict=True):
        flat[start : start + len(words)] = changed(words, change)
        start += len(words)
    sizes = [math.prod(shape) for shape in index.shapes.values()]
    tensors = np.split(flat.view(np.float32), np.cumsum(sizes)[:-1]) if sizes else []
    return {
        name: tensor.reshape(shape)
        for (name, shape), tensor in zip(index.shapes.items(), tensors, strict=True)
    }


def grow(
    weights: Weights, tensors: Sequence[str], characters: str, byte_row: int
) -> dict[str, Array]:
    """Append one row per new character of the vocabulary to each of the tensors.

    The row is the mean of the rows of the character's UTF-8 bytes, which spelled it until now: in
    float64, added in the order of the bytes, rounded once to float32.

    Args:
        weights: All weights; those not named are passed on as they are.
        tensors: Names of the tensors that grow along axis 0: matrices, or vectors such as a bias.
        characters: The new characters, in order.
        byte_row: Row of byte 0; byte ``b`` has row ``byte_row + b``.

    Raises:
        CorruptRecord: A tensor is missing or has no rows for the bytes, or the text is not Unicode.
    """
    try:
        spellings = [character.encode() for character in characters]
    except UnicodeEncodeError as error:
        raise CorruptRecord(f"growth: {error}.") from error
    grown = dict(weights)
    for name in tensors:
        if name not in weights:
            raise CorruptRecord(f"growth: the model has no tensor {name!r}.")
        old = weights[name]
        if not old.ndim or byte_row < 0 or len(old) < byte_row + 256:
            raise CorruptRecord(f"growth: {name!r} of shape {old.shape} lacks rows for bytes.")
        rows = np.empty((len(spellings), *old.shape[1:]), np.float32)
        for row, spelling in enumerate(spellings):
            rows[row] = _mean_row(old, byte_row, spelling)
        grown[name] = np.concatenate([old, rows])
    return grown


def lengthened(delta: Weights, tensors: Sequence[str], rows: int) -> dict[str, Array]:
    """A delta made before the vocabulary gained so many rows: of those it says nothing."""
    longer = dict(delta)
    for name in tensors if rows else ():
        unchanged = np.zeros((rows, *longer[name].shape[1:]), np.float32)
        longer[name] = np.concatenate([longer[name], unchanged])
    return longer


def _mean_row(tensor: Array, byte_row: int, spelling: bytes) -> Array:
    total = np.zeros(tensor.shape[1:])
    for byte in spelling:
        total = total + tensor[byte_row + byte]
    return total / float(len(spelling))


def _write(kind: Kind, weights: Weights, blocks: Iterable[Words], directory: Path) -> list[File]:
    files: list[File] = []
    pending: list[bytes] = []
    for block in map(encode_block, blocks):
        if sum(map(len, pending)) + len(block) > MAX_FILE_BYTES:
            files.append(_save(directory, _file_name(len(files)), b"".join(pending)))
            pending = []
        pending.append(block)
    if pending:
        files.append(_save(directory, _file_name(len(files)), b"".join(pending)))
    tensors = tuple(Tensor(name=name, shape=shape) for name, shape in _shapes(weights).items())
    index = Index(kind=kind, files=len(files), tensors=tensors)
    return [*files, _save(directory, INDEX, dump(index))]


def _save(directory: Path, name: str, data: bytes) -> File:
    write_atomic(directory / name, data)
    return File(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _file_name(number: int) -> str:
    return f"weights-{number:03d}.zst"


def _index(directory: Path, kind: Kind) -> Index:
    with _open(directory, INDEX) as file:
        index = load(file.read(MAX_RECORD_BYTES + 1), Index, name=INDEX)
    if index.kind != kind:
        raise CorruptRecord(f"{INDEX}: a {index.kind} where a {kind} was expected.")
    names = [tensor.name for tensor in index.tensors]
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise CorruptRecord(f"{INDEX}: tensors repeated or not in canonical order.")
    return index


def _open(directory: Path, name: str) -> BufferedReader:
    if not (directory / name).is_file():
        raise CorruptRecord(f"{name}: missing.")
    return (directory / name).open("rb")


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: weights[name].shape for name in sorted(weights)}


def _block_lengths(total: int) -> Iterator[int]:
    return (min(BLOCK, total - start) for start in range(0, total, BLOCK))


def _blocks(weights: Weights) -> Iterator[Words]:
    """Bit patterns of all weights in canonical order, in blocks that ignore tensor borders."""
    lengths = _block_lengths(sum(array.size for array in weights.values()))
    block, filled = np.empty(next(lengths, 0), np.uint32), 0
    for name in sorted(weights):
        if weights[name].dtype != np.dtype("<f4"):
            raise TypeError(f"{name!r} is {weights[name].dtype}; weights are float32")
        flat = weights[name].reshape(-1)
        while len(flat):
            part, flat = np.split(flat, [len(block) - filled])
            block[filled : filled + len(part)] = part.view("<u4")
            filled += len(part)
            if filled == len(block):
                yield block
                block, filled = np.empty(next(lengths, 0), np.uint32), 0


def _differences(index: Index, directory: Path) -> Iterator[Words]:
    """The blocks of all files; neither fewer nor more than the index promises."""
    lengths = _block_lengths(index.parameters)
    for number in range(index.files):
        name = _file_name(number)
        with _open(directory, name) as file:
            while file.peek(1):
                if not (count := next(lengths, 0)):
                    raise CorruptRecord(f"{name}: data beyond the last weight.")
                yield decode_block(file, count, name)
    if next(lengths, 0):
        raise CorruptRecord(f"{INDEX}: its files end before the last weight.")
