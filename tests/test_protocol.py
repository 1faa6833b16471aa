"""PROTOCOL.md, implemented a second time from its text alone, gives the same bits as our code."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_fl.aggregate import STRATEGIES, Update, apply_step, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.history import check_signature
from moshi_fl.records import (
    Contribution,
    File,
    Growth,
    Location,
    Metrics,
    Round,
    Strategy,
    Training,
    Weighting,
    dump,
)
from moshi_fl.records import Update as PublishedUpdate
from moshi_fl.restore import advance
from moshi_fl.rules import Claim, contribution_weight, round_weights
from moshi_fl.signing import Signer
from moshi_fl.snapshot import encode_keyframe, encode_step, grow
from moshi_fl.upstream import origin_of
from moshi_fl.weights import Weights, weights_digest
from moshi_hub.intake import first_seen
from moshi_hub.rootchange import replace
from moshi_hub.rotation import change_root, open_bench
from tests.support.keys import key_file, signer_of
from tests.support.simulator import HubSimulator

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


Rows = list[list[float]]


def exact_products(rows: Rows) -> Rows:
    """Inner products of the rounded values, in Python's own integers."""
    scales, rounded = [], []
    for row in rows:
        largest = max(map(abs, row))
        k = 0 if largest == 0 else 35
        while largest and not 2.0**35 <= largest * 2.0**k < 2.0**36:
            k += 1 if largest * 2.0**k < 2.0**35 else -1
        scales.append(k)
        rounded.append([round(value * 2.0**k) for value in row])
    return [
        [
            float(Fraction(sum(a * b for a, b in zip(p, q, strict=True))) / Fraction(2) ** (k + m))
            for q, m in zip(rounded, scales, strict=True)
        ]
        for p, k in zip(rounded, scales, strict=True)
    ]


def squared_distances(g: Rows, c: list[float]) -> Rows:
    n = range(len(g))
    a = [[c[i] * c[j] * g[i][j] for j in n] for i in n]
    return [[max(0.0, (a[i][i] + a[j][j]) - 2.0 * a[i][j]) for j in n] for i in n]


def total(numbers: Iterable[float]) -> float:
    found = 0.0
    for number in numbers:
        found = found + number
    return found


def dot(s: list[float], values: Iterable[float]) -> float:
    return total(share * value for share, value in zip(s, values, strict=True))


def middle(numbers: list[float]) -> float:
    ordered, half = sorted(numbers), len(numbers) // 2
    return ordered[half] if len(numbers) % 2 else (ordered[half - 1] + ordered[half]) / 2.0


def best_scores(rows: Rows, f: int, keep: int) -> list[int]:
    """Indices of the chosen, in order of id."""
    n = len(rows)
    distances = squared_distances(exact_products(rows), [1.0] * n)
    scores = []
    for i in range(n):
        others = sorted(distances[i][j] for j in range(n) if j != i)
        scores.append((total(others[: n - f - 1]), i))
    return sorted(i for _, i in sorted(scores)[:keep])


