"""Dialogues as the ``speech`` family trains and is measured on them: windows of tokens, and pools.

A window is ``segment_frames`` frames of one dialogue, no two of which overlap; the last of a
dialogue is filled up with the zero token. A pool holds windows too, as codes: whoever evaluates
needs no codec, and hears nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moshi_fl.data import HELD_OUT, choose_held_out
from moshi_fl.errors import CorruptRecord, DataError
from moshi_fl.models.family import DataSummary
from moshi_fl.models.speech.data import ZERO_TOKEN, Codes, segments
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.weights import header_bytes, serialize, tensors_in

POOL = {"format": "moshi-fl-speech-pool-1"}
MAX_POOL_BYTES = 64 << 20
SHORTEST = 25  # frames of a lone dialogue: two seconds


@dataclass(frozen=True)
class SpeechCorpus:
    """Windows of tokens, (rows, segment_frames) each.

    Attributes:
        training: (N, rows, frames) int16.
        held_out: Of other dialogues, or of the end of a lone one.
        chances: Of each training window to be drawn, (N,); they add up to 1.
        summary: What was taken.
    """

    training: Codes
    held_out: Codes
    chances: NDArray[np.float64]
    summary: DataSummary

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the training windows and their chances."""
        state = hashlib.sha256(repr(self.training.shape).encode())
        state.update(self.training.astype("<i2", copy=False).tobytes())
        state.update(self.chances.astype("<f8", copy=False).tobytes())
        return state.hexdigest()

    @property
    def num_examples(self) -> int:
        """How many training windows there are."""
        return len(self.training)


@dataclass(frozen=True)
class Encoded:
    """A dialogue as tokens, and how often pieces of it are drawn."""

    codes: Codes
    weight: float

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.codes.tobytes()).digest()


def make_corpus(
    dialogues: Sequence[Encoded], frames: int, summary: DataSummary, *, seed: int
) -> SpeechCorpus:
    """Hold out about a tenth of the dialogues, by a hash of their tokens, and cut all of them.

    Of dialogues with the same tokens, one counts.

    Raises:
        DataError: A lone dialogue too short to cut in two.
    """
    different = list({entry.digest: entry for entry in dialogues}.values())
    training, held_out = _split(different, seed)
    cut = [segments(entry.codes, frames) for entry in training]
    chances = np.repeat([entry.weight for entry in training], [len(pieces) for pieces in cut])
    return SpeechCorpus(
        np.stack([piece for pieces in cut for piece in pieces]),
        np.stack([piece for entry in held_out for piece in segments(entry.codes, frames)]),
        chances / chances.sum(),
        summary,
    )


def _split(dialogues: Sequence[Encoded], seed: int) -> tuple[list[Encoded], list[Encoded]]:
    if len(dialogues) == 1:
        return _cut(dialogues[0])
    chosen = choose_held_out([entry.digest for entry in dialogues], seed)
    return (
        [entry for entry in dialogues if entry.digest not in chosen],
        [entry for entry in dialogues if entry.digest in chosen],
    )


def _cut(entry: Encoded) -> tuple[list[Encoded], list[Encoded]]:
    """A lone dialogue in two, with a gap between them."""
    length = entry.codes.shape[1]
    if length < SHORTEST:
        raise DataError(
            f"one dialogue of {length} frames is too short to hold a part of it out.",
            hint=f"give --data more dialogues, or one of at least {SHORTEST} frames (2 s)",
        )
    held, gap = max(1, int(length * HELD_OUT)), max(1, int(length * HELD_OUT / 10))
    first, last = entry.codes[:, : length - held - gap], entry.codes[:, length - held :]
    return [Encoded(first, entry.weight)], [Encoded(last, entry.weight)]


def draw(
    corpus: SpeechCorpus, batch_size: int, *, seed: int, start: int
) -> Iterator[NDArray[np.int64]]:
    """Endless batches (B, rows, frames) from number ``start`` on; each needs no other."""
    index, count = start, corpus.num_examples
    likely = int(np.count_nonzero(corpus.chances))
    while True:
        random = np.random.default_rng([seed, index])
        again = batch_size > likely
        chosen = random.choice(count, batch_size, replace=again, p=corpus.chances)
        yield corpus.training[chosen].astype(np.int64)
        index += 1


def make_pool(windows: Codes, count: int, *, seed: int) -> bytes:
    """A file with up to ``count`` of the windows, drawn without repetition."""
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return pool_file(windows[np.sort(chosen)])


def pool_file(windows: Codes) -> bytes:
    """The file of a pool of these windows, in this order."""
    return b"".join(serialize({"codes": windows}, POOL))


def read_pool(data: bytes, config: LMConfig, frames: int) -> Codes:
    """The windows (N, rows, T) of a pool file, T at most ``frames``.

    Raises:
        CorruptRecord: Not such a file, or its tokens are not those of this model.
    """
    name = "evaluation pool"
    if len(data) > MAX_POOL_BYTES:
        raise CorruptRecord(f"{name}: {len(data)} bytes, the limit is {MAX_POOL_BYTES}.")
    codes = tensors_in(data, name=name).get("codes")
    rows = config.n_q + 1
    if codes is None or codes.dtype != np.int16 or codes.ndim != 3:
        raise CorruptRecord(f"{name}: it holds no codes of speech.")
    header = header_bytes({"codes": ("I16", codes.shape)}, POOL)
    if data[: len(header)] != header:
        raise CorruptRecord(f"{name}: not as a pool of speech is written.")
    if codes.shape[1] != rows or not 1 <= codes.shape[2] <= frames:
        raise CorruptRecord(
            f"{name}: windows of {codes.shape[1]} streams and {codes.shape[2]} frames; "
            f"this model has {rows} and at most {frames}."
        )
    _check_tokens(codes, config, name)
    return codes


def _check_tokens(codes: Codes, config: LMConfig, name: str) -> None:
    """Within range, and something to predict in each window."""
    limits = np.array([config.text_card, *[config.card] * config.n_q])[None, :, None]
    wrong = (codes < ZERO_TOKEN) | (codes >= limits)
    if wrong.any():
        item, stream, frame = np.argwhere(wrong)[0].tolist()
        raise CorruptRecord(
            f"{name}: token {codes[item, stream, frame]} of stream {stream} in window {item} "
            "is out of range."
        )
    known = (codes[:, : 1 + config.dep_q] != ZERO_TOKEN).any(axis=2).all(axis=1)
    if not known.all():
        raise CorruptRecord(f"{name}: window {int(np.argmin(known))} has nothing to predict.")
