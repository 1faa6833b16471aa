"""The verdict gate's decision on paired gains: REJECT when they are surely below zero."""

from __future__ import annotations

import numpy as np

from benchmarks.attacks.world import Losses

try:
    from moshi_fl.consensus import gain, quantise
except ImportError:  # a checkout without evaluation: the same rule in floating point

    def is_rejected(before: Losses, after: Losses) -> bool:
        """Whether ``mean + 1.645 SE`` of the gains is not above zero."""
        gains = before - after
        error = gains.std(ddof=1) / len(gains) ** 0.5
        return bool(gains.mean() + 1.645 * error <= 0)

else:

    def is_rejected(before: Losses, after: Losses) -> bool:
        """What ``moshi_fl.consensus`` decides from the losses of each sequence, in nats."""
        losses = (np.array(quantise(part)) for part in (before, after))
        return gain(*losses).outcome == "reject"
