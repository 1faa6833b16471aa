"""How long frames take: a summary of one size however many there were."""

from __future__ import annotations

import math

STEP = 0.01  # of a bin: what is read from the counts is within a hundredth
LEAST = 1e-5  # seconds; what is shorter counts as this
BINS = math.ceil(math.log(1e4 / LEAST) / math.log1p(STEP))  # up to some three hours


class Latency:
    """Times of frames.

    Attributes:
        frame: Seconds of sound in one.
        frames: How many there were.
        worst: The longest, in seconds; exact.
        total: Of all, in seconds.
    """

    def __init__(self, frame: float) -> None:
        self.frame, self._counts = frame, [0] * (BINS + 1)
        self.frames, self.worst, self.total = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """One more frame."""
        place = math.ceil(math.log(max(seconds, LEAST) / LEAST) / math.log1p(STEP))
        self._counts[min(place, BINS)] += 1
        self.frames += 1
        self.worst, self.total = max(self.worst, seconds), self.total + seconds

    def quantile(self, share: float) -> float:
        """Seconds that this share of the frames did not take longer than; 0 if there were none."""
        wanted, seen = share * self.frames, 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(LEAST * (1 + STEP) ** place, self.worst)
        return 0.0

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of sound; below 1 keeps up. 0 if there were no frames."""
        return self.total / (self.frames * self.frame) if self.frames else 0.0
