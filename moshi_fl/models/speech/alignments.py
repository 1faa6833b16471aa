"""Which word is said when: the ``x.json`` beside ``x.wav``, in the form of moshi-finetune.

``{"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}``, in seconds from the start of the
sound. What recognisers are known to do is repaired: words out of order are sorted by their start,
an end that lies beyond the next word's start or the end of the sound is moved there, and words
that last no time (moshi-finetune leaves them out, too) or have no visible character are left out.
Anything else that cannot be right is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from moshi_fl.errors import DataError

MAIN_SPEAKER = "SPEAKER_MAIN"  # Moshi, on the left channel
USER_SPEAKER = "SPEAKER_USER"
MAX_BYTES = 64 << 20
MAX_WORDS = 1_000_000
MAX_WORD_LENGTH = 200  # characters

_Entry = tuple[
    Annotated[str, Meta(max_length=MAX_WORD_LENGTH)],
    tuple[float, float],
    Annotated[str, Meta(max_length=MAX_WORD_LENGTH)],
]


class _File(msgspec.Struct):
    """Other keys, such as ``text_conditions``, are passed over."""

    alignments: Annotated[list[_Entry], Meta(max_length=MAX_WORDS)]


@dataclass(frozen=True)
class Word:
    """A word, and from when to when it is said, in seconds."""

    text: str
    start: float
    end: float
    speaker: str = MAIN_SPEAKER


def read_alignments(
    path: Path, duration: float, *, keep_main_only: bool = True
) -> tuple[Word, ...]:
    """The words of a file in order of their start.

    Args:
        path: The JSON file.
        duration: Of the sound, in seconds.
        keep_main_only: Leave out all speakers but ``SPEAKER_MAIN``.

    Raises:
        DataError: Not such a file, or too large a one; a time that is negative or not finite, an
            end before its start, a word that starts after the end of the sound, or speakers of
            other names, where only ``SPEAKER_MAIN`` is kept.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_alignments(data, duration, name=str(path), keep_main_only=keep_main_only)


def parse_alignments(
    data: bytes, duration: float, *, name: str, keep_main_only: bool = True
) -> tuple[Word, ...]:
    """Like ``read_alignments``, for the content of a file that is called ``name`` in errors."""
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} is larger than {MAX_BYTES >> 20} MiB, the most alignments have.")
    try:
        entries = msgspec.json.decode(data, type=_File).alignments
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{name} holds no alignments: {error}",
            hint='it should be {"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}',
        ) from error
    words = [Word(text.strip(), *span, speaker) for text, span, speaker in entries]
    for number, word in enumerate(words, 1):
        _check(word, number, duration, name)
    if keep_main_only:
        _check_speakers({word.speaker for word in words}, name)
        words = [word for word in words if word.speaker == MAIN_SPEAKER]
    said = [word for word in words if word.text and word.start < word.end]
    return tuple(_without_overlaps(sorted(said, key=lambda word: word.start), duration))


def _check(word: Word, number: int, duration: float, name: str) -> None:
    said = f"word {number} of {name}, {word.text[:40]!r},"
    if not 0 <= word.start <= word.end < float("inf"):
        raise DataError(
            f"{said} lasts from {word.start:g} to {word.end:g} s.",
            hint="times are seconds from the start of the sound, the end after the start",
        )
    if word.start >= duration:
        raise DataError(
            f"{said} starts at {word.start:g} s; the sound ends at {duration:g} s.",
            hint="check that the alignments belong to this sound and are in seconds",
        )


def _check_speakers(found: set[str], name: str) -> None:
    """Other labels would leave Moshi without a word, and a model would learn to say nothing."""
    others = sorted(found - {MAIN_SPEAKER, USER_SPEAKER})
    if others and MAIN_SPEAKER not in found:
        raise DataError(
            f"{name} has no word of {MAIN_SPEAKER}; its speakers are {', '.join(others[:5])}.",
            hint=f"call the one on the left channel {MAIN_SPEAKER}, the other {USER_SPEAKER}",
        )


def _without_overlaps(words: list[Word], duration: float) -> Iterable[Word]:
    """Words with ends that come before the same speaker's next start."""
    ends: dict[str, float] = {}
    repaired = []
    for word in reversed(words):
        end = min(word.end, ends.get(word.speaker, duration))
        ends[word.speaker] = word.start
        repaired.append(word if end == word.end else replace(word, end=end))
    return reversed(repaired)
