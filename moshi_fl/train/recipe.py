"""How to train: the settings that decide the result, and the schedules behind them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from moshi_fl.errors import ConfigError
from moshi_fl.optimizer import BETA2, one_cycle, warmup_cosine
from moshi_fl.train.hardware import best_precision

PRECISIONS = ("fp32", "bf16", "auto")
SCHEDULES = ("one-cycle", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Raises:
        ConfigError: A value out of range; names the field.
    """

    steps: int
    batch_size: int = 8  # sequences that pass through the model at once
    accumulation: int = 1  # batches per step
    learning_rate: float = 1e-3  # peak of the schedule
    schedule: str = "one-cycle"  # or cosine
    warmup_fraction: float = 0.05  # share of the steps in which the rate rises
    warmup_steps: int = 0  # the same for the cosine schedule, as a number; 0 takes the share
    weight_decay: float = 0.01
    beta1: float = 0.9  # with the cosine schedule; one-cycle moves its own
    beta2: float = BETA2
    gradient_clip: float = 1.0  # joint norm of all gradients
    precision: str = "fp32"  # bf16: activations and gradients; weights and moments stay float32
    trains: str = "all"  # or the part of the model that learns, where its family has parts
    compile: bool = False
    seed: int = 0
    device: str = "cpu"
    private: bool = False  # DP-SGD; then the two below hold
    noise_multiplier: float = 1.0  # deviation of the noise, in clipping norms
    max_gradient_norm: float = 1.0  # what one window's gradient is clipped to

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation"):
            _require(self, key, getattr(self, key) >= 1, "must be at least 1")
        for key in ("learning_rate", "gradient_clip", "noise_multiplier", "max_gradient_norm"):
            _require(self, key, 0 < getattr(self, key) < math.inf, "must be above 0")
        for key in ("beta1", "beta2"):
            _require(self, key, 0 <= getattr(self, key) < 1, "must be from 0 to below 1")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "must be 0 or more")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "must be 0 or more")
        _require(self, "warmup_fraction", 0 <= self.warmup_fraction <= 1, "must be from 0 to 1")
        _require(self, "precision", self.precision in PRECISIONS, "must be fp32, bf16 or auto")
        _require(self, "schedule", self.schedule in SCHEDULES, "must be one-cycle or cosine")
        plain = self.precision == "fp32" and not self.compile
        _require(self, "private", plain or not self.private, "needs fp32, uncompiled")
        _require(self, "seed", 0 <= self.seed < 1 << 53, "must be from 0 to 2**53 - 1")

    def settled(self) -> Recipe:
        """The same with a precision instead of ``auto``: the one that is fast on its device."""
        if self.precision != "auto":
            return self
        return dataclasses.replace(self, precision=best_precision(self.device))

    def pace(self, step: int) -> tuple[float, float]:
        """Learning rate and beta1 of a step, counted from 0."""
        peak = self.learning_rate
        if self.schedule == "one-cycle":
            share = self.warmup_fraction
            return one_cycle(step, self.steps, peak=peak, warmup_fraction=share)
        warmup = self.warmup_steps or round(self.warmup_fraction * self.steps)
        return warmup_cosine(step, self.steps, peak=peak, warmup_steps=warmup), self.beta1


def _require(recipe: Recipe, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {getattr(recipe, key)!r} {rule}.")
