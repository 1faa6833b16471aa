"""Sound files: WAV and FLAC in, at the rate and with the channels that are asked for, and WAV out.

A file is read piece by piece, so ten hours of it take the memory of a second. What is beyond full
scale, as files of floating-point samples may have it, is limited to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.resample import Resampler, Sound
from moshi_fl.weights import atomic_file

if TYPE_CHECKING:
    from soundfile import SoundFile

SAMPLE_RATE = 24_000  # Hz, of Mimi
SUFFIXES = (".wav", ".flac")
FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC"}  # as libsndfile names them
READ = 1 << 15  # samples of a channel that are read at once
FULL_SCALE = 0.999  # from here on a sample counts as clipped

UNREADABLE = "not sound that can be read"
EMPTY = "no samples"
MONO = "mono, where stereo is needed"
STEREO = "stereo, where mono is needed"
MORE_CHANNELS = "more than two channels"
NOT_FINITE = "samples that are not finite"
OTHER_RATE = "another sample rate"


class SoundError(DataError):
    """A file whose sound cannot be used; ``reason`` is what such files have in common."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself."""

    sample_rate: int  # Hz
    channels: int
    samples: int  # of a channel

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.sample_rate


@dataclass(frozen=True)
class Levels:
    """How loud the channels of a file are, each."""

    samples: int  # of a channel, as counted
    peak: tuple[float, ...]  # largest magnitude; full scale is 1
    clipped: tuple[float, ...]  # share of the samples at full scale


def audio_info(path: Path) -> AudioInfo:
    """Rate, channels and length.

    Raises:
        SoundError: No sound that can be read, none in it, or more than two channels.
    """
    with _opened(path) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames)


def audio_blocks(
    path: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channels: int | None = None,
    block: int = SAMPLE_RATE,
    resampled: bool = True,
) -> Iterator[Sound]:
    """The sound of a file in pieces (channels, block), the last one shorter.

    Equal files give equal pieces on one machine; joined, they do not depend on ``block``.

    Args:
        path: A WAV or FLAC file.
        sample_rate: In Hz; None for the file's own.
        channels: How many the file must have; None for one or two.
        block: Samples of a piece.
        resampled: Whether a file at another rate is resampled; else it is an error.

    Raises:
        SoundError: See ``reason``; damage deep in a file shows when it is reached.
    """
    pieces = _at_rate(path, sample_rate, channels, resampled=resampled)
    held: list[Sound] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece.shape[1]
        if size >= block:
            joined = np.concatenate(held, axis=1)
            whole = size - size % block
            yield from np.split(joined[:, :whole], range(block, whole, block), axis=1)
            held, size = [joined[:, whole:]], size - whole
    if size:
        yield np.concatenate(held, axis=1)


def read_audio(
    path: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channels: int | None = None,
    resampled: bool = True,
) -> Sound:
    """All of a file, (channels, T); like ``audio_blocks``, and for short files only."""
    blocks = audio_blocks(path, sample_rate=sample_rate, channels=channels, resampled=resampled)
    return np.concatenate(list(blocks), axis=1)


def measure_levels(path: Path) -> Levels:
    """Read a file through and tell how loud it is.

    Raises:
        SoundError: Something in it cannot be used.
    """
    samples = 0
    with _opened(path) as file:
        peak = np.zeros(file.channels)
        clipped = np.zeros(file.channels)
        for piece in _pieces(file, path):
            loud = np.abs(piece)
            samples += loud.shape[1]
            peak = np.maximum(peak, loud.max(axis=1))
            clipped += np.count_nonzero(loud >= FULL_SCALE, axis=1)
    return Levels(samples, tuple(peak.tolist()), tuple((clipped / samples).tolist()))