def krum(rows: Rows) -> list[float]:
    return rows[best_scores(rows, (len(rows) - 1) // 3, 1)[0]]


def multi_krum(rows: Rows, f: int, keep: int) -> list[float]:
    chosen = best_scores(rows, f, keep)
    return [total(column) / keep for column in zip(*(rows[i] for i in chosen), strict=True)]


def geometric_median(rows: Rows, iterations: int) -> list[float]:
    g = exact_products(rows)
    distances, r = (
        squared_distances(g, [1.0] * len(rows)),
        [math.sqrt(g[i][i]) for i in range(len(g))],
    )
    s: list[float] = []
    for iteration in range(iterations):
        if iteration:
            u = [dot(s, row) for row in distances]
            h = dot(s, u)
            r = [math.sqrt(max(0.0, own - h / 2.0)) for own in u]
        b = [1.0 / max(1e-6, radius) for radius in r]
        s = [one / total(b) for one in b]
    return [dot(s, column) for column in zip(*rows, strict=True)]


def centered_clipping(rows: Rows, iterations: int) -> list[float]:
    g, n = exact_products(rows), len(rows)
    radius, s = middle([math.sqrt(g[i][i]) for i in range(n)]), [0.0] * n
    for _ in range(iterations):
        u = [dot(s, row) for row in g]
        h = dot(s, u)
        r = [math.sqrt(max(0.0, (g[i][i] - 2.0 * u[i]) + h)) for i in range(n)]
        factors = [1.0 if one <= radius else radius / one for one in r]
        stay = 1.0 - total(factors) / n
        s = [share * stay + factor / n for share, factor in zip(s, factors, strict=True)]
    return [dot(s, column) for column in zip(*rows, strict=True)]


def robust(rows: Rows, running_norm: float) -> list[float]:
    g, n = exact_products(rows), len(rows)
    norms, f = [math.sqrt(g[i][i]) for i in range(n)], (n - 1) // 3
    limit = middle(norms)
    if running_norm:
        limit = min(limit, 2.0 * running_norm)
    c = [1.0 if norm <= limit else limit / norm for norm in norms]
    x = [[factor * value for value in row] for factor, row in zip(c, rows, strict=True)]
    if f == 0:
        return [total(column) / n for column in zip(*x, strict=True)]
    distances, mixtures = squared_distances(g, c), []
    for i in range(n):
        far = sorted((j for j in range(n) if j != i), key=lambda j: (-distances[i][j], -j))[:f]
        mixture = []
        for column in zip(*x, strict=True):
            value = total(column)
            for j in sorted(far):
                value = value - column[j]
            mixture.append(value / (n - f))
        mixtures.append(mixture)
    return [trimmed(list(column), f) for column in zip(*mixtures, strict=True)]


def new_weights(base: Weights, steps: dict[str, list[float]], rate: float) -> Weights:
    return {
        name: np.array(
            [s * rate + float(w) for s, w in zip(steps[name], base[name].flat, strict=True)]
        )
        .astype(np.float32)
        .reshape(base[name].shape)
        for name in base
    }


BY_THE_BOOK: dict[str, tuple[dict[str, object], Callable[[Rows, list[int]], list[float]]]] = {
    "fedavg": ({}, lambda rows, w: [mean(list(column), w) for column in zip(*rows, strict=True)]),
    "median": ({}, lambda rows, _: [trimmed(list(c), 2) for c in zip(*rows, strict=True)]),
    "trimmed-mean": (
        {"trim": 0.25},
        lambda rows, _: [trimmed(list(c), int(0.25 * 5)) for c in zip(*rows, strict=True)],
    ),
    "krum": ({}, lambda rows, _: krum(rows)),
    "multi-krum": ({"f": 2, "keep": 2}, lambda rows, _: multi_krum(rows, 2, 2)),
    "geometric-median": ({"iterations": 7}, lambda rows, _: geometric_median(rows, 7)),
    "centered-clipping": ({}, lambda rows, _: centered_clipping(rows, 3)),
    "robust": ({"running_norm": 0.17}, lambda rows, _: robust(rows, 0.17)),
}


def by_tensor(flat: list[float]) -> dict[str, list[float]]:
    """The canonical sequence of all values, cut into tensors."""
    tensors, at = {}, 0
    for name in sorted(SHAPES):
        size = int(np.prod(SHAPES[name]))
        tensors[name] = flat[at : at + size]
        at += size
    return tensors


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "topk"])
@pytest.mark.parametrize("strategy", BY_THE_BOOK)
def test_a_round_is_aggregated_by_the_book(codec: str, strategy: str) -> None:
    base, found = random_weights(1), updates(codec, 5)
    in_order = sorted(found, key=lambda update: update.id)
    rows = [
        [value for name in sorted(SHAPES) for value in values_of(update, name)]
        for update in in_order
    ]
    options, by_the_book = BY_THE_BOOK[strategy]
    step = by_tensor(by_the_book(rows, [update.weight for update in in_order]))
    ours = apply_step(base, get_strategy(strategy, options).aggregate(found, SHAPES), 0.7)
    assert same_bits(ours, new_weights(base, step, 0.7))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_robust_round_of_any_size_is_aggregated_by_the_book(count: int) -> None:
    base, found = random_weights(1), updates("f32", count)
    rows = [
        [value for name in sorted(SHAPES) for value in values_of(update, name)]
        for update in sorted(found, key=lambda update: update.id)
    ]
    ours = apply_step(base, get_strategy("robust", {}).aggregate(found, SHAPES), 1.0)
    assert same_bits(ours, new_weights(base, by_tensor(robust(rows, 0.0)), 1.0))


