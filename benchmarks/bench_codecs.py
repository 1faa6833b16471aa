"""Bytes and speed of each codec and of the snapshots, on weights of the base model.

The ``base`` preset of the char family learns a package of Python's standard library for a few steps
on one thread; the delta is what the second half of them changed. Times are the best of five.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

from benchmarks.common import Row, print_table
from moshi_fl.aggregate import Update, apply_step, get_strategy
from moshi_fl.codec import CODECS, get_codec
from moshi_fl.codec.base import Codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.models import get_family
from moshi_fl.models.common import extract_weights
from moshi_fl.snapshot import decode_keyframe, decode_step, encode_keyframe, encode_step
from moshi_fl.weights import Weights, count_parameters, open_weights, serialize, weights_digest

STEPS = 15  # before and again after the base is taken
CONTRIBUTORS = 10


def trained() -> tuple[Weights, Weights]:
    """Weights of the base model before and after a contribution."""
    torch.set_num_threads(1)
    preset = get_family("char").presets["base"]
    task = get_family("char").load(preset.model, preset.tokenizer)
    corpus = task.read([Path(sysconfig.get_path("stdlib"), "json")], seed=0)
    module = task.build()
    module.load_state_dict({k: torch.tensor(v) for k, v in task.initial_weights(0).items()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    batches = task.batches(corpus, 2, seed=0)
    taken = []
    for _ in range(2):
        for _ in range(STEPS):
            loss, _ = task.loss(module, next(batches))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        taken.append({name: array.copy() for name, array in extract_weights(module).items()})
    return taken[0], taken[1]


def best(action: Callable[[], object]) -> float:
    """Seconds of the fastest of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def codec_row(codec: Codec, delta: Weights, plain: int) -> Row:
    """Bytes of a whole delta file, and what it costs to write, check and average it."""
    shapes = {name: array.shape for name, array in delta.items()}
    entries, carry = encode_delta(delta, codec)
    data = delta_bytes(entries, codec)
    parsed = Delta.parse(data, shapes, codec, "delta")
    fedavg, updates = get_strategy("fedavg", {}), [Update("a", 1, parsed)]
    encode = best(lambda: encode_delta(delta, codec))
    check = best(lambda: Delta.parse(data, shapes, codec, "delta"))
    decode = best(lambda: [parsed.decode(name) for name in parsed.names])
    add = best(lambda: list(fedavg.aggregate(updates, shapes)))
    held = np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in carry.values()))
    return Row(
        f"delta of {count_parameters(delta) / 1e6:.1f} M parameters: {codec.name}",
        f"{len(data) / 1e3:.1f} kB ({len(data) / plain:.2%})",
        f"float32 {plain / 1e6:.1f} MB",
        plain / len(data),
        ">= 118 (0.85 %)" if codec.name == "topk" else "",
        note=f"encode {encode * 1e3:.0f}, check {check * 1e3:.0f}, decode {decode * 1e3:.0f}, "
        f"average {add * 1e3:.0f} ms; {held / norm_of(delta):.0%} of the norm held back",
    )


def norm_of(delta: Weights) -> float:
    """Euclidean norm of all tensors together."""
    return float(np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in delta.values())))


def keyframe_row(weights: Weights, folder: Path) -> tuple[Row, int]:
    """Bytes of a keyframe against the weights compressed as they are."""
    plain = b"".join(serialize(weights))
    zstd = len(zstandard.ZstdCompressor(3).compress(plain))
    size = sum(file.bytes for file in encode_keyframe(weights, folder))
    out, parameters = folder / "out.safetensors", count_parameters(weights)
    encode = best(lambda: encode_keyframe(weights, folder))
    decode = best(lambda: decode_keyframe(folder, out, parameters=parameters))
    assert weights_digest(open_weights(out)) == weights_digest(weights)
    row = Row(
        "keyframe of the base model",
        f"{size / 1e6:.2f} MB ({size / len(plain):.1%})",
        f"zstd -3 {zstd / 1e6:.2f} MB ({zstd / len(plain):.1%})",
        zstd / size,
        "> 1",
        f"{len(plain) / 1e6:.2f} MB plain",
        f"encode {len(plain) / encode / 1e9:.2f}, decode {len(plain) / decode / 1e9:.2f} GB/s, "
        "fsync included",
    )
    return row, size


def update_rows(old: Weights, delta: Weights, keyframe: int, folder: Path) -> list[Row]:
    """A round of ten topk contributions: as deltas, and as one step."""
    codec, rng = get_codec("topk", {}), np.random.default_rng(0)
    shapes = {name: array.shape for name, array in delta.items()}
    files = []
    for _ in range(CONTRIBUTORS):
        # Contributors agree in part: the common delta, and as much again of their own.
        own = {
            name: array + np.float32(array.std()) * rng.standard_normal(array.shape, np.float32)
            for name, array in delta.items()
        }
        files.append(delta_bytes(encode_delta(own, codec)[0], codec))
    updates = [
        Update(str(number), 1, Delta.parse(data, shapes, codec, "delta"))
        for number, data in enumerate(files)
    ]
    new = apply_step(old, get_strategy("fedavg", {}).aggregate(updates, shapes))
    step = sum(file.bytes for file in encode_step(old, new, folder))
    assert weights_digest(decode_step(old, folder)) == weights_digest(new)
    return [
        Row(
            f"warm update, {CONTRIBUTORS} topk contributors: as {kind}",
            f"{size / 1e6:.2f} MB",
            f"keyframe {keyframe / 1e6:.2f} MB",
            keyframe / size,
            target,
        )
        for kind, size, target in (
            ("deltas", sum(map(len, files)), ">= 10"),
            ("step", step, ""),
        )
    ]


def run() -> list[Row]:
    """Train, then measure codecs, keyframe and update."""
    old, new = trained()
    delta = {name: new[name] - old[name] for name in sorted(new)}
    plain = sum(array.nbytes for array in delta.values())
    rows = [codec_row(get_codec(name, {}), delta, plain) for name in CODECS]
    with tempfile.TemporaryDirectory() as name:
        row, keyframe = keyframe_row(new, Path(name, "keyframe"))
        return [*rows, row, *update_rows(old, delta, keyframe, Path(name, "step"))]


if __name__ == "__main__":
    print_table(run())
