"""A user's texts as the ``char`` family sees them: a stream of tokens, windows of it, and pools.

The stream is the files one after the other with ``<end>`` around each. A training window is any
``context + 1`` tokens of it, so the model learns every position, and where files begin and end.
To teach filling in the middle, a share of the windows is rearranged, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_fl import records
from moshi_fl.data import Split
from moshi_fl.errors import DataError
from moshi_fl.models.family import DataSummary
from moshi_fl.tokenizer import CharVocabulary, Tokens

MAX_POOL_BYTES = 64 << 20
MARKS = 4  # around the parts of a rearranged piece
SHORTEST_PIECE = 2 * MARKS  # tokens, marks included


@dataclass(frozen=True)
class CharCorpus:
    """The texts, and the training part as a stream of tokens."""

    split: Split
    summary: DataSummary
    tokens: Tokens
    context: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training texts."""
        return self.split.fingerprint

    @property
    def num_examples(self) -> int:
        """How many windows it takes to cover the stream once."""
        return math.ceil((len(self.tokens) - 1) / self.context)


class Encoder(Protocol):
    """Turns texts into tokens, of which one ends a text."""

    @property
    def end(self) -> int:
        """The token that ends a text."""
        ...

    def encode(self, text: str) -> Tokens:
        """Token ids of a text."""
        ...


def stream(encoder: Encoder, texts: Sequence[str]) -> Tokens:
    """All texts as tokens, with the end mark before, between and after them."""
    end = np.array([encoder.end], np.uint16)
    parts = [end]
    for text in texts:
        parts += [encoder.encode(text), end]
    return np.concatenate(parts)


def windows(
    corpus: CharCorpus, batch_size: int, *, fill_in_middle: float, seed: int, start: int
) -> Iterator[NDArray[np.int64]]:
    """Endless batches (B, context + 1) from batch number ``start`` on; each needs no other.

    ``fill_in_middle`` is the share of the windows that are rearranged.
    """
    length = window_length(corpus)
    index = start
    while True:
        random = np.random.default_rng([seed, index])
        starts = random.integers(0, len(corpus.tokens) - length + 1, batch_size)
        yield _rows(corpus, starts, length, fill_in_middle, random)
        index += 1


def window_length(corpus: CharCorpus) -> int:
    """Tokens of a window."""
    return min(corpus.context + 1, len(corpus.tokens))


def take_windows(
    corpus: CharCorpus, numbers: NDArray[np.int64], *, fill_in_middle: float, seed: int
) -> NDArray[np.int64]:
    """Windows (B, context + 1) by number; no two of them share a token."""
    length = window_length(corpus)
    random = np.random.default_rng(seed)
    return _rows(corpus, numbers * length, length, fill_in_middle, random)


def _rows(
    corpus: CharCorpus,
    starts: NDArray[np.int64],
    length: int,
    fill_in_middle: float,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = corpus.tokens[starts[:, None] + np.arange(length)].astype(np.int64)
    for row in rows[:0] if length < SHORTEST_PIECE else rows:
        if random.random() < fill_in_middle:
            row[:] = _rearranged(row.tolist(), random)
    return rows


def _rearranged(text: list[int], random: np.random.Generator) -> list[int]:
    """As much of the window as fits when piece after piece of it is rearranged.

    Pieces have random lengths and end where a file ends. Were the window a single piece, each
    ``<end>`` would stand at the same place, and a model would learn to count instead of to look
    whether the middle has met the suffix. The last piece is cut off by the end of the window.
    """
    row: list[int] = []
    start = 0
    while (room := len(text) - len(row)) >= SHORTEST_PIECE:
        if text[start] == CharVocabulary.end:
            start += 1
        size = int(random.integers(SHORTEST_PIECE, room + 1)) - MARKS
        piece = text[start : start + size]
        if CharVocabulary.end in piece:
            piece = piece[: piece.index(CharVocabulary.end)]
        row += _middle_last(piece, random)
        start += len(piece)
    return [*row, CharVocabulary.prefix, *text[start:]][: len(text)]


def _middle_last(piece: list[int], random: np.random.Generator) -> list[int]:
    """Prefix, suffix, middle (Bavarian et al. 2022): the middle comes last and sees both."""
    first, second = sorted(random.integers(0, len(piece) + 1, 2).tolist())
    marks = CharVocabulary
    return [
        *(marks.prefix, *piece[:first]),
        *(marks.suffix, *piece[second:]),
        *(marks.middle, *piece[first:second], marks.end),
    ]


class Pool(records.Record, frozen=True, kw_only=True):
    """Evaluation texts, each at most as long in bytes as the context is in tokens.

    Texts, not tokens: after the vocabulary has grown, the same pool is read with the new one.
    """

    format: Literal[1] = 1
    kind: Literal["char-pool"] = "char-pool"
    texts: tuple[str, ...]


def make_pool(texts: Sequence[str], count: int, *, context: int, seed: int) -> bytes:
    """A file with up to ``count`` pieces of the texts, drawn without repetition.

    Raises:
        DataError: The texts have no piece of at least two characters.
    """
    pieces = [piece for text in texts for piece in _pieces(text, context) if len(piece) > 1]
    long = [piece for piece in pieces if len(piece.encode()) >= context // 4]
    pieces = long or pieces
    if not pieces:
        raise DataError("The held-out part has no text.", hint="Give --data more source files.")
    chosen = np.random.default_rng(seed).permutation(len(pieces))[:count]
    return records.dump(Pool(texts=tuple(pieces[i] for i in sorted(chosen.tolist()))))


def pick_texts(data: bytes, sequences: Sequence[int]) -> bytes:
    """A pool file of these texts of another, in this order."""
    texts = read_pool(data)
    return records.dump(Pool(texts=tuple(texts[i] for i in sequences)))


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text cut into pieces of at most ``size`` UTF-8 bytes, between characters."""
    data = text.encode()
    start = 0
    while start < len(data):
        stop = min(start + size, len(data))
        while stop < len(data) and data[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
        yield data[start:stop].decode()
        start = stop


def read_pool(data: bytes) -> tuple[str, ...]:
    """The texts of a pool file.

    Raises:
        CorruptRecord: Not a canonical pool file.
    """
    return records.load(data, Pool, name="evaluation pool", limit=MAX_POOL_BYTES).texts
