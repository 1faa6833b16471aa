"""Bytes from strangers, mutated from valid ones: only our own errors, and little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import MoshiError
from moshi_fl.hubfile import parse_hubfile
from moshi_fl.models import get_preset
from moshi_fl.records import Contribution, Manifest, Round, dump, load
from moshi_fl.snapshot import INDEX, decode_keyframe, encode_keyframe
from moshi_fl.weights import parse_header, serialize
from moshi_hub.create import Plan, render_hubfile

LIMIT = 4 << 20  # bytes a decoder may take for inputs of a few kilobytes
SHAPES = {"a": (64, 16), "b": (70,)}
WEIGHTS = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def a_round() -> Round:
    return Round(
        hub="0" * 16,
        round=0,
        previous=None,
        weights="1" * 64,
        parameters=7,
        tokenizer="2" * 64,
        created="2026-01-01T00:00:00Z",
        software="test",
    )


ROUND = dump(a_round())
MANIFEST = dump(Manifest(hub="0" * 16, rounds=(a_round(),)))
HUBFILE = render_hubfile(
    Plan(url="x", family="char", preset="tiny", name="x"), get_preset("char", "tiny")
)
SAFETENSORS = b"".join(serialize(WEIGHTS, {"x": "y"}))
SPECIAL = [
    *(b"9" * 5000, b"-1", b"1e999", b"NaN", b"nan", b"inf", b"null", b"true", b'"'),
    *(b"{" * 3000, b"[" * 3000, b"\\ud800", b"\xff", b"\0", b"../../x", b"\xe2\x80\xae"),
    *(b"18446744073709551616", b"9007199254740993", b"0.1", b"[]", b"{}", b"\n[hub]\n"),
]


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with a few parts cut out, doubled, exchanged or replaced."""
    data = valid
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "double", "flip", "special", "random", "end"]))
        part = {
            "cut": b"",
            "double": data[at:end] * 2,
            "flip": bytes(byte ^ draw(st.integers(1, 255)) for byte in data[at : at + 1]),
            "special": draw(st.sampled_from(SPECIAL)),
            "random": draw(st.binary(max_size=12)),
            "end": b"",
        }[kind]
        stop = {"end": len(data), "flip": min(len(data), at + 1)}.get(kind, end)
        data = data[:at] + part + data[stop:]
    return data


def survives(decode: Callable[[], object]) -> None:
    """It gives a result or one of our errors, and takes little memory for either."""
    tracemalloc.start()
    try:
        said = _said(decode)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LIMIT
    assert len(said) < 2000


def _said(decode: Callable[[], object]) -> str:
    try:
        decode()
    except MoshiError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [Round, Contribution, Manifest])
@given(data=st.one_of(mutated(ROUND), mutated(MANIFEST)))
def test_a_record_is_a_record_or_refused(kind, data: bytes) -> None:
    survives(lambda: load(data, kind, name="record"))


def test_a_long_unknown_key_is_not_repeated_in_full() -> None:
    data = b'{"' + b"9" * 100_000 + b'": 1}'
    survives(lambda: load(data, Round, name="record"))


@given(data=mutated(ROUND))
def test_what_is_accepted_is_spelled_in_one_way(data: bytes) -> None:
    try:
        record = load(data, Round, name="record")
    except MoshiError:
        return
    assert dump(record) == data


@given(data=mutated(SAFETENSORS), size=st.integers(0, 1 << 62))
def test_a_header_is_read_or_refused(data: bytes, size: int) -> None:
    survives(lambda: parse_header(data, len(data), name="file"))
    survives(lambda: parse_header(data, size, name="file"))


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "topk"])
@given(choice=st.data())
def test_a_delta_is_read_or_refused(codec: str, choice: st.DataObject) -> None:
    chosen = get_codec(codec, {})
    valid = delta_bytes(encode_delta(WEIGHTS, chosen, None)[0], chosen)
    data = choice.draw(mutated(valid))
    survives(lambda: Delta.parse(data, SHAPES, chosen, "delta").norm())


@given(data=mutated(HUBFILE.encode()))
def test_a_hub_file_is_read_or_refused(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    survives(lambda: parse_hubfile(text))


@pytest.mark.parametrize("line", ["max_norm = nan", "max_norm = inf", "max_norm = 1e999"])
def test_a_limit_that_limits_nothing_is_refused(line: str) -> None:
    assert "max_norm" in HUBFILE or "[delta]" in HUBFILE
    text = "\n".join(
        kept for kept in HUBFILE.splitlines() if not kept.lstrip().startswith("max_norm")
    ).replace("[delta]", f"[delta]\n{line}")
    with pytest.raises(MoshiError, match="max_norm"):
        parse_hubfile(text)


@given(choice=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_keyframe_is_read_or_refused(tmp_path: Path, choice: st.DataObject) -> None:
    folder = tmp_path / "keyframe"
    encode_keyframe(WEIGHTS, folder)
    total = sum(array.size for array in WEIGHTS.values())
    file = choice.draw(st.sampled_from([INDEX, "weights-000.zst"]))
    (folder / file).write_bytes(choice.draw(mutated((folder / file).read_bytes())))
    survives(lambda: decode_keyframe(folder, tmp_path / "out", parameters=total))
    out = tmp_path / "out"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    out.unlink(missing_ok=True)
