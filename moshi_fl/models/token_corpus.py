"""Training windows out of a stream of tokens, each once an epoch, in an order that takes no memory.

Window ``i`` is ``context + 1`` tokens from ``i * context`` on: neighbours share a token, so every
token but the first is a target once an epoch (of the end, less than a window may be left over).
The order is a permutation that is computed, not stored: batch ``n`` can be made without any other,
from a stream of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from moshi_fl import shards
from moshi_fl.data import Split
from moshi_fl.errors import DataError
from moshi_fl.models.family import DataSummary
from moshi_fl.shards import Tokens, TokenSource

_ROUNDS = 8


@dataclass(frozen=True)
class TokenArray:
    """A stream of tokens in memory."""

    tokens: Tokens

    def __len__(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def read(self, start: int, count: int) -> Tokens:
        """These tokens. Raises ``IndexError`` when they are not all there."""
        if start < 0 or count < 0 or start + count > len(self.tokens):
            raise IndexError(f"tokens {start} to {start + count} of {len(self.tokens)}")
        return self.tokens[start : start + count]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the tokens."""
        return shards.fingerprint(self)


@dataclass(frozen=True)
class TokenCorpus:
    """A stream of training tokens; ``split`` has the texts, where it was made from texts."""

    tokens: TokenSource
    context: int
    summary: DataSummary
    split: Split | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the tokens."""
        return self.tokens.fingerprint

    @property
    def num_examples(self) -> int:
        """Windows per epoch; a stream shorter than a window is one.

        Raises:
            DataError: Less than two tokens, so there is nothing to predict.
        """
        if len(self.tokens) < 2:
            raise DataError(
                f"Only {len(self.tokens)} token(s) to train on; at least two are needed.",
                hint="Give files or shards with more text.",
            )
        return max(1, (len(self.tokens) - 1) // self.context)


def token_windows(
    corpus: TokenCorpus, batch_size: int, *, seed: int, start: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Endless batches (B, context + 1) from batch number ``start`` on.

    A batch may have the end of one epoch and the beginning of the next. Of a stream shorter than
    a window all rows are the whole stream.

    Raises:
        DataError: Less than two tokens.
    """
    count = corpus.num_examples
    return _batches(corpus, batch_size, Shuffle(count, seed), _length(corpus), start)


def window_count(corpus: TokenCorpus) -> int:
    """How many windows without a common token there are."""
    return len(corpus.tokens) // _length(corpus)


def take_windows(corpus: TokenCorpus, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Windows (B, context + 1) by number; unlike those of an epoch, they share no token."""
    length = _length(corpus)
    rows = np.empty((len(numbers), length), np.int64)
    for row, number in zip(rows, numbers.tolist(), strict=True):
        row[:] = corpus.tokens.read(number * length, length)
    return rows


def _length(corpus: TokenCorpus) -> int:
    return min(corpus.context + 1, len(corpus.tokens))


def _batches(
    corpus: TokenCorpus, batch_size: int, order: Shuffle, length: int, start: int
) -> Iterator[NDArray[np.int64]]:
    first = start * batch_size
    while True:
        rows = np.empty((batch_size, length), np.int64)
        for row, window in zip(rows, order.pick(first, batch_size).tolist(), strict=True):
            row[:] = corpus.tokens.read(window * corpus.context, length)
        yield rows
        first += batch_size


class Shuffle:
    """An endless sequence of 0 to ``count - 1``, all of them in a new order each epoch.

    The order is a cipher: an alternating Feistel network over ``a * b >= count`` numbers (Black
    and Rogaway 2002), applied again to what falls outside. So any place is found in O(1).
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        a = isqrt(count - 1) + 1
        self._a, self._b = np.uint64(a), np.uint64(-(-count // a))
        self._keys: tuple[int, NDArray[np.uint64]] = (-1, np.empty(0, np.uint64))

    def pick(self, first: int, count: int) -> NDArray[np.int64]:
        """Elements ``first`` to ``first + count``."""
        parts = []
        while count:
            epoch, place = divmod(first, self._count)
            here = min(count, self._count - place)
            parts.append(self._permuted(np.arange(place, place + here, dtype=np.uint64), epoch))
            first, count = first + here, count - here
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def _permuted(self, numbers: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        keys = self._keys_of(epoch)
        numbers = self._encipher(numbers, keys)
        while len(outside := np.flatnonzero(numbers >= self._count)):
            numbers[outside] = self._encipher(numbers[outside], keys)
        return numbers

    def _keys_of(self, epoch: int) -> NDArray[np.uint64]:
        if self._keys[0] != epoch:
            state = np.random.SeedSequence([self._seed, epoch]).generate_state(_ROUNDS, np.uint64)
            self._keys = (epoch, state.astype(np.uint64, copy=False))
        return self._keys[1]

    def _encipher(
        self, numbers: NDArray[np.uint64], keys: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        left, right = numbers % self._a, numbers // self._a
        for first, second in keys.reshape(-1, 2):
            left = (left + _mixed(right, first) % self._a) % self._a
            right = (right + _mixed(left, second) % self._b) % self._b
        return left + self._a * right


def _mixed(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Well-spread 64-bit numbers (the finaliser of splitmix64, Steele et al. 2014)."""
    mixed = numbers ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
