"""One model for many readers, while training goes on elsewhere and publishes new weights.

Two copies take turns. Readers enter the front one; ``publish`` fills the back one and then swaps
them, so nobody ever sees weights change, or half of an old and half of a new version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from moshi_fl.models.common import load_weights
from moshi_fl.weights import Weights


class ModelHolder:
    """Modules for inference behind a readers-writer lock per copy; for any number of threads.

    A reader waits for nobody. A writer waits for the readers that are still at the version before
    the newest, and since newcomers go to the newest, that ends when they end: neither side can
    starve the other. Memory is two copies of the model, whatever happens. A thread must not publish
    twice while it reads: the second time it would wait for itself.

    Args:
        build: Makes a module; called twice.
        weights: Of version 0.

    Raises:
        CorruptRecord: The weights do not fit.
    """

    def __init__(self, build: Callable[[], nn.Module], weights: Weights) -> None:
        self._modules = [build().eval().requires_grad_(requires_grad=False) for _ in range(2)]
        self._readers = [0, 0]
        self._front, self._version = 0, 0
        self._changed = threading.Condition()
        self._writer = threading.Lock()
        load_weights(self._modules[0], weights)

    @property
    def version(self) -> int:
        """How many times weights have been published."""
        return self._version

    @contextmanager
    def read(self) -> Iterator[nn.Module]:
        """The newest model, in evaluation mode; it stays as it is until the block is left."""
        with self._changed:
            side = self._front
            self._readers[side] += 1
        try:
            yield self._modules[side]
        finally:
            with self._changed:
                self._readers[side] -= 1
                self._changed.notify_all()

    def publish(self, weights: Weights) -> None:
        """Give later readers these weights; copies them.

        Raises:
            CorruptRecord: They do not fit; readers keep what they had.
        """
        with self._writer:
            back = 1 - self._front
            with self._changed:
                self._changed.wait_for(lambda: not self._readers[back])
            load_weights(self._modules[back], weights)  # nobody can enter before the swap
            with self._changed:
                self._front, self._version = back, self._version + 1