def test_every_strategy_is_in_the_book() -> None:
    assert set(BY_THE_BOOK) == set(STRATEGIES)


def shared_weights(claims: list[tuple[str, int, int]], rule: Weighting) -> list[int]:
    """Weights of (owner, examples, age), from the text."""
    weights = []
    for _, examples, age in claims:
        w = 1000000.0 if rule.rule == "equal" else float(min(examples, rule.max_examples))
        for _ in range(age):
            w = w * rule.staleness_discount
        weights.append(max(1, math.floor(w)))
    owners = {owner for owner, _, _ in claims}
    together = {
        one: sum(w for (owner, _, _), w in zip(claims, weights, strict=True) if owner == one)
        for one in owners
    }
    m, k = min(rule.min_owners, len(owners)), 0
    t = sorted(together.values(), reverse=True)
    rest = sum(t)
    while t[k] > rest // (m - k):
        rest = rest - t[k]
        k = k + 1
    c = rest // (m - k)
    return [
        w if together[owner] <= c else max(1, w * c // together[owner])
        for (owner, _, _), w in zip(claims, weights, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(
    claims=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 10**12), st.integers(0, 3)), min_size=1
    ),
    rule=st.builds(
        Weighting,
        rule=st.sampled_from(["equal", "examples"]),
        min_owners=st.integers(1, 6),
        max_examples=st.integers(1, 10**9),
        staleness_discount=st.floats(0, 1),
    ),
)
def test_contributions_weigh_by_the_book(
    claims: list[tuple[str, int, int]], rule: Weighting
) -> None:
    assert round_weights(rule, [Claim(*claim) for claim in claims]) == shared_weights(claims, rule)


def test_the_worked_example_of_weights_is_right() -> None:
    rule = Weighting(rule="examples", min_owners=3)
    claims = [Claim(owner, n, 0) for owner, n in zip("abcd", (1000, 600, 400, 50), strict=True)]
    assert round_weights(rule, claims) == [450, 450, 400, 50]


def test_a_single_contribution_weighs_by_the_book() -> None:
    rule = Weighting(rule="examples", max_examples=1000, staleness_discount=0.5)
    assert contribution_weight(rule, 5000, 0) == 1000
    assert contribution_weight(rule, 333, 1) == 166
    assert contribution_weight(rule, 1, 2) == 1


def new_rows(matrix: np.ndarray, characters: str, byte_row: int) -> np.ndarray:
    rows = np.empty((len(characters), matrix.shape[1]), np.float32)
    for row, character in enumerate(characters):
        for column in range(matrix.shape[1]):
            total, spelling = 0.0, character.encode()
            for byte in spelling:
                total = total + float(matrix[byte_row + byte, column])
            rows[row, column] = np.float32(total / len(spelling))
    return rows


def test_the_vocabulary_grows_by_the_book() -> None:
    matrix = np.random.default_rng(3).standard_normal((262, 3)).astype(np.float32)
    grown = grow({"embedding": matrix}, ["embedding"], "é€", 4)["embedding"]
    assert np.array_equal(grown[-2:], new_rows(matrix, "é€", 4))


def test_a_round_of_another_hub_is_taken_by_the_book(tmp_path: Path) -> None:
    """Its growth comes before its step."""
    random = np.random.default_rng(4)
    matrix, theirs = (random.standard_normal((n, 3)).astype(np.float32) for n in (262, 264))
    longer = {"embedding": np.concatenate([matrix, new_rows(matrix, "é€", 4)])}
    encode_step(longer, {"embedding": theirs}, tmp_path)
    words = list(struct.unpack(f"<{longer['embedding'].size}I", flat(longer)))
    assert decode(tmp_path, words) == flat({"embedding": theirs})
    digest = weights_digest({"embedding": theirs})
    place = Location(ref="refs/moshi/update/1", commit="0" * 40, files=())
    record = Round(
        hub="0" * 16,
        round=1,
        previous="0" * 64,
        weights=digest,
        parameters=theirs.size,
        tokenizer="0" * 64,
        vocabulary_tensors=("embedding",),
        update=PublishedUpdate(kind="step", location=place, codec="topk"),
        strategy=Strategy(
            name="upstream", options={"hub": "1" * 16, "round": 7, "weights": digest}
        ),
        growth=Growth(characters="é€", byte_row=4),
        created="2026-01-01T00:00:00Z",
        software="test",
    )
    assert origin_of(record)
    assert flat(advance({"embedding": matrix}, record, tmp_path)) == flat({"embedding": theirs})


