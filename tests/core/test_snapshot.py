"""Snapshots: weights and steps come back bit for bit, or not at all; and vocabularies grow."""

import io
import json
import re

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from moshi_fl import snapshot
from moshi_fl.errors import CorruptRecord
from moshi_fl.planes import LENGTHS, changed, decode_block, difference, encode_block
from moshi_fl.snapshot import decode_keyframe, decode_step, encode_keyframe, encode_step, grow
from moshi_fl.weights import count_parameters, open_weights, save_weights, weights_digest

patterns = st.integers(0, 2**32 - 1)
words = arrays(np.uint32, st.integers(0, 300), elements=patterns)


def model(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (384,), "empty": (0, 5), "scale": (), "weight": (96, 120)}
    return {
        name: np.asarray(rng.standard_normal(s) * scale, np.float32) for name, s in shapes.items()
    }


def round_trip(weights, folder):
    encode_keyframe(weights, folder)
    out = folder / "out.safetensors"
    decode_keyframe(folder, out, parameters=count_parameters(weights))
    return open_weights(out)


def refusal(folder, parameters=None):
    out = folder / "out.safetensors"
    parameters = count_parameters(model()) if parameters is None else parameters
    with pytest.raises(CorruptRecord) as raised:
        decode_keyframe(folder, out, parameters=parameters)
    assert not out.exists()
    assert not list(folder.glob(".tmp-*"))
    return str(raised.value)


@pytest.fixture
def keyframe(tmp_path):
    encode_keyframe(model(), tmp_path)
    return tmp_path


def test_a_keyframe_gives_back_every_bit(tmp_path):
    assert weights_digest(round_trip(model(), tmp_path)) == weights_digest(model())


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_a_keyframe_of_any_size_gives_back_every_bit(size, tmp_path):
    weights = {"w": model()["weight"].reshape(-1)[:size]}
    assert weights_digest(round_trip(weights, tmp_path)) == weights_digest(weights)


def test_a_keyframe_of_nothing_is_possible(tmp_path):
    assert round_trip({}, tmp_path) == {}


@settings(max_examples=200)
@given(old=words, seed=st.integers(0, 99))
def test_differences_lead_from_any_bits_to_any_bits(old, seed):
    new = np.random.default_rng(seed).integers(0, 2**32, len(old), np.uint32)
    assert np.array_equal(changed(old, difference(old, new)), new)


@settings(max_examples=200)
@given(block=words, zeros=st.sampled_from([0, 1, 3, 1000]))
def test_blocks_of_any_bits_come_back(block, zeros):
    sparse = np.where(np.arange(len(block)) % (zeros + 1), 0, block).astype(np.uint32)
    for each in (block, sparse):
        file = io.BytesIO(encode_block(each))
        assert np.array_equal(decode_block(file, len(each), "x"), each)
        assert not file.read()


@settings(max_examples=50, deadline=None)
@given(
    new=arrays(
        np.float32,
        array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    same=st.booleans(),
)
def test_a_step_leads_to_the_very_bits_of_the_new_weights(new, same, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    old = new.copy() if same else np.ones_like(new)
    encode_step({"w": old}, {"w": new}, folder)
    assert weights_digest(decode_step({"w": old}, folder)) == weights_digest({"w": new})


def test_a_step_of_few_changes_takes_few_bytes(tmp_path):
    old = {"w": np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)}
    new = {"w": old["w"].copy()}
    new["w"][::1000] += np.float32(1e-3)
    size = sum(file.bytes for file in encode_step(old, new, tmp_path))
    assert size < 6 * 1049  # bytes per changed weight, its place included
    assert weights_digest(decode_step(old, tmp_path)) == weights_digest(new)


def test_weights_of_a_normal_distribution_shrink_to_their_entropy(tmp_path):
    weights = {"w": np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)}
    size = sum(file.bytes for file in encode_keyframe(weights, tmp_path))
    # 24 bits of sign and mantissa are random, the exponent has 2.6 bits of entropy.
    assert size / (4 << 20) < (24 + 2.7) / 32


