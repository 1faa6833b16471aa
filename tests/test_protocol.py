"""PROTOCOL.md, implemented a second time from its text alone, gives the same bits as our code."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard

from moshi_fl.aggregate import Update, apply_step, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.records import Contribution, File, Location, Metrics, Training, Weighting, dump
from moshi_fl.rules import contribution_weight
from moshi_fl.snapshot import encode_keyframe, encode_step, grow
from moshi_fl.weights import Weights

SHAPES = {"bias": (7,), "layer.weight": (30, 41), "scalar": ()}


def random_weights(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.standard_normal(shape) * scale, np.float32)
        for name, shape in SHAPES.items()
    }


def same_bits(a: Weights, b: Weights) -> bool:
    return set(a) == set(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


# Canonical JSON.


def contribution(**changes: object) -> Contribution:
    record = Contribution(
        hub="0" * 16,
        round=3,
        base="a" * 64,
        family="char",
        codec="topk",
        contributor='Zoë "\\\n\x01/😀',
        key="ssh-ed25519 " + "A" * 68,
        delta=Location(
            ref="refs/moshi/delta/3/x",
            commit="b" * 40,
            files=(File(name="delta.safetensors", bytes=5, sha256="c" * 64),),
        ),
        num_examples=10,
        training=Training(steps=1, batch_size=2, learning_rate=0.5, seed=0, precision="fp32"),
        software="test",
    )
    return msgspec.structs.replace(record, **changes)


def test_canonical_json_is_what_python_writes_but_for_exponents() -> None:
    record = contribution(metrics=Metrics(held_out_before=1.0, held_out_after=-2.25))
    text = json.dumps(msgspec.to_builtins(record), indent=2, sort_keys=True, ensure_ascii=False)
    assert dump(record).decode() == text + "\n"


@pytest.mark.parametrize(
    ("number", "spelling"),
    [
        (1e-5, "0.00001"),
        (9e-6, "9e-6"),
        (1.5e-7, "1.5e-7"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e16"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
    ],
)
def test_floats_are_spelled_as_the_protocol_says(number: float, spelling: str) -> None:
    record = contribution(metrics=Metrics(held_out_before=number))
    assert f'"held_out_before": {spelling}\n' in dump(record).decode()


# Snapshots.


def ordered(x: int) -> int:
    return x ^ 0x7FFFFFFF if x >> 31 else x


def part(data: bytes, length: int, full: int) -> bytes:
    assert length <= full
    return data if length == full else zstandard.ZstdDecompressor().decompress(data)


def block(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """The differences of a block, and where the next one starts."""
    lengths = struct.unpack_from("<5I", data, at)
    at += 20
    stored = list(range(count))
    if lengths[0]:
        mask = part(data[at : at + lengths[0]], lengths[0], -(-count // 8))
        stored = [i for i in range(count) if mask[i // 8] >> i % 8 & 1]
    at += lengths[0]
    differences = [0] * count
    for plane, length in enumerate(lengths[1:]):
        values = part(data[at : at + length], length, len(stored))
        at += length
        for i, byte in zip(stored, values, strict=True):
            differences[i] |= byte << 8 * plane
    return differences, at


def decode(folder: Path, old: list[int] | None) -> bytes:
    """All weights of a snapshot, in canonical order, as bytes."""
    index = json.loads((folder / "index.json").read_text())
    total = sum(int(np.prod(tensor["shape"])) for tensor in index["tensors"])
    base, new = old or [0] * total, []
    for number in range(index["files"]):
        data, at = (folder / f"weights-{number:03d}.zst").read_bytes(), 0
        while at < len(data):
            count = min(1 << 20, total - len(new))
            differences, at = block(data, at, count)
            for difference in differences:
                change = (difference >> 1) ^ -(difference & 1)
                new.append(ordered((ordered(base[len(new)]) + change) & 0xFFFFFFFF))
    return struct.pack(f"<{total}I", *new)


def flat(weights: Weights) -> bytes:
    return b"".join(weights[name].astype("<f4").tobytes() for name in sorted(weights))


def test_a_keyframe_decodes_by_the_book(tmp_path: Path) -> None:
    weights = random_weights(1)
    encode_keyframe(weights, tmp_path)
    assert decode(tmp_path, None) == flat(weights)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_step_decodes_by_the_book(share: float, tmp_path: Path) -> None:
    old = random_weights(1)
    random = np.random.default_rng(2)
    new = {
        name: np.where(random.random(array.shape) < share, -array * 1.01, array).astype(np.float32)
        for name, array in old.items()
    }
    encode_step(old, new, tmp_path)
    words = list(struct.unpack(f"<{len(flat(old)) // 4}I", flat(old)))
    assert decode(tmp_path, words) == flat(new)


# Aggregation. Python's floats are IEEE 754 float64, and each operation rounds once.


def updates(codec_name: str, count: int) -> list[Update]:
    codec = get_codec(codec_name, {})
    found = []
    for number in range(count):
        delta = random_weights(100 + number, 1e-2)
        if number == 1:
            del delta["bias"]  # not everybody trains everything
        entries, _ = encode_delta(delta, codec)
        parsed = Delta.parse(delta_bytes(entries, codec), SHAPES, codec, "delta")
        found.append(Update(f"{count - number:032x}", 3 + 7 * number, parsed))
    return found


def values_of(update: Update, name: str) -> list[float]:
    """Decoded and widened; zeros where the update carries nothing."""
    size = int(np.prod(SHAPES[name]))
    if name not in update.delta.names:
        return [0.0] * size
    return [float(value) for value in update.delta.decode(name).reshape(-1)]


def mean(numbers: list[float], weights: list[int]) -> float:
    total = 0.0
    reduced = [weight // math.gcd(*weights) for weight in weights]
    for number, weight in zip(numbers, reduced, strict=True):
        total = total + weight * number
    return total / sum(reduced)


def trimmed(numbers: list[float], drop: int) -> float:
    kept = sorted(numbers)[drop : len(numbers) - drop]
    total = 0.0
    for number in kept:
        total = total + number
    return total / len(kept)


def new_weights(base: Weights, steps: dict[str, list[float]], rate: float) -> Weights:
    return {
        name: np.array(
            [s * rate + float(w) for s, w in zip(steps[name], base[name].flat, strict=True)]
        )
        .astype(np.float32)
        .reshape(base[name].shape)
        for name in base
    }


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "topk"])
@pytest.mark.parametrize("strategy", ["fedavg", "median", "trimmed-mean"])
def test_a_round_is_aggregated_by_the_book(codec: str, strategy: str) -> None:
    base, found = random_weights(1), updates(codec, 5)
    in_order = sorted(found, key=lambda update: update.id)
    options = {"trim": 0.25} if strategy == "trimmed-mean" else {}
    drop = {"median": (5 - 1) // 2, "trimmed-mean": int(0.25 * 5)}.get(strategy, 0)
    weights = [update.weight for update in in_order]
    steps = {}
    for name in base:
        columns = zip(*(values_of(update, name) for update in in_order), strict=True)
        steps[name] = [
            mean(list(column), weights) if strategy == "fedavg" else trimmed(list(column), drop)
            for column in columns
        ]
    ours = apply_step(base, get_strategy(strategy, options).aggregate(found, SHAPES), 0.7)
    assert same_bits(ours, new_weights(base, steps, 0.7))


def test_contributions_weigh_by_the_book() -> None:
    rule = Weighting(max_examples=1000, staleness_discount=0.5)
    assert contribution_weight(rule, 5000, 0) == 1000
    assert contribution_weight(rule, 333, 1) == 166
    assert contribution_weight(rule, 1, 2) == 1


def test_the_vocabulary_grows_by_the_book() -> None:
    matrix = np.random.default_rng(3).standard_normal((262, 3)).astype(np.float32)
    grown = grow({"embedding": matrix}, ["embedding"], "é€", 4)["embedding"]
    for row, character in zip(grown[-2:], "é€", strict=True):
        for column in range(3):
            total, spelling = 0.0, character.encode()
            for byte in spelling:
                total = total + float(matrix[4 + byte, column])
            assert row[column] == np.float32(total / len(spelling))
