"""Who trains together: one process alone, or several that share each step's batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor


class World(Protocol):
    """All processes of a run; each calls each method equally often and in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0; process 0 writes and speaks."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A block that fails in all processes, with the same message, when it fails in one."""
        ...

    def total(self, number: int) -> int:
        """Sum over all processes of a number that the host knows; waits for no device."""
        ...

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their sums over all processes."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def together(self) -> AbstractContextManager[None]:
        """Nobody else to tell."""
        return nullcontext()

    def total(self, number: int) -> int:
        """The number."""
        return number

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors."""