def test_files_are_cut_at_their_limit_and_between_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "BLOCK", 1000)
    monkeypatch.setattr(snapshot, "MAX_FILE_BYTES", 9000)
    files = encode_keyframe(model(), tmp_path)
    assert [file.name for file in files] == [
        *(f"weights-{number:03d}.zst" for number in range(len(files) - 1)),
        "index.json",
    ]
    assert len(files) > 4
    assert max(file.bytes for file in files) <= 9000
    assert {file.name: file.bytes for file in files} == {
        path.name: path.stat().st_size for path in tmp_path.iterdir()
    }
    out = tmp_path / "out.safetensors"
    decode_keyframe(tmp_path, out, parameters=count_parameters(model()))
    assert weights_digest(open_weights(out)) == weights_digest(model())
    (tmp_path / "weights-002.zst").unlink()
    out.unlink()
    assert refusal(tmp_path) == "weights-002.zst: missing."


def test_mapped_weights_and_weights_in_memory_give_the_same_files(tmp_path):
    save_weights(tmp_path / "w.safetensors", model())
    mapped = encode_keyframe(open_weights(tmp_path / "w.safetensors"), tmp_path / "a")
    assert mapped == encode_keyframe(dict(reversed(model().items())), tmp_path / "b")


def test_only_float32_weights_are_taken(tmp_path):
    with pytest.raises(TypeError, match="'w' is float64; weights are float32"):
        encode_keyframe({"w": np.ones(3)}, tmp_path)


def test_a_step_between_different_models_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="equal names and shapes"):
        encode_step(model(), {**model(), "more": np.zeros(3, np.float32)}, tmp_path)


def test_a_step_for_another_model_is_refused(tmp_path):
    encode_step(model(), model(1), tmp_path)
    other = {**model(), "bias": np.zeros(383, np.float32)}
    with pytest.raises(CorruptRecord, match="for a model of other tensors"):
        decode_step(other, tmp_path)


def test_a_keyframe_is_no_step_and_a_step_no_keyframe(tmp_path):
    encode_keyframe(model(), tmp_path)
    with pytest.raises(CorruptRecord, match="a keyframe where a step was expected"):
        decode_step(model(), tmp_path)
    encode_step(model(), model(1), tmp_path)
    assert refusal(tmp_path) == "index.json: a step where a keyframe was expected."


def test_an_index_that_promises_other_than_the_round_is_refused(keyframe):
    assert "the round has 12" in refusal(keyframe, parameters=12)


def test_an_index_of_a_million_million_weights_costs_nothing(keyframe):
    text = (keyframe / "index.json").read_text()
    huge = re.sub(r"\b120\b", str(1 << 40), text)
    (keyframe / "index.json").write_text(huge)
    assert "weights, the round has" in refusal(keyframe)
    # And a record that promises as much fares no better: blocks come one at a time.
    refusal(keyframe, 384 + 1 + 96 * (1 << 40))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format=2),
        lambda index: index.update(files=1001),
        lambda index: index.update(extra=1),
        lambda index: index["tensors"].reverse(),
        lambda index: index["tensors"].append(index["tensors"][-1]),
        lambda index: index["tensors"][0].update(shape=[-1]),
        lambda index: index["tensors"][0].update(shape=[1] * 9),
        lambda index: index["tensors"][0].update(name=""),
    ],
)
def test_a_bent_index_is_refused(keyframe, change):
    index = json.loads((keyframe / "index.json").read_text())
    change(index)
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (keyframe / "index.json").write_text(text)
    refusal(keyframe)


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert refusal(tmp_path) == "index.json: missing."


def test_an_endless_index_is_not_read(keyframe):
    (keyframe / "index.json").write_bytes(b" " * (1 << 21))
    assert "the limit for a record" in refusal(keyframe)