# Signed metadata.

FILES = ("manifest.json", "hub.toml", "tokenizer.json")


def canonical(value: Any) -> str:
    """TUF's canonical JSON."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        members = (f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    assert value is None or isinstance(value, bool | int)
    return json.dumps(value)


def is_signed(metadata: Any, root: Any, role: str) -> bool:
    """Whether enough keys of a role, as this root names them, have signed."""
    by_id = {entry["keyid"]: entry["sig"] for entry in metadata["signatures"]}
    wanted = root["signed"]["roles"][role]
    valid = 0
    for keyid in set(wanted["keyids"]) & set(by_id):
        key = root["signed"]["keys"][keyid]
        assert (key["keytype"], key["scheme"]) == ("ed25519", "ed25519")
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key["keyval"]["public"]))
        try:
            public.verify(bytes.fromhex(by_id[keyid]), canonical(metadata["signed"]).encode())
        except InvalidSignature:
            continue
        valid += 1
    return valid >= wanted["threshold"]


def matches(data: bytes, said: Any) -> bool:
    digest = hashlib.sha256(data).hexdigest()
    return (len(data), digest) == (said["length"], said["hashes"]["sha256"])


def last_root(files: dict[str, bytes], pinned: bytes) -> Any | None:
    """The root that counts, if each was signed by the one before and by itself."""
    root, version = json.loads(pinned), 1
    assert files["1.root.json"] == pinned
    while f"{version + 1}.root.json" in files:
        version += 1
        later = json.loads(files[f"{version}.root.json"])
        signed = is_signed(later, root, "root") and is_signed(later, later, "root")
        if not signed or later["signed"]["version"] != version:
            return None
        root = later
    return root


def holds(files: dict[str, bytes], root: Any, role: str) -> bool:
    """Whether a role's file is signed, has not expired, and names the file below as it is."""
    metadata = json.loads(files[f"{role}.json"])
    fresh = datetime.fromisoformat(metadata["signed"]["expires"]) > datetime.now(UTC)
    named = metadata["signed"].get("meta", {}).items()
    below = all(
        matches(files[name], said)
        and json.loads(files[name])["signed"]["version"] == said["version"]
        for name, said in named
    )
    return is_signed(metadata, root, role) and fresh and below


def verified(files: dict[str, bytes], pinned: bytes) -> bool:
    """The checks of a first contact, in the order of the text."""
    root = last_root(files, pinned)
    if root is None or not all(
        holds(files, root, role) for role in ("timestamp", "snapshot", "targets")
    ):
        return False
    targets = json.loads(files["targets.json"])["signed"]["targets"]
    assert set(targets) == set(FILES)
    return all(matches(files[name], targets[name]) for name in FILES)


def test_canonical_json_of_the_metadata_is_as_in_the_worked_example() -> None:
    assert canonical({"b": 1, "a": ["x\ny", True, None]}) == '{"a":["x\ny",true,null],"b":1}'


def test_signed_metadata_is_verified_by_the_book(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    pinned = hub.latest()["1.root.json"]
    bench = open_bench(hub.replica)
    for role in ("root", "online"):
        name = "timestamp" if role == "online" else role
        (old,) = bench.desk.root.get_delegated_role(name).keyids
        change_root(bench, replace(old, bench.desk.keys.create(role).public_key, role))
        bench = open_bench(hub.replica)
    files = hub.latest()
    assert {f"{version}.root.json" for version in (1, 2, 3)} < set(files)
    for version in (1, 2, 3):
        for keyid, key in json.loads(files[f"{version}.root.json"])["signed"]["keys"].items():
            named = {"keytype": "ed25519", "scheme": "ed25519", "keyval": key["keyval"]}
            assert hashlib.sha256(canonical(named).encode()).hexdigest() == keyid
    assert verified(files, pinned)
    for name in (*FILES, "2.root.json", "timestamp.json", "snapshot.json", "targets.json"):
        assert not verified({**files, name: files[name].replace(b"1", b"2", 1)}, pinned), name


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
