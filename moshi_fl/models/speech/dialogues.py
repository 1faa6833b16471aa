"""A user's recorded dialogues: which files, how long, which words, and what cannot be used and why.

A dialogue is a stereo file, Moshi left and the user right, and beside ``x.wav`` the words of the
left channel in ``x.json``. Files are found under folders, in lists like moshi-finetune's
``data.jsonl``, or named one by one. No symbolic link is followed, and equal files give an equal
result in an equal order.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from moshi_fl import screening
from moshi_fl.data import (
    DUPLICATE,
    LINK,
    OVER_BUDGET,
    UNREADABLE,
    LeftOut,
    told_left_out,
    within,
)
from moshi_fl.errors import DataError
from moshi_fl.models.speech.alignments import Word, read_alignments
from moshi_fl.models.speech.audio import (
    SUFFIXES,
    SoundError,
    audio_info,
    check_channels,
    measure_levels,
)
from moshi_fl.weights import sha256_file

SILENT_PEAK = 1e-3  # -60 dB; a channel that is never louder is silent
MOST_CLIPPED = 0.01  # share of a channel's samples at full scale
LIST_TOLERANCE = 0.1  # s, between the length in a list and that of the file
MAX_LIST_BYTES = 64 << 20

OTHER_SUFFIXES = (".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma", ".aif", ".aiff")

OTHER_FORMAT = "sound that is neither WAV nor FLAC"
SILENT = "silence"
SILENT_MOSHI = "words, and a silent left channel"
CLIPPED = "clipped sound"
NO_WORDS = "no alignments beside them"
BAD_WORDS = "alignments that cannot be used"
OTHER_LENGTH = "another length than their list says"


@dataclass(frozen=True)
class Dialogue:
    """One recording.

    Attributes:
        path: Of the stereo file.
        duration: In seconds.
        words: Of Moshi, the left channel, in order of their start.
        weight: How often pieces of it are drawn, relative to those of weight 1.
    """

    path: Path
    duration: float
    words: tuple[Word, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Found:
    """What was taken, and how many files were left, by reason.

    Attributes:
        dialogues: In order.
        bytes: Size of their sound files together.
        skipped: Reason to number of files.
        left_out: Reason to the first few of them.
        fingerprint: SHA-256 over sound, words and weights in order, in hex.
    """

    dialogues: tuple[Dialogue, ...]
    bytes: int
    skipped: Mapping[str, int]
    left_out: Mapping[str, tuple[str, ...]]
    fingerprint: str


@dataclass(frozen=True)
class _Candidate:
    """A file that may be a dialogue; ``name`` is its path within what was named."""

    path: Path
    name: str
    weight: float
    named: bool = False  # by the user, who then wants to know what is wrong with it
    stated: float | None = None  # length in a list, in seconds


class _Line(msgspec.Struct):
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    duration: Annotated[float, Meta(gt=0)] | None = None


@dataclass
class _Search:
    left: LeftOut = field(default_factory=LeftOut)

    def under(self, path: Path, weight: float) -> Iterator[_Candidate]:
        if path.is_dir():
            yield from self._folder(path, "", weight)
        elif path.suffix.lower() == ".jsonl":
            yield from _listed(path, weight)
        elif path.exists():
            yield _Candidate(path, path.name, weight, named=True)
        else:
            raise DataError(
                f"{path} does not exist.",
                hint="--data takes folders, .wav and .flac files, and .jsonl lists of them",
            )

    def _folder(self, folder: Path, prefix: str, weight: float) -> Iterator[_Candidate]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self.left.add(UNREADABLE, prefix.rstrip("/") or folder.name)
            return
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink():
                self.left.add(LINK, name)
            elif entry.is_dir():
                reason = screening.folder_reason(entry.name)
                if reason in {None, screening.VENDORED}:  # names of code; sound may lie there
                    yield from self._folder(Path(entry.path), name + "/", weight)
                elif reason:
                    self.left.add(reason, name)
            elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
                yield _Candidate(Path(entry.path), name, weight)
            elif entry.name.lower().endswith(OTHER_SUFFIXES):
                self.left.add(OTHER_FORMAT, name)


def find_dialogues(paths: Sequence[Path], *, seed: int, max_bytes: int | None = None) -> Found:
    """Find dialogues, and read each one through to see whether it can be used.

    A file that the user named is an error where it cannot be used; in folders and lists such
    files are passed over and counted.

    Args:
        paths: Folders, .wav and .flac files, .jsonl lists, or several of them with weights, as in
            ``calls.jsonl:2,studio:0.5``.
        seed: Decides which files are kept when they exceed ``max_bytes``.
        max_bytes: Limit for all sound files together, in bytes.

    Raises:
        DataError: A path does not exist, a list cannot be read, a named file cannot be used, or
            nothing usable is left.
    """
    search = _Search()
    candidates: dict[Path, _Candidate] = {}
    for path, weight in _weighted(paths):
        for candidate in search.under(path, weight):
            candidates.setdefault(candidate.path.resolve(), candidate)
    kept = set(_within(list(candidates.values()), max_bytes, seed))
    state = hashlib.sha256()
    dialogues: dict[str, Dialogue] = {}
    for candidate in candidates.values():
        if candidate not in kept:
            search.left.add(OVER_BUDGET, candidate.name)
            continue
        dialogue = _used(candidate, search.left)
        digest = sha256_file(candidate.path) if dialogue else ""
        if digest in dialogues:
            search.left.add(DUPLICATE, candidate.name)
        elif dialogue:
            dialogues[digest] = dialogue
            state.update(_identity(digest, dialogue))
    left = search.left
    if not dialogues:
        raise DataError(f"No usable dialogue under {_told(paths)}.", hint=_why_nothing(left))
    size = sum(dialogue.path.stat().st_size for dialogue in dialogues.values())
    return Found(tuple(dialogues.values()), size, left.counts, left.names, state.hexdigest())


def open_dialogue(path: Path, *, weight: float = 1.0) -> Dialogue:
    """A dialogue from its stereo file, read through and checked.

    Silence on one channel is somebody who listens; it is an error on both, and on the left one if
    there are words.

    Raises:
        SoundError: The sound cannot be used: mono, silent, clipped, damaged or empty.
        DataError: The words cannot be used, or there are none.
    """
    info = audio_info(path)
    check_channels(path, info.channels, 2)
    levels = measure_levels(path)
    duration = levels.samples / info.sample_rate
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise SoundError(
            f"{path} has no words: {beside.name} is missing beside it.",
            reason=NO_WORDS,
            hint="align it first; moshi-finetune's annotate.py makes such files",
        )
    words = read_alignments(beside, duration)
    if max(levels.peak) < SILENT_PEAK:
        raise SoundError(f"{path} is silent.", reason=SILENT, hint="leave it out")
    if words and levels.peak[0] < SILENT_PEAK:
        raise SoundError(
            f"{path} has words of Moshi, and its left channel is silent.",
            reason=SILENT_MOSHI,
            hint="Moshi is left and the user right; swap the channels",
        )
    worst = max(levels.clipped)
    if worst > MOST_CLIPPED:
        raise SoundError(
            f"{path} is clipped: {worst:.0%} of a channel is at full scale.",
            reason=CLIPPED,
            hint="record it again at a lower level; turning it down now does not mend it",
        )
    return Dialogue(path, duration, words, weight)


def _used(candidate: _Candidate, left: LeftOut) -> Dialogue | None:
    try:
        dialogue = open_dialogue(candidate.path, weight=candidate.weight)
    except DataError as error:
        if candidate.named:
            raise
        reason = error.reason if isinstance(error, SoundError) else BAD_WORDS
        left.add(reason, candidate.name)
        return None
    stated = candidate.stated
    if stated is not None and abs(stated - dialogue.duration) > LIST_TOLERANCE:
        left.add(OTHER_LENGTH, candidate.name)
        return None
    return dialogue


def _weighted(paths: Sequence[Path]) -> Iterator[tuple[Path, float]]:
    """Paths with their weights; one that exists as it is written has no weight in it."""
    for path in paths:
        if path.expanduser().exists():
            yield path.expanduser(), 1.0
            continue
        for part in str(path).split(","):
            name, colon, weight = part.strip().rpartition(":")
            if not colon or Path(part.strip()).expanduser().exists():
                yield Path(part.strip()).expanduser(), 1.0
            else:
                yield Path(name).expanduser(), _weight(weight, part)


def _weight(text: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(
            f"{part} does not exist, and {text!r} is no weight.",
            hint="weights are numbers above 0, as in calls.jsonl:2,studio:0.5",
        )
    return weight


def _listed(path: Path, weight: float) -> Iterator[_Candidate]:
    """The files of a ``data.jsonl``; paths in it start from its folder."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_LIST_BYTES:
        raise DataError(f"{path} is larger than {MAX_LIST_BYTES >> 20} MiB.", hint="split it")
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} names no sound: {error}",
                hint='each line is {"path": "x.wav", "duration": 12.3}',
            ) from error
        found = path.parent / entry.path
        if not found.is_file():
            raise DataError(f"line {number} of {path}: {found} does not exist.")
        yield _Candidate(found, entry.path, weight, stated=entry.duration)


def _within(found: list[_Candidate], limit: int | None, seed: int) -> list[_Candidate]:
    """As many files as fit, drawn by a hash of their names, in the order in which they came."""
    if limit is None:
        return found
    sizes = [(candidate.name, candidate.path.stat().st_size) for candidate in found]
    return [found[place] for place in within(sizes, limit, seed)]


def _identity(digest: str, dialogue: Dialogue) -> bytes:
    words = [(word.text, word.start, word.end) for word in dialogue.words]
    return hashlib.sha256(msgspec.json.encode((digest, words, dialogue.weight))).digest()


def _told(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths)) or "(no path given)"


def _why_nothing(left: LeftOut) -> str:
    reasons = told_left_out(left.counts, left.names)
    wanted = "Give stereo .wav or .flac files with their words in .json files beside them."
    return f"Left out: {reasons}. {wanted}" if reasons else wanted
