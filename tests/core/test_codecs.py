"""Codecs: what they keep, what they cost, and that a delta has one spelling."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from moshi_fl.codec import CODECS, get_codec
from moshi_fl.errors import ConfigError
from moshi_fl.weights import DTYPES

SMALL_TOPK = {"chunk": 16, "keep": 3}
FLAVOURS = [(name, {}) for name in CODECS] + [
    ("topk", SMALL_TOPK),
    ("topk", {"chunk": 7, "keep": 7}),
    ("topk", {"chunk": 100, "keep": 1}),
    ("topk", {"chunk": 1, "keep": 1}),
]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
tensors = arrays(np.float32, shapes, elements=finite)
every_codec = pytest.mark.parametrize(("name", "options"), FLAVOURS)


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@every_codec
@settings(max_examples=60, deadline=None)
@given(delta=tensors)
@example(delta=np.float32(-0.0).reshape(()))
@example(delta=np.zeros((0, 5), np.float32))
@example(delta=np.zeros((5, 0), np.float32))
@example(delta=np.full(33, np.finfo(np.float32).max, np.float32))
@example(delta=np.full(33, -np.finfo(np.float32).smallest_subnormal, np.float32))
@example(delta=np.full((3, 11), np.finfo(np.float32).tiny, np.float32))
def test_every_finite_tensor_has_an_entry_of_the_promised_layout(name, options, delta):
    codec = get_codec(name, options)
    entry = codec.encode(delta)
    dtype, shape = codec.layout(delta.shape)
    assert (entry.dtype, entry.shape) == (DTYPES[dtype], shape)
    assert codec.check(entry, delta.shape) == ""
    decoded = codec.decode(entry, delta.shape)
    assert decoded.dtype == np.float32
    assert decoded.shape == delta.shape
    assert np.isfinite(decoded).all()


@every_codec
@settings(max_examples=60, deadline=None)
@given(delta=tensors, data=st.data(), weight=st.integers(1, 2**53 - 1))
def test_adding_a_range_is_exactly_adding_what_decode_gives(name, options, delta, data, weight):
    codec = get_codec(name, options)
    entry = codec.encode(delta)
    start = data.draw(st.integers(0, delta.size))
    stop = data.draw(st.integers(start, delta.size))
    total = np.linspace(-3, 5, stop - start)
    expected = total.copy()
    expected += weight * codec.decode(entry, delta.shape).reshape(-1)[start:stop].astype(np.float64)
    codec.add(entry, delta.shape, start, total, float(weight))
    assert same_bits(total, expected)


@given(delta=tensors)
def test_f32_keeps_every_bit(delta):
    codec = get_codec("f32", {})
    assert same_bits(codec.decode(codec.encode(delta), delta.shape), delta)


@given(delta=tensors)
def test_f16_rounds_to_the_nearest_and_clips_at_the_ends(delta):
    codec = get_codec("f16", {})
    decoded = codec.decode(codec.encode(delta), delta.shape)
    clipped = np.clip(delta.astype(np.float64), -65504, 65504)
    spacing = np.maximum(np.abs(clipped) * 2.0**-11, 2.0**-25)
    assert (np.abs(decoded - clipped) <= spacing).all()


@given(delta=arrays(np.float32, array_shapes(min_dims=1, max_dims=2), elements=finite))
def test_int8_is_within_half_a_step_of_each_row(delta):
    codec = get_codec("int8", {})
    decoded = codec.decode(codec.encode(delta), delta.shape).astype(np.float64)
    rows = delta.reshape(codec.layout(delta.shape)[1][0], -1).astype(np.float64)
    step = np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0) / 127, 2.0**-126)
    # Scale and product are float32, each rounded by at most 2^-24 of a value of at most 127 steps.
    error = np.abs(decoded.reshape(rows.shape) - rows)
    assert (error <= (0.5 + 3 * 127 * 2.0**-24) * step + 127 * 2.0**-126).all()


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 384, 4095, 4096, 4097, 3 * 4096 + 100])
def test_topk_keeps_the_largest_of_each_chunk(size):
    codec, delta = get_codec("topk", {}), gaussian(size)
    decoded = codec.decode(codec.encode(delta), (size,))
    for start in range(0, size, 4096):
        chunk, kept = delta[start : start + 4096], decoded[start : start + 4096] != 0
        assert np.count_nonzero(kept) == min(64, len(chunk))
        assert np.abs(chunk[kept]).min() >= np.abs(chunk[~kept]).max(initial=0)
        assert (np.sign(chunk[kept]) == np.sign(decoded[start : start + 4096][kept])).all()


def test_topk_takes_84_bytes_for_64_of_4096_and_less_for_a_short_tensor():
    codec = get_codec("topk", {})
    assert codec.layout((4096,)) == ("U8", (84,))
    assert codec.layout((100, 4096)) == ("U8", (8400,))
    assert codec.layout((384,)) == ("U8", (56,))
    assert codec.layout((4096 + 384,)) == ("U8", (84 + 56,))
    assert codec.layout(()) == ("U8", (5,))
    assert codec.layout((0, 7)) == ("U8", (0,))


def test_topk_gives_ties_to_the_lower_positions():
    codec = get_codec("topk", SMALL_TOPK)
    decoded = codec.decode(codec.encode(np.full(16, -2.0, np.float32)), (16,))
    assert decoded.tolist() == [-2.0] * 3 + [0.0] * 13


def test_topk_of_fewer_values_than_it_keeps_invents_none():
    codec, delta = get_codec("topk", SMALL_TOPK), np.zeros(32, np.float32)
    delta[[9, 30]] = [0.5, -4.0]
    assert (codec.decode(codec.encode(delta), (32,)) == delta).all()


def test_topk_levels_are_the_best_two_of_all_possible():
    codec = get_codec("topk", {"chunk": 24, "keep": 9})
    for seed in range(50):
        delta = np.random.default_rng(seed).standard_t(2, 24).astype(np.float32)
        decoded = codec.decode(codec.encode(delta), (24,))
        kept = np.sort(np.abs(delta[decoded != 0])).astype(np.float64)
        errors = [
            ((kept[:split] - kept[:split].mean()) ** 2).sum()
            + ((kept[split:] - kept[split:].mean()) ** 2).sum()
            for split in range(1, 9)
        ]
        error = ((delta - decoded)[decoded != 0].astype(np.float64) ** 2).sum()
        # Rounding a level to bfloat16 moves it by at most 2^-8 of itself.
        assert error <= min(errors) + (2.0**-8) ** 2 * (kept**2).sum() * 1.01


@settings(max_examples=300, deadline=None)
@given(
    delta=arrays(np.float32, st.integers(0, 40), elements=finite),
    options=st.sampled_from([SMALL_TOPK, {"chunk": 7, "keep": 7}, {"chunk": 100, "keep": 6}, {}]),
)
def test_what_topk_decoded_has_no_other_spelling(delta, options):
    codec = get_codec("topk", options)
    entry = codec.encode(delta)
    assert same_bits(codec.encode(codec.decode(entry, delta.shape)), entry)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_a_changed_topk_entry_is_refused_or_is_the_only_spelling_of_another_delta(seed, data):
    codec = get_codec("topk", SMALL_TOPK)
    delta = gaussian(37, seed)
    delta[: data.draw(st.integers(0, 37))] = 0
    entry = codec.encode(delta)
    for byte in data.draw(st.lists(st.integers(0, len(entry) - 1), min_size=1, max_size=2)):
        entry[byte] ^= 1 << data.draw(st.integers(0, 7))
    if codec.check(entry, (37,)) == "":
        decoded = codec.decode(entry, (37,))
        assert np.isfinite(decoded).all()
        # Other levels may change which the best clusters are, but not the delta they describe.
        again = codec.encode(decoded)
        assert same_bits(codec.decode(again, (37,)), decoded)
        assert same_bits(again, entry)


def bits_of(entry):
    return np.unpackbits(entry[4:], bitorder="little")


def with_bits(entry, bits):
    return np.concatenate([entry[:4], np.packbits(bits, bitorder="little")])


def with_levels(entry, low, high):
    return np.concatenate([np.array([low, high], "<u2").view(np.uint8), entry[4:]])


def test_topk_refuses_every_bent_rule_by_name():
    # Chunk of 16 keeping 4: width 2, so 8 low bits, 4 + 3 unary bits, 4 signs, 4 choices, 1 spare.
    codec = get_codec("topk", {"chunk": 16, "keep": 4})
    delta = np.zeros(16, np.float32)
    delta[[2, 3, 9, 14]] = [1, -2, 4, 4]
    good = codec.encode(delta)
    bits = bits_of(good)

    def reason(entry):
        return codec.check(entry, (16,))

    def flipped(*places):
        changed = bits.copy()
        changed[list(places)] ^= 1
        return with_bits(good, changed)

    low, high = good[:4].view("<u2")
    assert reason(good) == ""
    assert reason(flipped(23)) == "has padding bits that are not zero"
    assert reason(flipped(8)) == "has a chunk with the wrong number of positions"
    assert reason(flipped(0, 2)) == "has positions that are out of order or out of range"
    assert reason(flipped(0)) == "has positions that are out of order or out of range"
    for wrong in (0xFF80, 0x7F80, 0x7FC0, 0x8000 | high):
        assert reason(with_levels(good, low, wrong)) == "has a level that is negative or not finite"
    assert reason(with_levels(good, 0x0001, high)) == (
        "has a level below the smallest normal number"
    )
    assert reason(with_levels(good, high, low)) == "has levels that are not in order"
    assert reason(with_levels(good, high, high)) == "has levels that are not in order"
    all_low, all_high = bits.copy(), bits.copy()
    all_low[19:23], all_high[19:23] = 0, 1
    assert reason(with_bits(good, all_low)) == "has a level that no value uses"
    assert reason(with_bits(good, all_high)) == "has a level that no value uses"
    assert reason(with_levels(good, 0, high)) == "has a zero with a sign or at the high level"
    assert (
        reason(with_levels(flipped(16), 0, high))
        == "has zeros that are not at the lowest positions"
    )


@pytest.mark.parametrize(
    ("scale", "values", "reason"),
    [
        (np.nan, [127, 0], "has a row whose scale is out of range"),
        (np.inf, [127, 0], "has a row whose scale is out of range"),
        (-1.0, [127, 0], "has a row whose scale is out of range"),
        (-0.0, [0, 0], "has a row whose scale is out of range"),
        (1e-40, [127, 0], "has a row whose scale is out of range"),
        (2.68e36, [127, 0], "has a row whose scale is out of range"),
        (1.0, [126, 0], "has a row that does not use its scale"),
        (1.0, [-128, 0], "has a row that does not use its scale"),
        (0.0, [127, 0], "has a row that does not use its scale"),
        (1.0, [0, 0], "has a row that does not use its scale"),
        (1.0, [-127, 5], ""),
        (0.0, [0, 0], ""),
    ],
)
def test_int8_refuses_scales_and_values_that_it_would_not_make(scale, values, reason):
    row = np.concatenate(
        [np.array([scale], "<f4").view(np.uint8), np.array(values, np.int8).view(np.uint8)]
    )
    assert get_codec("int8", {}).check(row[None], (2,)) == reason


@pytest.mark.parametrize("name", ["f32", "f16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_dense_codecs_refuse_what_is_not_finite(name, bad):
    codec = get_codec(name, {})
    entry = codec.encode(gaussian((4, 4)))
    entry[2, 3] = bad
    assert codec.check(entry, (4, 4)) == "holds a value that is not finite"


@every_codec
def test_rows_appended_to_the_vocabulary_leave_a_flat_prefix(name, options):
    codec, older = get_codec(name, options), gaussian((5, 24))
    total = np.zeros(7 * 24)
    codec.add(codec.encode(older), older.shape, 0, total[: older.size], 1.0)
    decoded = codec.decode(codec.encode(older), older.shape)
    assert (total[: older.size] == decoded.reshape(-1)).all()
    assert not total[older.size :].any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zip", {}, "unknown codec 'zip'; known: f32, f16, int8, topk."),
        ("f32", {"keep": 3}, "codec f32: unknown option 'keep'; it takes: none."),
        ("topk", {"kep": 3}, "codec topk: unknown option 'kep'; it takes: chunk, keep."),
        ("topk", {"keep": 0}, "codec topk: keep must be 1 to 4096, not 0."),
        ("topk", {"keep": 4097}, "codec topk: keep must be 1 to 4096, not 4097."),
        ("topk", {"keep": True}, "codec topk: keep must be 1 to 4096, not True."),
        ("topk", {"keep": 2.0}, "codec topk: keep must be 1 to 4096, not 2.0."),
        ("topk", {"chunk": "big"}, "codec topk: chunk must be 1 to 1048576, not 'big'."),
        ("topk", {"chunk": 1 << 21}, "codec topk: chunk must be 1 to 1048576, not 2097152."),
    ],
)
def test_unknown_codecs_options_and_values_are_named(name, options, message):
    with pytest.raises(ConfigError) as raised:
        get_codec(name, options)
    assert str(raised.value) == message


def test_sizes_at_one_matrix_of_the_base_model():
    shape = (1024, 384)
    sizes = {
        name: math.prod(layout[1]) * DTYPES[layout[0]].itemsize
        for name in CODECS
        if (layout := get_codec(name, {}).layout(shape))
    }
    assert sizes == {"f32": 1572864, "f16": 786432, "int8": 397312, "topk": 96 * 84}
