"""Delta files: error feedback, one spelling per delta, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_fl.codec import CODECS, get_codec
from moshi_fl.codec.delta import Delta, DeltaProblem, delta_bytes, encode_delta, max_delta_bytes
from moshi_fl.errors import CorruptRecord, TrainingError
from moshi_fl.weights import header_bytes, serialize, tensors_in

SHAPES = {"bias": (384,), "embedding": (40, 96), "scalar": (), "weight": (96, 120)}
every_codec = pytest.mark.parametrize("name", CODECS)


def gaussian_delta(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) * 1e-3 for name, s in shapes.items()}


def file_of(delta, codec):
    return delta_bytes(encode_delta(delta, codec)[0], codec)


def problem(data, codec_name="f32", shapes=SHAPES):
    with pytest.raises(DeltaProblem) as raised:
        Delta.parse(data, shapes, get_codec(codec_name, {}), "delta.safetensors")
    assert str(raised.value).startswith("delta.safetensors: ")
    return raised.value.code


@every_codec
def test_a_delta_file_comes_back_as_what_the_codec_kept(name):
    codec, delta = get_codec(name, {}), gaussian_delta()
    entries, _ = encode_delta(delta, codec)
    parsed = Delta.parse(delta_bytes(entries, codec), SHAPES, codec, "delta")
    assert parsed.names == tuple(sorted(SHAPES))
    for tensor, shape in SHAPES.items():
        assert np.array_equal(parsed.decode(tensor), codec.decode(entries[tensor], shape))


@every_codec
def test_what_is_held_back_now_is_sent_later(name):
    codec, carry = get_codec(name, {}), {}
    wanted = {tensor: np.zeros(shape) for tensor, shape in SHAPES.items()}
    sent = {tensor: np.zeros(shape) for tensor, shape in SHAPES.items()}
    for seed in range(30):
        delta = gaussian_delta(seed)
        entries, carry = encode_delta(delta, codec, carry)
        for tensor, shape in SHAPES.items():
            wanted[tensor] += delta[tensor]
            if tensor in entries:
                sent[tensor] += codec.decode(entries[tensor], shape)
    for tensor, shape in SHAPES.items():
        rest = carry.get(tensor, np.zeros(shape))
        # 30 float32 additions to a carry of at most a few hundredths.
        assert np.abs(wanted[tensor] - sent[tensor] - rest).max() < 30 * 0.1 * 2.0**-24


def test_a_carry_that_is_sent_on_and_on_is_used_up():
    codec = get_codec("topk", {})
    _, carry = encode_delta({"weight": gaussian_delta()["weight"]}, codec)
    start = np.linalg.norm(carry["weight"])
    for _ in range(400):
        _, carry = encode_delta({}, codec, carry)
    assert np.linalg.norm(carry["weight"]) < 0.02 * start


def test_f32_leaves_no_carry():
    assert encode_delta(gaussian_delta(), get_codec("f32", {}))[1] == {}


@every_codec
def test_only_changed_tensors_travel(name):
    codec = get_codec(name, {})
    delta = gaussian_delta() | {"embedding": np.zeros((40, 96), np.float32)}
    entries, carry = encode_delta(delta, codec)
    assert sorted(entries) == ["bias", "scalar", "weight"]
    assert "embedding" not in carry
    entries, _ = encode_delta(delta, codec, {"embedding": gaussian_delta()["embedding"]})
    assert "embedding" in entries


def test_a_tensor_too_small_for_the_codec_waits_in_the_carry():
    codec, tiny = get_codec("f16", {}), {"bias": np.full(384, 1e-9, np.float32)}
    entries, carry = encode_delta(tiny, codec)
    assert entries == {}
    assert np.array_equal(carry["bias"], tiny["bias"])


def test_a_carry_from_before_a_growth_continues_in_the_first_rows():
    codec = get_codec("f32", {})
    old = {"embedding": np.ones((38, 96), np.float32)}
    entries, _ = encode_delta({"embedding": np.ones((40, 96), np.float32)}, codec, old)
    assert entries["embedding"][:, 0].tolist() == [2.0] * 38 + [1.0] * 2


def test_a_carry_of_another_model_is_refused():
    with pytest.raises(CorruptRecord, match=r"'bias' has shape \(385,\), the model \(384,\)"):
        encode_delta(gaussian_delta(), get_codec("topk", {}), {"bias": np.ones(385, np.float32)})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_training_that_blew_up_sends_nothing(bad):
    delta = gaussian_delta()
    delta["weight"][3, 4] = bad
    with pytest.raises(TrainingError, match="'weight' holds a value that is not finite"):
        encode_delta(delta, get_codec("topk", {}))


def test_encoding_changes_neither_the_delta_nor_the_old_carry():
    delta, carry = gaussian_delta(), gaussian_delta(1)
    before = {**delta, **{f"carry {name}": array for name, array in carry.items()}}
    before = {name: array.tobytes() for name, array in before.items()}
    encode_delta(delta, get_codec("int8", {}), carry)
    after = {**delta, **{f"carry {name}": array for name, array in carry.items()}}
    assert before == {name: array.tobytes() for name, array in after.items()}


@every_codec
def test_no_delta_is_larger_than_announced(name):
    codec = get_codec(name, {})
    assert len(file_of(gaussian_delta(), codec)) == max_delta_bytes(SHAPES, codec)
    partial = {"weight": gaussian_delta()["weight"]}
    assert len(file_of(partial, codec)) < max_delta_bytes(SHAPES, codec)


@every_codec
def test_equal_deltas_are_equal_bytes_whatever_the_order_of_their_tensors(name):
    codec, delta = get_codec(name, {}), gaussian_delta()
    assert file_of(delta, codec) == file_of(dict(reversed(delta.items())), codec)


@every_codec
def test_the_norm_is_that_of_all_tensors_together(name):
    codec = get_codec(name, {})
    parsed = Delta.parse(file_of(gaussian_delta(), codec), SHAPES, codec, "delta")
    flat = np.concatenate([parsed.decode(tensor).reshape(-1) for tensor in parsed.names])
    assert parsed.norm() == pytest.approx(np.linalg.norm(flat.astype(np.float64)), rel=1e-12)
    assert not parsed.is_zero


def test_a_delta_of_zeros_is_seen_as_such():
    codec = get_codec("f32", {})
    data = delta_bytes({"bias": np.zeros(384, np.float32)}, codec)
    assert Delta.parse(data, SHAPES, codec, "delta").is_zero


def test_the_smallest_delta_is_not_zero():
    codec = get_codec("f32", {})
    data = delta_bytes({"scalar": np.array(1e-45, np.float32)}, codec)
    assert not Delta.parse(data, SHAPES, codec, "delta").is_zero


@every_codec
def test_a_mapped_file_reads_the_same_after_its_pages_were_released(name, tmp_path):
    codec = get_codec(name, {})
    path = tmp_path / "delta.safetensors"
    path.write_bytes(file_of(gaussian_delta(), codec))
    opened = Delta.open(path, SHAPES, codec)
    before = [opened.decode(tensor) for tensor in opened.names]
    opened.release()
    for tensor, array in zip(opened.names, before, strict=True):
        assert np.array_equal(opened.decode(tensor), array)


def test_what_is_not_there_adds_nothing():
    codec = get_codec("f32", {})
    older = {"embedding": np.ones((38, 96), np.float32)}
    parsed = Delta.parse(delta_bytes(older, codec), {"embedding": (38, 96)}, codec, "delta")
    total = np.zeros(5 * 96)
    parsed.add("embedding", 36 * 96, total, 2.0)
    assert total.reshape(5, 96)[:, 0].tolist() == [2.0, 2.0, 0.0, 0.0, 0.0]
    parsed.add("embedding", 40 * 96, total, 2.0)
    parsed.add("weight", 0, total, 2.0)
    assert total.sum() == 2 * 2 * 96


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    good = file_of(gaussian_delta(), get_codec("f32", {}))
    assert problem(b"") == "not-safetensors"
    assert problem(b"\x00" * 100) == "not-safetensors"
    assert problem(good[:-1]) == "not-safetensors"
    assert problem(good[:100]) == "not-safetensors"
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(DeltaProblem) as raised:
        Delta.open(empty, SHAPES, get_codec("f32", {}))
    assert raised.value.code == "not-safetensors"


def test_a_file_larger_than_any_delta_is_refused_before_it_is_parsed():
    assert (
        problem(b"x" * (max_delta_bytes(SHAPES, get_codec("topk", {})) + 1), "topk") == "oversize"
    )


def test_a_file_of_no_tensors_is_refused():
    assert problem(delta_bytes({}, get_codec("f32", {}))) == "empty"


def test_a_tensor_that_the_base_lacks_is_refused():
    codec = get_codec("f32", {})
    assert problem(delta_bytes({"extra": np.ones(3, np.float32)}, codec)) == "unknown-tensor"


@pytest.mark.parametrize(
    "entry",
    [np.ones(383, np.float32), np.ones((384, 1), np.float32), np.ones(384, np.float16)],
    ids=["short", "other shape", "other dtype"],
)
def test_an_entry_of_another_layout_is_refused(entry):
    codec = get_codec("f32", {})
    assert problem(delta_bytes({"bias": entry}, codec)) == "wrong-layout"


def test_another_codecs_file_is_refused_even_when_the_layout_would_fit():
    entries = {"scalar": get_codec("topk", {}).encode(np.ones((), np.float32))}
    assert problem(delta_bytes(entries, get_codec("int8", {})), "topk") == "wrong-layout"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"codec": "f32"},
        {"codec": "f32", "format": "moshi-fl-delta-2"},
        {"codec": "f32", "format": "moshi-fl-delta-1", "note": "hello"},
    ],
)
def test_metadata_that_says_anything_else_is_refused(metadata):
    data = b"".join(serialize({"scalar": np.array(1, np.float32)}, metadata))
    assert problem(data) == "wrong-layout"


def test_the_same_header_in_another_spelling_is_refused():
    good = file_of({"scalar": np.array(1, np.float32)}, get_codec("f32", {}))
    length = int.from_bytes(good[:8], "little")
    table = json.dumps(json.loads(good[8 : 8 + length])).encode()  # with spaces
    table += b" " * (-len(table) % 8)
    other = len(table).to_bytes(8, "little") + table + good[8 + length :]
    assert tensors_in(other, name="other")["scalar"] == 1
    assert problem(other) == "wrong-layout"


def test_values_that_the_codec_would_not_make_are_refused():
    codec = get_codec("topk", {})
    data = bytearray(file_of({"weight": gaussian_delta()["weight"]}, codec))
    data[-1] |= 0x80  # the padding of the last chunk
    assert problem(bytes(data), "topk") == "bad-values"
    nan = delta_bytes({"scalar": np.array(np.nan, np.float32)}, get_codec("f32", {}))
    assert problem(nan) == "bad-values"


@every_codec
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_with_a_code_and_never_with_a_crash(name, data):
    codec = get_codec(name, {})
    shapes = {"a": (5,), "b": (3, 7)}
    file = bytearray(file_of(gaussian_delta(3, shapes), codec))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), min_size=1, max_size=4)):
        file[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(file)) | st.just(len(file)))
    code, parsed = "", None
    try:
        parsed = Delta.parse(bytes(file[:end]), shapes, codec, "delta")
    except DeltaProblem as refused:
        code = refused.code
    if parsed:
        assert all(np.isfinite(parsed.decode(tensor)).all() for tensor in parsed.names)
        assert np.isfinite(parsed.norm())
    else:
        assert code in {"not-safetensors", "unknown-tensor", "wrong-layout", "bad-values"}


def test_the_header_alone_can_be_written_without_the_tensors():
    delta = gaussian_delta()
    whole = b"".join(serialize(delta))
    entries = {name: ("F32", shape) for name, shape in SHAPES.items()}
    assert whole.startswith(header_bytes(entries))


def test_a_header_longer_than_the_model_can_have_is_not_even_parsed() -> None:
    codec = get_codec("f32", {})
    header = b"[" + b"[]," * 2000 + b"0]"
    data = len(header).to_bytes(8, "little") + header
    shapes = {"a": (4096,)}
    with pytest.raises(DeltaProblem, match="its header has more than") as caught:
        Delta.parse(data, shapes, codec, "delta")
    assert caught.value.code == "not-safetensors"
