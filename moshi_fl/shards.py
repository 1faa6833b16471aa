"""Token ids on disk: a folder of ``.npy`` files, read as one long stream.

The files are one-dimensional arrays of whole numbers (uint16 as we write them), in order of name;
their borders mean nothing to a reader. They are memory-mapped: opening a folder reads a header of
each file and nothing else, whatever its size. The header is parsed here rather than by numpy, so
that a damaged file is one clear error, and nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from moshi_fl.errors import DataError
from moshi_fl.weights import atomic_file

Tokens = NDArray[np.uint16]

MAX_ID = (1 << 16) - 1
MAX_OPEN = 128  # files mapped at a time; each holds a file descriptor
TOKENS_PER_SHARD = 100_000_000  # 200 MB
BLOCK = 1 << 20  # tokens
_SAMPLED, _SAMPLE = 8192, 4096  # blocks and tokens of each that stand for a large stream
_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 128
_MAX_HEADER = 10_000
_AGAIN = "Make the shards anew: moshi-fl tokenize shards"


class TokenSource(Protocol):
    """A stream of token ids that can be read anywhere."""

    def __len__(self) -> int:
        """How many tokens there are."""
        ...

    def read(self, start: int, count: int) -> Tokens:
        """These tokens; all of them must be there."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the tokens, as ``fingerprint`` computes it."""
        ...


def fingerprint(source: TokenSource) -> str:
    """SHA-256 over length and tokens; the same however the tokens are stored.

    Of more than 33 million tokens, 8,192 blocks of 4,096 at even distances stand for the whole,
    so that it takes 0.1 s for 10 GB as well. That notices other data, not a changed word.
    """
    size = len(source)
    state = hashlib.sha256(size.to_bytes(8, "little"))
    if size <= _SAMPLED * _SAMPLE:
        blocks = [(start, min(BLOCK, size - start)) for start in range(0, size, BLOCK)]
    else:
        last = size - _SAMPLE
        blocks = [(last * n // (_SAMPLED - 1), _SAMPLE) for n in range(_SAMPLED)]
    for start, count in blocks:
        state.update(source.read(start, count).astype("<u2", copy=False).tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class _Shard:
    """One file: what its header says, checked against its size."""

    path: Path
    dtype: np.dtype[Any]
    offset: int  # bytes
    size: int  # tokens

    def map(self) -> NDArray[Any]:
        if not self.size:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.size,))


class TokenShards:
    """A folder of shards; ``open`` makes one. Not to be changed while it is read.

    Ids are checked as they are read: a few microseconds a batch. ``check`` reads everything, at the
    speed of the disk (10 GB from memory: about two seconds).
    """

    def __init__(self, shards: Iterable[_Shard], vocab_size: int | None = None) -> None:
        self._shards = list(shards)
        self._starts = [0, *accumulate(shard.size for shard in self._shards)]
        self._vocab_size = vocab_size
        self._limit = min(vocab_size or MAX_ID + 1, MAX_ID + 1)
        self._map = lru_cache(MAX_OPEN)(lambda index: self._shards[index].map())

    @classmethod
    def open(cls, folder: Path, *, vocab_size: int | None = None) -> TokenShards:
        """Open a folder's ``*.npy`` files.

        Args:
            folder: Where they are; other files and hidden ones are passed over.
            vocab_size: Ids must be smaller; None allows all that fit 16 bits.

        Raises:
            DataError: There are none, or one of them is no array of token ids; names it.
        """
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"{folder} {what}.", hint="Give the folder with the .npy shards.")
        files = (path for path in folder.glob("*.npy") if not path.name.startswith("."))
        shards = [_inspect(path) for path in sorted(files, key=lambda path: path.name)]
        if not shards:
            raise DataError(f"{folder} has no .npy shards.", hint=_AGAIN.replace("anew", "first"))
        return cls(shards, vocab_size)

    def __len__(self) -> int:
        """How many tokens all shards have."""
        return self._starts[-1]

    def read(self, start: int, count: int) -> Tokens:
        """Tokens ``start`` to ``start + count``, across however many shards.

        Raises:
            DataError: An id is not in the vocabulary; names shard, position and id.
            IndexError: There are not so many tokens.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        tokens = np.empty(count, np.uint16)
        index, done = bisect_right(self._starts, start) - 1, 0
        while done < count:
            here = start + done - self._starts[index]
            part = self._map(index)[here : here + count - done]
            self._refuse_unknown(part, index, here)
            tokens[done : done + len(part)] = part
            done, index = done + len(part), index + 1
        return tokens

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the tokens."""
        return fingerprint(self)

    def check(self) -> None:
        """Read everything once.

        Raises:
            DataError: As for ``read``.
        """
        for start in range(0, len(self), BLOCK):
            self.read(start, min(BLOCK, len(self) - start))

    def _refuse_unknown(self, part: NDArray[Any], index: int, position: int) -> None:
        if self._limit > MAX_ID and part.dtype.itemsize == 2 and part.dtype.kind == "u":
            return
        if not len(part) or (part.max() < self._limit and part.min() >= 0):
            return
        first = int(np.flatnonzero((part >= self._limit) | (part < 0))[0])
        bound = self._vocab_size or self._limit
        raise DataError(
            f"{self._shards[index].path}: token id {part[first]} at position {position + first} "
            f"is outside the vocabulary of {bound}.",
            hint="These shards belong to another tokenizer, or vocab_size is too small. " + _AGAIN,
        )


