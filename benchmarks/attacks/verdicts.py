"""The verdict gate's decision on paired gains: REJECT when they are surely below zero."""

from __future__ import annotations

import numpy as np

from benchmarks.attacks.world import Losses
from moshi_fl.consensus import gain, quantise


def is_rejected(before: Losses, after: Losses) -> bool:
    """What ``moshi_fl.consensus`` decides from the losses of each sequence, in nats."""
    losses = (np.array(quantise(part)) for part in (before, after))
    return gain(*losses).outcome == "reject"
