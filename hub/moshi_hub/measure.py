"""Losses that machines can agree on: per sequence, in float64, rounded to micro-nats.

Measured on one CPU model, other threads, libraries and instruction sets move a float64 loss by
about 1e-15 nats, nine orders of magnitude below what is compared. bfloat16 never comes near this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moshi_fl.aggregate import apply_step
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta
from moshi_fl.consensus import Referee, quantise
from moshi_fl.errors import CorruptRecord, DataError, MoshiError
from moshi_fl.evidence import LARGEST_LOSS, BaseLosses, Losses, Precision, Ruling, pack
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import task_of
from moshi_fl.records import Contribution
from moshi_fl.rules import shapes_of
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import Weights, open_weights, sha256_bytes

SMALL_MODEL = 4_000_000  # weights

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Task


@dataclass(frozen=True)
class BaseModel:
    """A round that contributions build on: its weights' file, and the tokenizer it had."""

    path: Path
    tokenizer: bytes


@dataclass(frozen=True)
class Desk:
    """All that an evaluator needs to measure contributions; may be sent to another process."""

    config: HubConfig
    pool: Path
    bases: Mapping[int, BaseModel]
    contributions: Mapping[str, Contribution]
    deltas: Path
    """Folder with each contribution's verified delta, named by id."""

    @cached_property
    def pool_bytes(self) -> bytes:
        """The held-out pool.

        Raises:
            DataError: It is not on this machine.
        """
        if not self.pool.exists():
            raise DataError(
                "the held-out pool is not on this machine.",
                hint="moshi-hub pool import FILE   (the hub's maintainer exports it)",
            )
        return self.pool.read_bytes()

    @property
    def pool_digest(self) -> str:
        """SHA-256 of the pool."""
        return sha256_bytes(self.pool_bytes)

    def base(self, number: int) -> Weights:
        """Weights of a round that contributions build on."""
        return open_weights(self.bases[number].path)

    def after(self, contribution: Contribution, share: float) -> Weights:
        """The base plus this share of the contribution's own delta.

        Raises:
            MoshiError: A weight would not be finite.
        """
        base, rules = self.base(contribution.round), self.config.delta
        codec = get_codec(rules.codec, rules.options)
        path = self.deltas / f"{contribution.id}.safetensors"
        delta = Delta.open(path, shapes_of(base), codec)
        step = ((name, delta.decode(name).astype(np.float64)) for name in delta.names)
        return apply_step(base, step, share)


class Meter:
    """Measures models of one hub.

    Args:
        desk: What to measure, and on what.
        precision: Of all arithmetic.
        share: Of a delta that is measured. In a round it is one of several that are averaged, and
            late in training a whole delta often does harm where a part of it helps.
    """

    def __init__(self, desk: Desk, precision: Precision, share: float = 1.0) -> None:
        self.desk, self.precision, self.share = desk, precision, share
        self._tasks: dict[int, Task] = {}
        self._bases: dict[int, nn.Module] = {}
        self._last: tuple[str, nn.Module | None] | None = None

    def size(self) -> int:
        """How many sequences the pool has."""
        from moshi_fl.models.family import CutsPools

        number = max(self.desk.bases)
        task = self._task(number)
        if isinstance(task, CutsPools):
            return task.pool_size(self.desk.pool_bytes)
        return len(self.base_losses(number, None))

    def base_losses(self, number: int, sequences: Sequence[int] | None) -> list[int]:
        """Losses of a round in micro-nats on these sequences of the pool; None means all."""
        if number not in self._bases:
            self._bases[number] = self._module(number, self.desk.base(number))
        return self._evaluate(number, self._bases[number], sequences)

    def after_losses(self, entry: Contribution, sequences: Sequence[int]) -> list[int]:
        """Losses of a base plus a share of the delta; the largest where that is not finite."""
        if self._last is None or self._last[0] != entry.id:
            self._last = entry.id, self._module_after(entry)
        module = self._last[1]
        if module is None:
            return [LARGEST_LOSS] * len(sequences)
        return self._evaluate(entry.round, module, sequences)

    def _module_after(self, entry: Contribution) -> nn.Module | None:
        try:
            weights = self.desk.after(entry, self.share)
        except CorruptRecord:
            raise
        except MoshiError:  # a weight would be infinite
            return None
        return self._module(entry.round, weights)

    def _task(self, number: int) -> Task:
        if number not in self._tasks:
            self._tasks[number] = task_of(self.desk.config, self.desk.bases[number].tokenizer)
        return self._tasks[number]

    def _module(self, base_round: int, weights: Weights) -> nn.Module:
        from moshi_fl.models.common import model_of

        module = model_of(self._task(base_round), weights)
        return module.double() if self.precision == "float64" else module.float()

    def _evaluate(
        self, base_round: int, module: nn.Module, sequences: Sequence[int] | None
    ) -> list[int]:
        import torch

        from moshi_fl.models.family import CutsPools

        task, pool = self._task(base_round), self.desk.pool_bytes
        picks = sequences is not None and isinstance(task, CutsPools)
        if picks:
            assert isinstance(task, CutsPools)
            pool = task.pick(pool, sequences or ())
        with few_threads(module), torch.autocast("cpu", enabled=False):
            found = quantise(task.evaluate(module, pool, torch.device("cpu")).tolist())
        return found if picks or sequences is None else [found[i] for i in sequences]


@contextmanager
def few_threads(module: nn.Module) -> Iterator[None]:
    """One thread for a small model: more spend their time waiting for one another."""
    import torch

    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in module.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    meter: Meter, wanted: Sequence[str], shared: Sequence[int], private: Sequence[int]
) -> tuple[tuple[BaseLosses, ...], tuple[Losses, ...]]:
    """Measure contributions and the rounds they build on, as an attestation says it.

    Args:
        meter: What measures.
        wanted: Ids of the contributions; those that are not at hand are left out.
        shared: The sequences that all evaluators measure.
        private: Those of this evaluator alone.
    """
    found = [meter.desk.contributions[i] for i in sorted(wanted) if i in meter.desk.contributions]
    cut, sequences = len(shared), [*shared, *private]
    bases, results = [], []
    for number in sorted({entry.round for entry in found}):
        losses = meter.base_losses(number, sequences)
        bases.append(
            BaseLosses(round=number, shared=pack(losses[:cut]), private=pack(losses[cut:]))
        )
    for entry in found:
        losses = meter.after_losses(entry, sequences)
        results.append(
            Losses(
                submission=entry.id,
                base_round=entry.round,
                shared=pack(losses[:cut]),
                private=pack(losses[cut:]),
            )
        )
    return tuple(bases), tuple(results)


def referee(meter: Meter) -> Referee:
    """Measures single sequences again; whoever has the pool finds the same."""

    def rule(submission: str, sequence: int) -> Ruling | None:
        entry = meter.desk.contributions.get(submission)
        if entry is None:
            return None
        before = meter.base_losses(entry.round, [sequence])[0]
        after = meter.after_losses(entry, [sequence])[0]
        return Ruling(submission=submission, sequence=sequence, before=before, after=after)

    return rule


def tokenizer_before_growth(tokenizer: bytes, missing_rows: int) -> bytes:
    """The tokenizer of an earlier round: without the characters that were appended since."""
    if not missing_rows:
        return tokenizer
    vocabulary = CharVocabulary.from_bytes(tokenizer)
    return CharVocabulary(vocabulary.characters[:-missing_rows]).to_bytes()
