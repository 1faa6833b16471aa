"""Sound at one rate into sound at another, piece by piece: a polyphase windowed sinc.

Output sample n lies at time n / target, exactly, and is a weighted sum of the inputs around it
(Smith, "Digital audio resampling"): a low-pass filter below the lower of both Nyquist frequencies,
sampled anew for each of the positions that an output can have between two inputs. These repeat, so
the filters are computed once, and a piece of sound is one matrix product per group of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moshi_fl.errors import DataError

Sound = NDArray[np.float32]
"""Samples (channels, T), full scale from -1 to 1."""

LOWEST, HIGHEST = 4000, 384_000  # Hz
LOBES = 64  # zero crossings of the sinc on either side
SUPPRESSED = 90.0  # dB, of what would alias
_GROUP = 64  # outputs of a matrix product


@dataclass(frozen=True)
class _Filters:
    """Weights (inputs, outputs) of neighbouring outputs, over inputs from ``first`` on."""

    first: int
    weights: NDArray[np.float32]


class Resampler:
    """A stream of sound: ``push`` pieces of any length, then ``finish``.

    N inputs give ceil(N target / source) outputs, however they are cut into pieces, and up to
    0.91 of the lower Nyquist frequency they are what was there, to -90 dB. What lies before the
    start and after the end counts as zero.

    Raises:
        DataError: A rate below 4 kHz or above 384 kHz.
    """

    def __init__(self, source: int, target: int, channels: int) -> None:
        for rate in (source, target):
            if not LOWEST <= rate <= HIGHEST:
                raise DataError(
                    f"a sample rate of {rate} Hz is not from {LOWEST} to {HIGHEST} Hz.",
                    hint="check that the file is what it says, and convert it",
                )
        common = math.gcd(source, target)
        up, down = target // common, source // common
        repeat = math.ceil(_GROUP / up)  # a period of few outputs makes a slim matrix
        self._up, self._down = up * repeat, down * repeat
        self._same = up == down
        self._reach = math.ceil(LOBES * max(1.0, down / up))
        self._filters = [] if self._same else _filters(self._up, self._down, self._reach)
        self._held = np.zeros((channels, self._reach), np.float32)
        self._taken = 0  # inputs
        self._given = 0  # outputs

    def push(self, sound: Sound) -> Sound:
        """What can be told by now, (channels, T)."""
        self._taken += sound.shape[1]
        if self._same:
            self._given += sound.shape[1]
            return sound
        self._held = np.concatenate([self._held, sound], axis=1)
        beyond = self._held.shape[1] - (2 * self._reach + 1)
        made = self._periods(max(0, beyond // self._down))
        self._given += made.shape[1]
        return made

    def finish(self) -> Sound:
        """The rest, once nothing more comes."""
        left = -(-self._taken * self._up // self._down) - self._given
        periods = -(-left // self._up)
        needed = periods * self._down + 2 * self._reach + 1
        missing = max(0, needed - self._held.shape[1])
        self._held = np.pad(self._held, ((0, 0), (0, missing)))
        return self._periods(periods)[:, :left]

    def _periods(self, count: int) -> Sound:
        """Outputs of so many periods, whose inputs are then forgotten."""
        channels = len(self._held)
        made = np.empty((channels, count, self._up), np.float32)
        start = 0
        for part in self._filters if count else ():
            width, outputs = part.weights.shape
            windows = sliding_window_view(self._held, width, axis=1)
            windows = windows[:, part.first :: self._down][:, :count]  # (channels, periods, width)
            # Windows overlap; BLAS wants them side by side.
            made[:, :, start : start + outputs] = np.ascontiguousarray(windows) @ part.weights
            start += outputs
        self._held = self._held[:, count * self._down :].copy()
        return made.reshape(channels, -1)


def resample(sound: Sound, source: int, target: int) -> Sound:
    """All of some sound (channels, T) at another rate."""
    stream = Resampler(source, target, len(sound))
    return np.concatenate([stream.push(sound), stream.finish()], axis=1)


def _filters(up: int, down: int, reach: int) -> list[_Filters]:
    """Of all outputs of a period; input ``reach`` is the one at the period's start."""
    found = []
    for start in range(0, up, _GROUP):
        outputs = np.arange(start, min(start + _GROUP, up), dtype=np.int64)
        first = start * down // up
        last = int(outputs[-1]) * down // up + 2 * reach + 1
        inputs = np.arange(first, last + 1, dtype=np.int64)
        # Distances in inputs, as whole numbers over ``up``: exact.
        away = ((inputs - reach)[:, None] * up - outputs * down) / up
        found.append(_Filters(first, _windowed_sinc(away, up, down).astype(np.float32)))
    return found


def _windowed_sinc(away: NDArray[np.float64], up: int, down: int) -> NDArray[np.float64]:
    """Weight of an input that far from an output; Kaiser's window and his rules for it (1974)."""
    scale = min(1.0, up / down)  # the lower Nyquist frequency over the source's
    transition = (SUPPRESSED - 7.95) / (2.285 * 2 * LOBES * math.pi)
    cutoff = scale * (1 - transition / 2)
    inside = np.clip(1 - (away * scale / LOBES) ** 2, 0, None)
    beta = 0.1102 * (SUPPRESSED - 8.7)
    window = np.where(inside > 0, np.i0(beta * np.sqrt(inside)) / np.i0(beta), 0)
    weights: NDArray[np.float64] = cutoff * np.sinc(cutoff * away) * window
    return weights
