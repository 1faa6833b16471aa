"""How fast a run goes, how long it will take, and what it has done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from moshi_fl.train.engine import Report


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int  # done so far
    steps: int
    loss: float  # nats per token on this step's batch
    tokens_per_second: float
    seconds_left: float
    learning_rate: float
    gradient_norm: float  # before clipping


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    resumed_from: int  # the step it continued at; 0 for a fresh run
    tokens: int  # seen by this call
    loss: float  # mean over the last tenth of the steps of this call, nats per token
    seconds: float


class Clock:
    """Speed, time left and the final figures."""

    def __init__(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._start = time.monotonic()
        self._tokens = 0
        self._losses: list[float] = []

    def tick(self, report: Report) -> Progress:
        """Take note of a step."""
        self._tokens += report.tokens
        self._losses.append(report.loss)
        elapsed = max(time.monotonic() - self._start, 1e-9)
        done = report.step + 1
        return Progress(
            step=done,
            steps=self._steps,
            loss=report.loss,
            tokens_per_second=self._tokens / elapsed,
            seconds_left=elapsed / (done - self._first) * (self._steps - done),
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm,
        )

    def result(self) -> TrainResult:
        """The figures of all steps so far."""
        recent = self._losses[-max(1, len(self._losses) // 10) :]
        loss = sum(recent) / len(recent) if recent else math.nan
        seconds = time.monotonic() - self._start
        return TrainResult(self._steps, self._first, self._tokens, loss, seconds)