def _inspect(path: Path) -> _Shard:
    """Read a file's header. Raises ``DataError``."""
    with path.open("rb") as file:
        dtype, shape = _read_header(file, path)
        offset, size = file.tell(), path.stat().st_size
    if dtype.kind not in "iu":
        raise DataError(f"{path}: holds {dtype}, not whole numbers.", hint=_AGAIN)
    if len(shape) != 1:
        raise DataError(f"{path}: has {len(shape)} dimensions instead of one.", hint=_AGAIN)
    found = (size - offset) // dtype.itemsize
    if offset + shape[0] * dtype.itemsize != size:
        raise DataError(
            f"{path}: damaged: {shape[0]} tokens announced, {found} there.",
            hint="Copy the file again, or make the shards anew: moshi-fl tokenize shards",
        )
    return _Shard(path, dtype, offset, shape[0])


def _read_header(file: IO[bytes], path: Path) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = file.read(8)
    if magic[:6] != _MAGIC or magic[6:7] not in (b"\1", b"\2", b"\3"):
        raise DataError(f"{path}: not a .npy file.", hint=_AGAIN)
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    text = file.read(length) if length <= _MAX_HEADER else b""
    if not length or len(text) != length:
        raise DataError(f"{path}: damaged: the header is cut off or too long.", hint=_AGAIN)
    try:
        table = ast.literal_eval(text.decode("latin-1").strip())
        descr, shape = table["descr"], table["shape"]
        dtype = np.dtype(descr if isinstance(descr, str) else "V1")
        counts = tuple(map(int, shape))
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: damaged: the header makes no sense.", hint=_AGAIN) from error
    if any(count < 0 for count in counts):
        raise DataError(f"{path}: damaged: a size below zero.", hint=_AGAIN)
    return dtype, counts


def write_shards(
    tokens: Iterable[Tokens], folder: Path, *, tokens_per_shard: int = TOKENS_PER_SHARD
) -> list[Path]:
    """Write a stream of tokens as shards; the folder appears when it is complete.

    Args:
        tokens: Pieces of any length, which are not kept.
        folder: Must not exist yet, or be empty.
        tokens_per_shard: All files but the last have so many.

    Returns:
        The files, in order.

    Raises:
        DataError: The folder is in use, or there are no tokens.
    """
    if tokens_per_shard < 1:
        raise DataError(f"{tokens_per_shard} tokens per shard: must be at least one.")
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and _is_empty(folder))):
        raise DataError(f"{folder} already exists.", hint="Give another folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        with _Writer(partial, tokens_per_shard) as writer:
            for piece in tokens:
                writer.write(piece)
        if not writer.names:
            raise DataError("There are no tokens to write.", hint="Give files with some text.")
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in writer.names]


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


class _Writer:
    """Writes pieces into files of equal length; each file's header is filled in at its end."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._current = contextlib.ExitStack()
        self._file: IO[bytes]
        self._written = 0
        self.names: list[str] = []

    def write(self, piece: Tokens) -> None:
        while len(piece):
            if not self._written:
                self.names.append(f"shard-{len(self.names):06}.npy")
                self._file = self._current.enter_context(atomic_file(self._folder / self.names[-1]))
                self._file.write(_header(0))
            part, piece = np.split(piece, [self._size - self._written])
            self._file.write(np.ascontiguousarray(part, "<u2").data)
            self._written += len(part)
            if self._written == self._size:
                self._finish()

    def _finish(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._written))
        self._current.close()
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._written:
            self._finish()
        self._current.__exit__(kind, error, trace)


def _header(size: int) -> bytes:
    """The first bytes of a ``.npy`` file of so many uint16, always equally long."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({size},), }}"
    room = _HEADER_BYTES - 10
    start = _MAGIC + b"\1\0" + room.to_bytes(2, "little")
    return start + text.ljust(room - 1).encode() + b"\n"
