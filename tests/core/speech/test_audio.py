"""Sound files: read piece by piece as they are, and refused with one clear error as they may be."""

from __future__ import annotations

import os
import signal
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moshi_fl.errors import DataError
from moshi_fl.models.speech import audio
from moshi_fl.models.speech.audio import (
    SoundError,
    audio_blocks,
    audio_info,
    measure_levels,
    read_audio,
    write_audio,
)


def noise(channels: int, samples: int) -> np.ndarray:
    made = 0.1 * np.random.default_rng(0).standard_normal((channels, samples))
    return made.astype(np.float32)


def wav_header(*, channels: int, rate: int, data: int, claimed: int | None = None) -> bytes:
    """Of a file of 16 bits a sample."""
    claimed = data if claimed is None else claimed
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    return (
        b"RIFF" + struct.pack("<I", len(chunks) + 4 + claimed) + chunks + struct.pack("<I", claimed)
    )


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "X.WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_written_is_read_to_16_bits(tmp_path: Path, name: str, channels: int) -> None:
    sound = noise(channels, 5000)
    write_audio(tmp_path / name, sound if channels == 2 else sound[0])
    np.testing.assert_allclose(read_audio(tmp_path / name), sound, atol=1.1 / 32768)
    info = audio_info(tmp_path / name)
    assert (info.sample_rate, info.channels, info.samples) == (24000, channels, 5000)
    assert info.duration == 5000 / 24000


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_blocks_are_the_whole_cut_into_pieces(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "x.wav"
    write_audio(path, noise(2, 3 * rate + 17), rate)
    whole = read_audio(path)
    assert whole.shape == (2, -(-(3 * rate + 17) * 24000 // rate))
    for block in (1000, 24000, 10**6):
        blocks = list(audio_blocks(path, block=block))
        assert {piece.shape[1] for piece in blocks[:-1]} <= {block}
        assert np.array_equal(np.concatenate(blocks, axis=1), whole)
    assert read_audio(path, sample_rate=None).shape == (2, 3 * rate + 17)


def test_ten_hours_take_the_memory_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    hours, rate = 10, 24000
    size = hours * 3600 * rate * 4
    with path.open("wb") as file:  # silence as a hole in the file
        file.write(wav_header(channels=2, rate=rate, data=size))
        file.truncate(file.tell() + size)
    assert audio_info(path).duration == 36_000
    tracemalloc.start()
    blocks = audio_blocks(path, sample_rate=16000, channels=2, block=16000)
    for _, block in zip(range(20), blocks, strict=False):
        assert block.shape == (2, 16000)
    blocks.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_levels_tell_silence_and_clipping(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    sound = np.zeros((2, 10_000), np.float32)
    sound[1, :2500] = 1
    sound[1, 2500:5000] = -1
    write_audio(path, sound)
    levels = measure_levels(path)
    assert levels.samples == 10_000
    assert levels.peak[0] == 0
    assert levels.peak[1] > 0.9999
    assert levels.clipped == (0.0, 0.5)


def test_beyond_full_scale_sound_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, np.array([[0.5, -3.0], [7.0, 0.25]]), 24000, subtype="FLOAT")
    assert read_audio(path).tolist() == [[0.5, 1.0], [-1.0, 0.25]]


def refusal(path: Path, **wanted: object) -> SoundError:
    with pytest.raises(SoundError) as caught:
        read_audio(path, **wanted)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not sound that can be read"),
        (b"# notes\nnot sound\n" * 50, "not sound that can be read"),
        (b"RIFF\0\0\0\0WAVE", "not sound that can be read"),
        (wav_header(channels=0, rate=24000, data=0) + bytes(100), "not sound that can be read"),
    ],
    ids=["an empty file", "a text", "a header and no more", "no channels"],
)
def test_what_is_not_sound_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    error = refusal(path)
    assert said in str(error)
    assert error.reason == audio.UNREADABLE


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in str(refusal(tmp_path / "none.wav"))
    os.mkfifo(tmp_path / "pipe.wav")  # from which nobody ever writes
    for path in (tmp_path, tmp_path / "pipe.wav"):
        assert "is not a file of sound" in str(refusal(path))


def test_other_kinds_of_sound_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"  # the content counts, not the name
    with path.open("wb") as file:
        soundfile.write(file, noise(2, 5000).T, 24000, format="OGG")
    assert "OGG" in str(refusal(path))
    assert refusal(path).hint == "convert it first"


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(channels=2, rate=24000, data=0))
    assert refusal(path).reason == audio.EMPTY
    with pytest.raises(SoundError, match="has no samples"):
        measure_levels(path)


