"""Dialogues as what the language model reads: a row of text over the codes of both speakers.

Long sound is encoded as a stream, so memory does not grow with it, and codes are kept on disk:
they depend on the sound and the codec alone, and making them takes far longer than reading them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moshi_fl.errors import CorruptRecord, DataError
from moshi_fl.models.common import device_of
from moshi_fl.models.speech.audio import audio_blocks
from moshi_fl.models.speech.dialogues import Dialogue, Found, find_dialogues
from moshi_fl.models.speech.mimi import PIECE, Mimi
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.weights import Weights, open_weights, save_weights, sha256_file, weights_digest

__all__ = ["CodeCache", "Codes", "Dialogue", "Found"]
__all__ += ["encode_dialogue", "find_dialogues", "segments"]

Codes = NDArray[np.int16]
"""Tokens (rows, T): text, then Moshi's codebooks, then the user's; -1 where there is nothing."""

ZERO_TOKEN = -1
MAX_CACHE_BYTES = 4 << 30  # 3,000 hours at 8 codebooks


class CodeCache:
    """Codes on disk, by a hash of the sound file, the codec's weights and the codebooks in use.

    Entries are written whole or not at all, and carry a hash: a damaged one counts as absent. The
    longest unused ones go when there is no room.

    Args:
        folder: Made when it is first written to.
        max_bytes: Limit for all entries together.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._codec: tuple[weakref.ref[Mimi], object, str] | None = None

    def key(self, dialogue: Dialogue, mimi: Mimi) -> str:
        """Name of the entry for a file as it is now, in hex."""
        parts = (sha256_file(dialogue.path), self._digest_of(mimi), str(mimi.num_codebooks))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def get(self, key: str, codebooks: int) -> Codes | None:
        """Codes (2 codebooks, T), Moshi's first; None where there are none, or damaged ones."""
        path = self._path(key)
        try:
            entry = open_weights(path)
            codes, digest = entry["codes"].copy(), entry["sha256"].tobytes()
            os.utime(path)  # used just now
        except (FileNotFoundError, CorruptRecord, KeyError):
            return None
        whole = codes.dtype == np.int16 and codes.ndim == 2 and len(codes) == 2 * codebooks
        if not whole or hashlib.sha256(codes.tobytes()).digest() != digest:
            return None
        return codes

    def put(self, key: str, codes: Codes) -> None:
        """Keep codes (2 codebooks, T)."""
        digest = hashlib.sha256(codes.tobytes()).digest()
        entry: Weights = {"codes": codes, "sha256": np.frombuffer(digest, np.uint8)}
        save_weights(self._path(key), entry)
        self._make_room()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        entries = []
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                entries.append((path.stat(), path))
        total = sum(status.st_size for status, _ in entries)
        for status, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size

    def _digest_of(self, mimi: Mimi) -> str:
        """Of the codec's weights and settings; computed when they change."""
        state = mimi.state_dict()
        if any(tensor.is_inference() for tensor in state.values()):  # such count no changes
            return _digest(mimi)
        version = [(tensor.data_ptr(), tensor._version) for tensor in state.values()]  # noqa: SLF001
        if self._codec is None or self._codec[0]() is not mimi or self._codec[1] != version:
            self._codec = (weakref.ref(mimi), version, _digest(mimi))
        return self._codec[2]


def _digest(mimi: Mimi) -> str:
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in mimi.state_dict().items()}
    return hashlib.sha256((weights_digest(arrays) + repr(mimi.config)).encode()).hexdigest()


def encode_dialogue(
    dialogue: Dialogue,
    mimi: Mimi,
    text: TextStream,
    cache: CodeCache | None = None,
    *,
    hear: Callable[[float], None] | None = None,
) -> Codes:
    """Tokens (1 + 2 q, T) of a dialogue, for the q codebooks of ``mimi`` that are in use.

    Row 0 is the text, rows 1 to q are Moshi, the left channel, and the others the user. A last
    frame that is not full is filled up with silence.

    ``hear`` is told how many seconds of it are encoded, unless the cache has it.

    Raises:
        SoundError: The file has changed, and its sound cannot be used.
    """
    if text.frame_rate != mimi.frame_rate:
        raise DataError(
            f"text at {text.frame_rate:g} frames a second, codes at {mimi.frame_rate:g}.",
            hint="give both the frame rate of Mimi",
        )
    codes = _codes_of(dialogue, mimi, cache, hear)
    row = text.row(dialogue.words, codes.shape[1] / mimi.frame_rate)
    return np.concatenate([row[None], codes])


def _codes_of(
    dialogue: Dialogue,
    mimi: Mimi,
    cache: CodeCache | None,
    hear: Callable[[float], None] | None,
) -> Codes:
    if cache is None:
        return encode_file(dialogue.path, mimi, hear)
    key = cache.key(dialogue, mimi)
    codes = cache.get(key, mimi.num_codebooks)
    if codes is None:
        codes = encode_file(dialogue.path, mimi, hear)
        cache.put(key, codes)
    return codes


def encode_file(path: Path, mimi: Mimi, hear: Callable[[float], None] | None = None) -> Codes:
    """Codes (2 q, T) of a stereo file, the left channel first.

    ``hear`` is told how many seconds are encoded, after each piece.

    Raises:
        SoundError: The sound cannot be used.
        RuntimeError: ``mimi`` is streaming something else.
    """
    device, pieces, frames = device_of(mimi), [], 0
    with mimi.streaming(2):
        for piece in _whole_frames(path, mimi):
            pieces.append(mimi.encode(torch.from_numpy(piece).to(device)[:, None]).cpu())
            frames += pieces[-1].shape[2]
            if hear:
                hear(frames / mimi.frame_rate)
    codes = torch.cat(pieces, dim=2)  # (2, q, T)
    return codes.flatten(0, 1).to(torch.int16).numpy()


def _whole_frames(path: Path, mimi: Mimi) -> Iterator[NDArray[np.float32]]:
    size = PIECE * mimi.frame_size
    for piece in audio_blocks(path, sample_rate=mimi.sample_rate, channels=2, block=size):
        missing = -piece.shape[1] % mimi.frame_size
        yield np.pad(piece, ((0, 0), (0, missing))) if missing else piece


def segments(codes: Codes, frames: int) -> list[Codes]:
    """Pieces (rows, frames) one after the other, the last one filled up with -1.

    What is -1 is neither read nor predicted, in text and audio alike.
    """
    rows, length = codes.shape
    if frames < 1 or not length:
        raise DataError(f"{length} frames cannot be cut into segments of {frames}.")
    padded = np.full((rows, -(-length // frames) * frames), ZERO_TOKEN, np.int16)
    padded[:, :length] = codes
    return list(np.ascontiguousarray(padded.reshape(rows, -1, frames).transpose(1, 0, 2)))
