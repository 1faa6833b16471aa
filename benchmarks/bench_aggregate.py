"""FedAvg of 32 contributions of 10.7 million float32 parameters, against Flower's on the same data.

Each side runs in a process of its own, with one thread, from 32 safetensors files to the mean delta
in memory: ours maps and averages them in float64, Flower's loads them into reply messages for
``FedAvg().aggregate_train``, which averages in float32 (its share of the time is in the note). The
sides take turns three times and the best of each counts. Memory is the highest resident size above
that after the imports. The floor is reading all bytes once, in blocks that stay in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import Row, print_table
from moshi_fl.aggregate import Update, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes
from moshi_fl.weights import open_weights, save_weights

CONTRIBUTIONS = 32
D, FF, VOCABULARY, LAYERS = 384, 1536, 100, 6
LAYER = {"qkv": (3 * D, D), "out": (D, D), "up": (FF, D), "down": (D, FF), "gain": (D,)}
SHAPES = {
    "embedding": (VOCABULARY, D),
    "head": (VOCABULARY, D),
    **{f"layer.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()},
}


def write_contributions(folder: Path) -> None:
    """Files ``00.safetensors`` … of normally distributed deltas."""
    codec = get_codec("f32", {})
    for number in range(CONTRIBUTIONS):
        rng = np.random.default_rng(number)
        delta = {
            name: 1e-3 * rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()
        }
        (folder / f"{number:02d}.safetensors").write_bytes(delta_bytes(delta, codec))


def weight_of(number: int, mode: str) -> int:
    """Examples that a contribution claims: all alike, as by one recipe, or all different."""
    return 4800 if mode == "equal" else 100 + 37 * number


def ours(folder: Path, files: list[Path], mode: str) -> tuple[float, float]:
    """Map and average; CPU seconds of it all, and of a pass over all values that checks them."""
    codec = get_codec("f32", {})
    start = time.process_time()
    updates = [
        Update(path.stem, weight_of(number, mode), Delta.open(path, SHAPES, codec, checked=True))
        for number, path in enumerate(files)
    ]
    step = get_strategy("fedavg", {}).aggregate(updates, SHAPES)
    mean = {name: change.astype(np.float32) for name, change in step}
    seconds = time.process_time() - start
    save_weights(folder / "ours.result", mean)
    start = time.process_time()
    for path in files:
        Delta.open(path, SHAPES, codec)
    return seconds, time.process_time() - start


def flower(folder: Path, files: list[Path], mode: str) -> tuple[float, float]:
    """Load into messages and aggregate; CPU seconds of it all, and of the aggregation alone."""
    from flwr.serverapp.strategy import FedAvg

    start = time.process_time()
    replies = [flower_reply(path, weight_of(number, mode)) for number, path in enumerate(files)]
    loaded = time.process_time()
    arrays, _ = FedAvg().aggregate_train(1, replies)
    end = time.process_time()
    assert arrays is not None
    save_weights(folder / "flower.result", {name: arrays[name].numpy() for name in arrays})
    return end - start, end - loaded


def flower_reply(path: Path, weight: int):
    from flwr.app import Array, ArrayRecord, Metadata, MetricRecord, RecordDict
    from flwr.app.message import make_message
    from safetensors.numpy import load_file

    arrays = ArrayRecord({name: Array(value) for name, value in load_file(path).items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
    metadata = Metadata(
        run_id=0,
        message_id=path.stem,
        src_node_id=1,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="1",
        created_at=time.time(),
        ttl=3600,
        message_type="train",
    )
    return make_message(metadata=metadata, content=content)


def floor(_folder: Path, files: list[Path], _mode: str) -> tuple[float, float]:
    """Read every byte once; CPU seconds."""
    block = bytearray(1 << 18)
    start = time.process_time()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.process_time() - start, 0.0


SIDES = {"ours": ours, "flower": flower, "floor": floor}


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or its high-water mark ``VmHWM``, which is fresh in each process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def child(side: str, folder: Path, mode: str) -> None:
    """Run one side and print its CPU seconds, all and part, and its memory above the start."""
    if side == "flower":
        import flwr.serverapp.strategy  # noqa: F401 - its memory and time are not the aggregation's
        import safetensors.numpy  # noqa: F401
    before = resident("VmRSS")
    files = sorted(folder.glob("*.safetensors"))
    all_seconds, part = SIDES[side](folder, files, mode)
    print(json.dumps([all_seconds, part, resident("VmHWM") - before]))


def measure(
    side: str, folder: Path, how: str, module: str = "benchmarks.bench_aggregate"
) -> list[float]:
    """What ``child`` of a benchmark prints of one side, with one thread in a process of its own."""
    settings = {"FLWR_TELEMETRY_ENABLED": "0"}
    settings |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    run = subprocess.run(
        [sys.executable, "-m", module, side, str(folder), how],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Flower's log
        text=True,
        check=True,
    )
    found: list[float] = json.loads(run.stdout.splitlines()[-1])
    return found


def largest_difference(folder: Path, side: str = "flower") -> float:
    """Between our result and another's, relative to the largest value."""
    a, b = (open_weights(folder / f"{name}.result") for name in ("ours", side))
    largest = max(float(np.abs(a[name]).max()) for name in SHAPES)
    return max(float(np.abs(a[name] - b[name]).max()) for name in SHAPES) / largest


def run() -> list[Row]:
    """Write the files, run each side, compare the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_contributions(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return [row for mode in ("equal", "different") for row in compare(folder, size, mode)]


def compare(folder: Path, size: int, mode: str) -> list[Row]:
    """Both sides and the floor in three turns, the best of each."""
    turns = [[measure(side, folder, mode) for side in SIDES] for _ in range(3)]
    difference = largest_difference(folder)
    (our_time, check, our_memory), (flower_time, flower_part, flower_memory), (floor_time, _, _) = (
        min(results) for results in zip(*turns, strict=True)
    )
    # 32 products and sums in float32, each rounded by at most 2^-24 of the running sum.
    assert difference < 2 * CONTRIBUTIONS * 2.0**-24, difference
    what = f"FedAvg of {CONTRIBUTIONS} x {size / CONTRIBUTIONS / 4e6:.1f} M float32, {mode} weights"
    return [
        Row(
            f"{what}: CPU time",
            f"{our_time:.2f} s",
            f"Flower {flower_time:.2f} s",
            flower_time / our_time,
            ">= 5",
            f"{floor_time:.2f} s to read {size / 1e9:.2f} GB once",
            f"aggregate_train alone {flower_part:.2f} s; to check our files {check:.2f} s more; "
            f"results within {difference:.0e} of the largest value",
        ),
        Row(
            f"{what}: peak memory",
            f"{our_memory / 1e6:.0f} MB",
            f"Flower {flower_memory / 1e6:.0f} MB",
            flower_memory / our_memory,
            ">= 10",
            f"{size / CONTRIBUTIONS / 1e6:.0f} MB, the result",
            "ours does not grow with the number of contributions",
        ),
    ]


if __name__ == "__main__":
    if len(sys.argv) == 4:
        child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        print_table(run())
