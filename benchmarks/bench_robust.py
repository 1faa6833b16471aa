"""Krum and ``robust`` on deltas of 10.7 million float32 parameters, against byzfl and Flower.

As in ``bench_aggregate``: each side in a process of its own, with one thread, from the files to the
aggregated delta in memory; the best of ``TURNS``; memory above that after the imports. byzfl gets
the deltas as one torch tensor, its own way; its part of ``robust`` is Clipping to the median norm,
NNM and TrMean. torch adds up its distances in float32, which is off by a few thousandths over so
many weights, so byzfl may mix with other neighbours; on float64 arrays both agree to 1e-14. byzfl
and Flower are left out where they are not installed. ``ROBUST_COUNTS=8`` measures with 8
contributions only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_aggregate import (
    SHAPES,
    flower_reply,
    largest_difference,
    measure,
    resident,
)
from benchmarks.common import Row, print_table
from moshi_fl.aggregate import Update, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes
from moshi_fl.weights import save_weights

MODULE = "benchmarks.bench_robust"
TURNS = 2
STRATEGIES = ("krum", "robust")


def write_contributions(folder: Path, count: int) -> None:
    """Files ``00.safetensors`` … of deltas of one direction; a fifth turn it around."""
    codec = get_codec("f32", {})
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    for number in range(count):
        random = np.random.default_rng([1, number])
        sign = -3 if number % 5 == 4 else 1
        delta = {
            name: np.float32(1e-3)
            * (sign * value + random.standard_normal(value.shape, np.float32))
            for name, value in common.items()
        }
        (folder / f"{number:02d}.safetensors").write_bytes(delta_bytes(delta, codec))


def ours(files: list[Path], strategy: str) -> dict[str, Any]:
    codec = get_codec("f32", {})
    updates = [
        Update(path.stem, 1, Delta.open(path, SHAPES, codec, checked=True)) for path in files
    ]
    step = get_strategy(strategy, {}).aggregate(updates, SHAPES)
    return {name: change.astype(np.float32) for name, change in step}


def theirs(files: list[Path], strategy: str) -> dict[str, Any]:
    """byzfl's."""
    import torch
    from safetensors.torch import load_file

    from tests.support.byzfl import byzfl

    rows = []
    for path in files:
        tensors = load_file(path)
        rows.append(torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]))
    vectors, f = torch.stack(rows), (len(files) - 1) // 3
    del rows
    if strategy == "krum":
        return _split(byzfl("aggregators").Krum(f=f)(vectors))
    limit = torch.quantile(vectors.norm(dim=1), 0.5).item()
    clipped = byzfl("preaggregators").Clipping(c=limit)(vectors)
    mixed = byzfl("preaggregators").NNM(f=f)(clipped)
    return _split(byzfl("aggregators").TrMean(f=f)(mixed))


def _split(flat: Any) -> dict[str, Any]:
    tensors, at = {}, 0
    for name in sorted(SHAPES):
        size = int(np.prod(SHAPES[name]))
        tensors[name] = flat[at : at + size].numpy().reshape(SHAPES[name])
        at += size
    return tensors


def flower(files: list[Path], _strategy: str) -> dict[str, Any]:
    from flwr.serverapp.strategy import Krum

    chosen = Krum(num_malicious_nodes=(len(files) - 1) // 3)
    arrays, _ = chosen.aggregate_train(1, [flower_reply(path, 1) for path in files])
    assert arrays is not None
    return {name: arrays[name].numpy() for name in arrays}


SIDES = {"ours": ours, "byzfl": theirs, "flower": flower}


def child(side: str, folder: Path, strategy: str) -> None:
    """Run one side and print its CPU seconds and its memory above the start."""
    if side == "byzfl":
        import safetensors.torch  # its memory and time are not the aggregation's

        from tests.support.byzfl import byzfl

        byzfl("aggregators")
    elif side == "flower":
        import flwr.serverapp.strategy  # noqa: F401
        import safetensors.numpy  # noqa: F401
    before, start = resident("VmRSS"), time.process_time()
    result = SIDES[side](sorted(folder.glob("*.safetensors")), strategy)
    seconds = time.process_time() - start
    memory = resident("VmHWM") - before
    save_weights(folder / f"{side}.result", {n: np.asarray(v) for n, v in result.items()})
    print(json.dumps([seconds, memory]))


def rivals(strategy: str) -> list[str]:
    """Who is there to compare with."""
    present = ["byzfl"] if find_spec("byzfl") and find_spec("scipy") else []
    return present + (["flower"] if strategy == "krum" and find_spec("flwr") else [])


def run() -> list[Row]:
    """Each strategy with 8 and with 32 contributions."""
    counts = [int(count) for count in os.environ.get("ROBUST_COUNTS", "8 32").split()]
    return [row for count in counts for row in compare_all(count)]


def compare_all(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_contributions(folder, count)
        return [row for strategy in STRATEGIES for row in compare(folder, count, strategy)]


def compare(folder: Path, count: int, strategy: str) -> list[Row]:
    sides = ["ours", *rivals(strategy)]
    left_out = strategy == "robust" and mixing_bytes(count) > free_bytes() / 2
    if left_out:
        sides.remove("byzfl")
    turns = [[measure(side, folder, strategy, MODULE) for side in sides] for _ in range(TURNS)]
    figures = {
        side: [min(values) for values in zip(*(turn[index] for turn in turns), strict=True)]
        for index, side in enumerate(sides)
    }
    rows = [row_of_too_much(count, figures["ours"])] if left_out else []
    for rival in sides[1:]:
        rows += rows_for(strategy, count, rival, figures, largest_difference(folder, rival))
    return rows


def mixing_bytes(count: int) -> int:
    """What byzfl's NNM holds at once: the neighbours of each update, side by side."""
    parameters = sum(int(np.prod(shape)) for shape in SHAPES.values())
    return 4 * parameters * count * (count - (count - 1) // 3)


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row_of_too_much(count: int, figures: list[float]) -> Row:
    return Row(
        f"robust of {count} x 10.7 M float32: peak memory",
        f"{figures[1] / 1e6:.0f} MB",
        f"byzfl {mixing_bytes(count) / 1e6:.0f} MB",
        mixing_bytes(count) / figures[1],
        ">= 2",
        "43 MB, the result",
        f"ours takes {figures[0]:.1f} s; byzfl's need is computed, there was no room to run it",
    )


def rows_for(
    strategy: str, count: int, rival: str, figures: dict[str, list[float]], apart: float
) -> list[Row]:
    (our_time, our_memory), (their_time, their_memory) = figures["ours"], figures[rival]
    what = f"{strategy} of {count} x 10.7 M float32"
    return [
        Row(
            f"{what}: CPU time",
            f"{our_time:.2f} s",
            f"{rival} {their_time:.2f} s",
            their_time / our_time,
            ">= 1",
            note=f"results within {apart:.0e} of the largest value",
        ),
        Row(
            f"{what}: peak memory",
            f"{our_memory / 1e6:.0f} MB",
            f"{rival} {their_memory / 1e6:.0f} MB",
            their_memory / our_memory,
            ">= 2",
            "43 MB, the result",
        ),
    ]


if __name__ == "__main__":
    if len(sys.argv) == 4:
        child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        print_table(run())
