"""PROTOCOL.md, implemented a second time from its text alone, gives the same bits as our code."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.aggregate import Update, apply_step, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.consensus import assign, gain, leaf, merkle_root
from moshi_fl.evidence import Seat, Submission
from moshi_fl.history import check_signature
from moshi_fl.records import Contribution, File, Location, Metrics, Training, Weighting, dump
from moshi_fl.rules import contribution_weight
from moshi_fl.signing import Signer
from moshi_fl.snapshot import encode_keyframe, encode_step, grow
from moshi_fl.weights import Weights
from moshi_hub.intake import first_seen
from tests.support.keys import key_file, signer_of

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


# Evaluation.

EVALUATOR, ID = "b" * 32, "a" * 32


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def book_score(seed: bytes, *words: object) -> bytes:
    return hmac.new(seed, "|".join(str(word) for word in words).encode(), hashlib.sha256).digest()


def test_the_worked_evaluation_is_right() -> None:
    text = (Path(__file__).parents[1] / "hub" / "PROTOCOL.md").read_text(encoding="utf-8")
    example = text.partition("### Worked example")[2].partition("###")[0]
    key = re.findall(r"`(ssh-ed25519 \S+)`", example)[0]
    assert f"`{sha(key.encode()).hex()[:32]}`" in example
    one, two = b"\1" * 32, b"\2" * 32
    commitment = sha(b"moshi-fl-nonce-v1\n", key.encode(), b"\n", one)
    assert f"`{commitment.hex()}`" in example
    mixed = bytes(a ^ b for a, b in zip(one, two, strict=True))
    seed = sha(b"moshi-fl-seed-v1\n", bytes(32), mixed)
    assert f"`{seed.hex()}`" in example
    assert f"`{book_score(seed, 'assign', ID, EVALUATOR).hex()}`" in example
    shared = sorted(sorted(range(8), key=lambda i: book_score(seed, "shared", i))[:4])
    assert shared == [1, 2, 5, 6]
    rest = [i for i in range(8) if i not in shared]
    own = sorted(sorted(rest, key=lambda i: book_score(seed, "private", EVALUATOR, i))[:2])
    assert own == [3, 4]
    before, after = (2000000, 2100000, 1900000, 2050000), (1950000, 2048000, 1851000, 1999000)
    assert book_verdict(before, after) == ("credit", 50500, 645)
    assert "S = 202 000 and V = 20 000 000" in " ".join(example.split())


def book_verdict(before: Sequence[int], after: Sequence[int]) -> tuple[str, int, int]:
    g = [b - a for b, a in zip(before, after, strict=True)]
    m, total = len(g), sum(g)
    spread = m * sum(x * x for x in g) - total**2
    left, right = 10**6 * total**2 * (m - 1), 1645**2 * spread
    if total > 0:
        said = "credit" if left > right else "neutral"
    else:
        said = "neutral" if left < right else "reject"
    return said, math.floor(total / m), math.isqrt(spread // ((m - 1) * m**2))


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=2, max_size=30))
def test_a_verdict_follows_by_the_book(losses: list[tuple[int, int]]) -> None:
    before, after = (np.array(column, np.int64) for column in zip(*losses, strict=True))
    found = gain(before, after)
    assert (found.outcome, found.mean, found.standard_error) == book_verdict(
        before.tolist(), after.tolist()
    )


def test_evaluators_are_drawn_by_the_book() -> None:
    people = [(f"p{n}", f"o{n % 4}", n != 5) for n in range(7)]
    keys = {name: signer_of(name).public_key for name, _, _ in people}
    seats = [Seat(key=keys[name], owner=owner, counts=counts) for name, owner, counts in people]
    own = keys["p1"]
    owners = {keys[name]: owner for name, owner, _ in people}
    seed = sha(b"anything")
    entry = Submission(id=ID, record="c" * 64, key=own)
    wanted = []
    for name, owner, _ in sorted(
        (p for p in people if p[2]),
        key=lambda p: book_score(seed, "assign", ID, sha(keys[p[0]].encode()).hex()[:32]),
    ):
        taken = {o for _, o in wanted} | {"o1"}  # o1 is the owner of the submission's key
        if owner not in taken:
            wanted.append((sha(keys[name].encode()).hex()[:32], owner))
    ids = [who for who, _ in wanted]
    first = assign(seed.hex(), entry, seats, owners, quorum=2, stage=1)
    more = assign(seed.hex(), entry, seats, owners, quorum=2, stage=2)
    assert list(first.evaluators) == ids[:2]
    assert list(more.evaluators) == ids[2:6]
    assert len(first.probation) == 0  # p5 has owner o1


def test_the_merkle_root_is_that_of_the_book() -> None:
    entries = [
        Submission(id=f"{n:032x}", record=f"{n:064x}", key=signer_of("p1").public_key)
        for n in range(5)
    ]
    a, b, c, d, e = (sha(b"\0", dump(entry)) for entry in entries)

    def node(x: bytes, y: bytes) -> bytes:
        return sha(b"\1", x, y)

    wanted = node(node(node(a, b), node(c, d)), e)
    assert merkle_root([leaf(entry) for entry in entries]) == wanted


# Signatures. The format is OpenSSH's PROTOCOL.sshsig; the bounds on it are the protocol's.


def field(data: bytes, at: int) -> tuple[bytes, int]:
    """A string of SSH's wire format, and where the next one starts."""
    (length,) = struct.unpack_from(">I", data, at)
    return data[at + 4 : at + 4 + length], at + 4 + length