def write_audio(path: Path, samples: Sound, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a WAV or FLAC file of 16 bits a sample, whole or not at all.

    Args:
        path: Its name ends in .wav or .flac.
        samples: (T,) or (channels, T); beyond full scale they are limited to it.
        sample_rate: In Hz.

    Raises:
        DataError: Another ending, no samples, samples that are not finite, or more than two
            channels.
    """
    rows = np.atleast_2d(samples)
    if rows.ndim != 2 or not rows.size or len(rows) > 2:
        raise DataError(f"{path}: samples {list(rows.shape)} must be [1 or 2 channels, T].")
    with audio_writer(path, len(rows), sample_rate) as write:
        write(rows)


@contextmanager
def audio_writer(
    path: Path, channels: int, sample_rate: int = SAMPLE_RATE
) -> Iterator[Callable[[Sound], None]]:
    """What takes pieces (channels, T) of a file of 16 bits a sample, one after the other.

    The file is there when the block ends without an exception; memory does not grow with it.

    Raises:
        DataError: As ``write_audio``, or the file cannot be written.
    """
    require_writable(path)
    import soundfile

    kind = path.suffix[1:].upper()
    try:
        with (
            atomic_file(path, shared=True) as file,
            soundfile.SoundFile(
                file.fileno(), "w", sample_rate, channels, "PCM_16", format=kind, closefd=False
            ) as sound,
        ):

            def write(piece: Sound) -> None:
                if not np.isfinite(piece).all():
                    raise DataError(
                        f"{path} would get samples that are not finite; it was not written."
                    )
                sound.write(np.clip(piece.T, -1, 1))

            yield write
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{path} cannot be written: {error.error_string.strip()}",
            hint="make room there, or give another place",
        ) from error
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"{path} cannot be made: {error.strerror}: {error.filename}.", hint="give another place"
        ) from error


def require_writable(path: Path) -> None:
    """Fail early where ``path`` cannot be a file of sound.

    Raises:
        ConfigError: The library soundfile is not installed.
        DataError: Its name ends in something else than .wav or .flac.
    """
    require_soundfile()
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: sound is written to files that end in .wav or .flac.")


def require_soundfile() -> None:
    """Fail early where the extra is not installed.

    Raises:
        ConfigError: The library soundfile is not installed.
    """
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: it is there and libsndfile is not
        raise ConfigError(
            "reading and writing sound needs the library soundfile, which is not installed.",
            hint="pip install 'moshi-fl[speech]'",
        ) from error


def _at_rate(
    path: Path, sample_rate: int | None, channels: int | None, *, resampled: bool
) -> Iterator[Sound]:
    with _opened(path) as file:
        check_channels(path, file.channels, channels)
        target = sample_rate or file.samplerate
        if target != file.samplerate and not resampled:
            raise SoundError(
                f"{path} has {file.samplerate} samples a second; {target} are needed.",
                reason=OTHER_RATE,
                hint="resample it first",
            )
        stream = Resampler(file.samplerate, target, file.channels)
        for piece in _pieces(file, path):
            yield stream.push(piece)
        yield stream.finish()


@contextmanager
def _opened(path: Path) -> Iterator[SoundFile]:
    require_soundfile()
    import soundfile

    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise SoundError(f"{path} is not a file of sound.", reason=UNREADABLE)
    try:
        # By number: of a Python object libsndfile would call back, and swallow a Ctrl-C there.
        with (
            path.open("rb") as file,
            soundfile.SoundFile(file.fileno(), closefd=False) as sound,
        ):
            _check_header(path, sound)
            yield sound
    except OSError as error:
        raise SoundError(f"{path} cannot be read: {error.strerror}.", reason=UNREADABLE) from error
    except soundfile.LibsndfileError as error:
        raise SoundError(
            f"{path} is not sound that can be read: {error.error_string.strip()}",
            reason=UNREADABLE,
            hint="give WAV or FLAC files",
        ) from error


def _check_header(path: Path, sound: SoundFile) -> None:
    if sound.format not in FORMATS:
        raise SoundError(
            f"{path} is {sound.format_info}; WAV and FLAC are read.",
            reason=UNREADABLE,
            hint="convert it first",
        )
    if not sound.frames:
        raise SoundError(f"{path} has no samples.", reason=EMPTY, hint="leave it out")
    if sound.channels > 2:
        raise SoundError(
            f"{path} has {sound.channels} channels; one or two are read.", reason=MORE_CHANNELS
        )


def check_channels(path: Path, found: int, wanted: int | None) -> None:
    """Insist on mono (1) or stereo (2); None takes either.

    Raises:
        SoundError: It is the other.
    """
    if wanted == 2 and found == 1:
        raise SoundError(
            f"{path} is mono; a dialogue is stereo, Moshi left and the user right.",
            reason=MONO,
            hint="give stereo files with one speaker on each channel",
        )
    if wanted == 1 and found == 2:
        raise SoundError(
            f"{path} is stereo; one channel is needed.", reason=STEREO, hint="mix it down first"
        )


def _pieces(file: SoundFile, path: Path) -> Iterator[Sound]:
    """At the file's own rate, (channels, up to READ)."""
    done = 0
    while len(data := file.read(READ, dtype="float32", always_2d=True)):
        piece = np.ascontiguousarray(data.T)
        finite = np.isfinite(piece).all(axis=0)
        if not finite.all():
            first = (done + int(finite.argmin())) / file.samplerate
            raise SoundError(
                f"{path} has samples that are not finite, the first at {first:.2f} s.",
                reason=NOT_FINITE,
                hint="export it again, or leave it out",
            )
        done += piece.shape[1]
        yield np.clip(piece, -1, 1, out=piece)
    if not done:
        raise SoundError(f"{path} has no samples.", reason=EMPTY, hint="leave it out")