def test_channels_must_be_those_that_are_needed(tmp_path: Path) -> None:
    for channels in (1, 2, 3):
        with (tmp_path / f"{channels}.wav").open("wb") as file:
            soundfile.write(file, noise(channels, 5000).T, 24000, format="WAV")
    mono = refusal(tmp_path / "1.wav", channels=2)
    assert (mono.reason, "Moshi left" in str(mono)) == (audio.MONO, True)
    assert refusal(tmp_path / "2.wav", channels=1).reason == audio.STEREO
    three = refusal(tmp_path / "3.wav")
    assert (three.reason, "has 3 channels" in str(three)) == (audio.MORE_CHANNELS, True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused_with_their_place(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "x.wav"
    sound = noise(2, 100_000)
    sound[1, 60_000] = value
    soundfile.write(path, sound.T, 24000, subtype="FLOAT")
    error = refusal(path)
    assert (error.reason, "the first at 2.50 s" in str(error)) == (audio.NOT_FINITE, True)
    with pytest.raises(SoundError, match="not finite"):
        measure_levels(path)


def test_another_rate_is_refused_where_one_is_demanded(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    write_audio(path, noise(1, 5000), 16000)
    error = refusal(path, resampled=False)
    assert "16000 samples a second; 24000 are needed" in str(error)
    assert read_audio(path, sample_rate=16000, resampled=False).shape == (1, 5000)


@pytest.mark.parametrize("rate", [1, 1_000_000])
def test_a_rate_that_no_recording_has_is_refused(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(channels=1, rate=rate, data=100) + bytes(100))
    with pytest.raises(DataError, match=f"a sample rate of {rate} Hz"):
        read_audio(path)


def test_a_flac_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    write_audio(path, noise(2, 100_000))
    path.write_bytes(path.read_bytes()[:100_000])
    assert refusal(path).reason == audio.UNREADABLE


def test_a_wav_file_that_ends_early_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    header = wav_header(channels=1, rate=24000, data=2000, claimed=90_000)
    path.write_bytes(header + bytes(2000))
    assert read_audio(path).shape == (1, 1000)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers_are_sound_or_an_error(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(wav_header(channels=2, rate=24000, data=4000) + bytes(4000))
    for place, value in changes:
        data[place] = value
    path = tmp_path / "x.wav"
    path.write_bytes(data)
    try:
        info, sound = audio_info(path), read_audio(path)
    except DataError:
        return
    assert len(sound) == info.channels <= 2
    assert np.isfinite(sound).all()


@pytest.mark.parametrize(
    ("name", "sound", "said"),
    [
        ("x.mp3", noise(1, 10), "end in .wav or .flac"),
        ("x.wav", noise(3, 10), r"samples \[3, 10\]"),
        ("x.wav", noise(1, 0), r"samples \[1, 0\]"),
        ("x.wav", np.array([0, np.nan], np.float32), "not finite"),
    ],
)
def test_what_is_no_sound_is_not_written(
    tmp_path: Path, name: str, sound: np.ndarray, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        write_audio(tmp_path / name, sound)
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timer here")
def test_an_interrupt_while_sound_is_read_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 60 * 24_000)).astype(np.float32)
    write_audio(path, noise)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for moment in (1e-3, 2e-3, 5e-3, 8e-3, 12e-3, 16e-3):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the timer may fire at any time
                signal.setitimer(signal.ITIMER_REAL, moment)
                read_audio(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
