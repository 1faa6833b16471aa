"""Resampling: what was there is there, what cannot be there is not, however the sound is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import DataError
from moshi_fl.models.speech.resample import Resampler, Sound, resample

RATES = [8000, 16000, 22050, 32000, 44100, 48000, 96000]
TARGET = 24000


def sweep(rate: int, samples: int, top: float) -> np.ndarray:
    """A sine that rises from 50 Hz to ``top`` in two seconds."""
    t = np.arange(samples) / rate
    return 0.5 * np.sin(2 * np.pi * (50 * t + (top - 50) * t**2 / 4))


def decibels(power: float) -> float:
    return 10 * math.log10(power)


@pytest.mark.parametrize("rate", RATES)
def test_a_sweep_up_to_nine_tenths_of_the_band_stays_itself(rate: int) -> None:
    top = 0.9 * min(rate, TARGET) / 2
    made = resample(sweep(rate, 2 * rate, top)[None].astype(np.float32), rate, TARGET)
    assert made.shape == (1, 2 * TARGET)
    wanted = sweep(TARGET, 2 * TARGET, top)
    inside = slice(TARGET // 10, -TARGET // 10)  # before and after, the sound was cut off
    noise = np.square(made[0] - wanted)[inside].mean()
    assert decibels(np.square(wanted[inside]).mean() / noise) > 95


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
def test_what_the_new_rate_cannot_hold_is_gone(rate: int) -> None:
    for tone in (12_200, 15_000, 20_000):
        t = np.arange(2 * rate) / rate
        made = resample(np.sin(2 * np.pi * tone * t)[None].astype(np.float32), rate, TARGET)
        assert np.abs(made[0, TARGET // 10 : -TARGET // 10]).max() < 10 ** (-85 / 20)


def test_a_click_stays_where_it_was() -> None:
    sound = np.zeros((2, 44100), np.float32)
    sound[0, 22050] = sound[1, 4410] = 1
    made = resample(sound, 44100, TARGET)
    assert made.argmax(axis=1).tolist() == [12000, 2400]


@given(
    st.sampled_from([*RATES, 24000]),
    st.lists(st.integers(0, 3000), min_size=1, max_size=6),
)
def test_pieces_give_what_the_whole_gives(rate: int, sizes: list[int]) -> None:
    sound = np.random.default_rng(0).standard_normal((2, sum(sizes))).astype(np.float32)
    stream = Resampler(rate, TARGET, 2)
    pieces: list[Sound] = [
        stream.push(piece) for piece in np.split(sound, np.cumsum(sizes)[:-1], axis=1)
    ]
    made = np.concatenate([*pieces, stream.finish()], axis=1)
    assert made.shape == (2, -(-sum(sizes) * TARGET // rate))
    # The size of a matrix product decides the order in which it adds.
    np.testing.assert_allclose(made, resample(sound, rate, TARGET), atol=1e-5)


def test_a_long_stream_is_given_out_as_it_comes() -> None:
    stream = Resampler(44100, TARGET, 1)
    given_out = 0
    for second in range(1, 6):
        given_out += stream.push(np.ones((1, 44100), np.float32)).shape[1]
        assert second * TARGET - given_out < TARGET / 50


@pytest.mark.parametrize("rate", [0, -1, 3999, 384_001])
def test_a_rate_that_no_recording_has(rate: int) -> None:
    with pytest.raises(DataError, match=f"a sample rate of {rate} Hz is not from 4000"):
        Resampler(rate, TARGET, 1)