def test_a_truncated_file_is_refused_wherever_it_ends(keyframe):
    path = keyframe / "weights-000.zst"
    data = path.read_bytes()
    for end in (0, 1, 19, 20, 21, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        assert refusal(keyframe).endswith(("truncated.", "end before the last weight."))


def test_data_after_the_last_weight_is_refused(keyframe):
    path = keyframe / "weights-000.zst"
    path.write_bytes(path.read_bytes() + bytes(20))
    assert refusal(keyframe) == "weights-000.zst: data beyond the last weight."


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_refused_or_change_only_values(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    encode_keyframe(model(), folder)
    path = folder / "weights-000.zst"
    flipped = bytearray(path.read_bytes())
    flipped[data.draw(st.integers(0, 200) | st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    path.write_bytes(flipped)
    out = folder / "out.safetensors"
    try:
        decode_keyframe(folder, out, parameters=count_parameters(model()))
    except CorruptRecord:
        assert not out.exists()
    else:
        weights = open_weights(out)
        assert {name: array.shape for name, array in weights.items()} == {
            name: array.shape for name, array in model().items()
        }


def bomb(size, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(bytes(size))


def block_with_plane(plane, count):
    raw = bytes(count)
    return LENGTHS.pack(0, len(plane), count, count, count) + plane + raw * 3


@pytest.mark.parametrize(
    "plane",
    [
        bomb(1 << 28),
        bomb(1 << 26, write_content_size=False),
        zstandard.ZstdCompressor().compress(bytes(65_000)),
        zstandard.ZstdCompressor().compress(bytes(1 << 16)) + b"more",
        b"no zstd at all",
        b"",
    ],
    ids=["too large", "of unknown size", "too small", "trailing bytes", "garbage", "empty"],
)
def test_a_plane_that_does_not_expand_to_just_its_size_is_refused(plane):
    with pytest.raises(CorruptRecord):
        decode_block(io.BytesIO(block_with_plane(plane, 1 << 16)), 1 << 16, "x")


def test_a_frame_that_lies_about_its_size_is_stopped_there():
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(100_000)))
    size = zstandard.get_frame_parameters(bytes(frame)).content_size
    place = frame.index(size.to_bytes(4, "little"))
    frame[place : place + 4] = (50_000).to_bytes(4, "little")
    with pytest.raises(CorruptRecord):
        decode_block(io.BytesIO(block_with_plane(bytes(frame), 50_000)), 50_000, "x")


def test_lengths_beyond_a_plane_are_refused_before_they_are_read():
    for position in range(5):
        lengths = [0, 10, 10, 10, 10]
        lengths[position] = 2**32 - 1
        with pytest.raises(CorruptRecord, match="is the most"):
            decode_block(io.BytesIO(LENGTHS.pack(*lengths) + bytes(100)), 10, "x")


def byte_rows(columns):
    shape = (4 + 256, columns) if columns else (4 + 256,)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_new_character_starts_as_the_mean_of_its_bytes():
    weights = {"bias": byte_rows(0), "embedding": byte_rows(8), "other": np.ones(3, np.float32)}
    grown = grow(weights, ["embedding", "bias"], "é€", byte_row=4)
    assert grown["other"] is weights["other"]
    for name in ("embedding", "bias"):
        old, new = weights[name], grown[name]
        assert np.array_equal(new[:260], old)
        a, b = old[[4 + 0xC3, 4 + 0xA9]].astype(np.float64)
        assert np.array_equal(new[260], ((a + b) / 2).astype(np.float32))
        a, b, c = old[[4 + 0xE2, 4 + 0x82, 4 + 0xAC]].astype(np.float64)
        assert np.array_equal(new[261], ((a + b + c) / 3).astype(np.float32))
        assert new.dtype == np.float32
        assert len(new) == 262


def test_growing_at_once_or_one_by_one_is_the_same():
    weights = {"embedding": byte_rows(8)}
    twice = grow(grow(weights, ["embedding"], "é", 4), ["embedding"], "€", 4)
    assert weights_digest(twice) == weights_digest(grow(weights, ["embedding"], "é€", 4))


@pytest.mark.parametrize(
    ("tensors", "characters", "byte_row", "message"),
    [
        (["head"], "é", 4, "no tensor 'head'"),
        (["embedding"], "é", 5, "lacks rows for bytes"),
        (["embedding"], "é", -1, "lacks rows for bytes"),
        (["scalar"], "é", 0, "lacks rows for bytes"),
        (["embedding"], "\ud800", 4, "surrogates not allowed"),
    ],
)
def test_growth_that_cannot_be_is_refused(tensors, characters, byte_row, message):
    weights = {"embedding": byte_rows(8), "scalar": np.ones((), np.float32)}
    with pytest.raises(CorruptRecord, match=message):
        grow(weights, tensors, characters, byte_row)
