"""Several processes, started by ``torchrun``, that share each step's batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from moshi_fl.errors import MoshiError, TrainingError
from moshi_fl.train.world import Alone, World

BUCKET = 1 << 23  # numbers that travel together


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """All processes of this run; what ``torchrun`` has put into the environment decides."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()


class Processes:
    """All ranks of the process group; numbers of the host travel by gloo, past any device."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo")

    @contextmanager
    def together(self) -> Iterator[None]:
        """See ``World``; only process 0 has something to say about the failure."""
        mine: MoshiError | OSError | None = None
        try:
            yield
        except (MoshiError, OSError) as error:
            mine = error
        if not self.total(int(mine is not None)):
            return
        said: list[tuple[str, str] | None] = [None] * self.size
        own = (str(mine), getattr(mine, "hint", "")) if mine else None
        with _connected():
            dist.all_gather_object(said, own, group=self._host)
        if self.rank:
            raise SystemExit(1) from mine
        if mine:
            raise mine
        rank, (message, hint) = next((i, what) for i, what in enumerate(said) if what)
        raise TrainingError(f"process {rank}: {message}", hint=hint)

    def total(self, number: int) -> int:
        """See ``World``."""
        tensor = torch.tensor(number)
        with _connected():
            dist.all_reduce(tensor, group=self._host)
        return int(tensor)

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """See ``World``; in buckets, as one collective for each tensor would be slow."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _connected():
                dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(f"another process of this run has ended ({error}).") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
