"""Freed memory stays between the steps of a training, and goes back at its end."""

import multiprocessing
import resource
import threading
from pathlib import Path

import pytest
import torch

from moshi_fl.train.memory import _glibc, kept_memory

pytestmark = pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")

FLOATS, PAGES = 25_000_000, 24_000  # 100 MB: more than an arena of a thread can hold


def work() -> None:
    assert torch.ones(FLOATS)[-1] == 1


def faults() -> int:
    """Page faults of one more step's work, when the allocator has settled."""

    def taken() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return min(taken() for _ in range(5))


def resident() -> int:
    """Pages of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def a_training() -> None:
    with kept_memory():
        with kept_memory():
            assert faults() < PAGES // 10, "a step finds the memory of those before"
        assert faults() < PAGES // 10, "who is still inside keeps it"
        kept = resident()
    assert resident() < kept - PAGES // 2, "at the end it goes back"


def test_a_process_that_trains_keeps_its_memory_until_the_end():
    # In a process of its own: malloc moves a thread that was once refused a block to other ground.
    process = multiprocessing.get_context("spawn").Process(target=a_training)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_thread_gets_blocks_that_its_own_arena_cannot_hold():
    done: list[bool] = []

    def train() -> None:
        with kept_memory():
            work()
            done.append(True)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, True]


def test_another_device_leaves_the_allocator_alone():
    with kept_memory("cuda:0"):
        work()
        small = resident()
        work()
        assert resident() < small + PAGES // 2
