"""Local training: batches in, better weights out, resumable at any instant.

``train`` is what a contribution does; ``python -m moshi_fl.train config.yaml`` trains a model by
itself, on token shards, on one device or several. Both use one engine.
"""

from moshi_fl.train.checkpoint import checkpoint_state, identity
from moshi_fl.train.clock import Progress, TrainResult
from moshi_fl.train.recipe import Recipe
from moshi_fl.train.run import calibrate, steps_for_epochs, train

__all__ = [
    "Progress",
    "Recipe",
    "TrainResult",
    "calibrate",
    "checkpoint_state",
    "identity",
    "steps_for_epochs",
    "train",
]