SSH = "SSH SIGNATURE"


def by_the_book(armoured: str, key: str) -> bool:
    lines = armoured.split("\n")
    body = lines[1:-2]
    blob = base64.b64decode("".join(body))
    fields, at = [], 10
    while at < len(blob):
        found, at = field(blob, at)
        fields.append(found)
    return (
        len(armoured) <= 8192
        and (lines[0], lines[-2:]) == (f"-----BEGIN {SSH}-----", [f"-----END {SSH}-----", ""])
        and all(len(line) == 70 for line in body[:-1])
        and 0 < len(body[-1]) <= 70
        and blob[:10] == b"SSHSIG" + struct.pack(">I", 1)
        and base64.b64encode(fields[0]).decode() == key.split(" ")[1]
        and fields[1:4] == [b"moshi-fl-contribution-v1", b"", b"sha512"]
        and len(fields) == 5
        and field(fields[4], 0)[0]
        == key.split(" ", maxsplit=1)[0].replace("ssh-rsa", "rsa-sha2-512").encode()
    )


@pytest.mark.parametrize(
    ("kind", "bits"), [("ed25519", 0), ("ecdsa", 256), ("ecdsa", 521), ("rsa", 3072)]
)
def test_a_record_is_signed_by_the_book(kind: str, bits: int, tmp_path: Path) -> None:
    signer = Signer(key_file("ann", kind, bits))
    record = dump(contribution(key=signer.public_key))
    signature = signer.sign(record, "moshi-fl-contribution-v1")
    assert by_the_book(signature, signer.public_key)
    (tmp_path / "sig").write_text(signature)
    (tmp_path / "keys").write_text(f"ann {signer.public_key}\n")
    argv = ["ssh-keygen", "-Y", "verify", "-I", "ann", "-n", "moshi-fl-contribution-v1"]
    argv += ["-f", str(tmp_path / "keys"), "-s", str(tmp_path / "sig")]
    assert subprocess.run(argv, input=record, capture_output=True, check=False).returncode == 0
    assert subprocess.run(argv, input=b"x", capture_output=True, check=False).returncode != 0


def test_what_anybody_signs_with_ssh_keygen_alone_is_accepted(tmp_path: Path) -> None:
    path, public = key_file("ben"), signer_of("ben").public_key
    (tmp_path / "record").write_bytes(dump(contribution(key=public)))
    argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(path), "-n", "moshi-fl-contribution-v1"]
    subprocess.run([*argv, str(tmp_path / "record")], check=True)
    check_signature(contribution(key=public), (tmp_path / "record.sig").read_bytes())


def test_the_list_of_what_came_first_is_kept_by_the_book() -> None:
    """Appended in the order of the branches' names; what is no longer open is dropped."""
    listed: list[str] = []
    for opened in ("cd", "bcd", "abd", "abd"):
        branches = sorted(f"refs/heads/contribute/0/{letter * 32}" for letter in opened)
        ids = [branch[-32:] for branch in branches]
        wanted = [entry for entry in listed if entry in ids]
        wanted += [entry for entry in ids if entry not in wanted]
        listed = list(first_seen([listed], branches))
        assert listed == wanted
    assert listed == [letter * 32 for letter in "dba"]
