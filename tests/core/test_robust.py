"""Robust strategies: what byzfl computes, what an attacker cannot do, and exact inner products."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moshi_fl.aggregate import Update, get_strategy
from moshi_fl.aggregate import gram as gramming
from moshi_fl.aggregate import robust as pipeline
from moshi_fl.aggregate.gram import gram, norms
from moshi_fl.aggregate.robust import next_running_norm
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import ConfigError, MoshiError
from tests.support.byzfl import byzfl

SHAPES = {"a": (31, 3), "b": (107,)}
SIZE = 200
ALL = ["fedavg", "median", "trimmed-mean", "geometric-median", "centered-clipping", "krum"]
ALL += ["multi-krum", "robust"]


def update(number, flat, codec_name="f32"):
    codec = get_codec(codec_name, {})
    split = np.asarray(flat, np.float32)
    tensors = {"a": split[:93].reshape(31, 3), "b": split[93:]}
    entries, _ = encode_delta(tensors, codec)
    delta = Delta.parse(delta_bytes(entries, codec), SHAPES, codec, "delta")
    return Update(f"{number:032x}", 1, delta)


def updates(rows):
    return [update(number, row) for number, row in enumerate(rows)]


def aggregated(name, rows, **options):
    step = dict(get_strategy(name, options).aggregate(updates(rows), SHAPES))
    return np.concatenate([step[tensor].reshape(-1) for tensor in sorted(step)])


def honest(count, seed=0, size=SIZE):
    """Updates that agree on a direction and differ by noise, some in a direction of their own."""
    random = np.random.default_rng(seed)
    common = random.standard_normal(size)
    rows = common + random.standard_normal((count, size))
    rows[: count // 3] += 0.5 * random.standard_normal(size)
    return (1e-2 * rows).astype(np.float32)


def attacked(kind, count=11, seed=0):
    """The same, of which a few are hostile."""
    rows = honest(count, seed)
    f = (count - 1) // 3
    mean, spread = rows[f:].mean(axis=0), rows[f:].std(axis=0)
    hostile = {
        "none": rows[:f],
        "sign flip": -3 * rows[:f],
        "scaled": 100 * rows[:f],
        "little is enough": np.tile(mean - 1.5 * spread, (f, 1)),
        "inner product": np.tile(-0.6 * mean, (f, 1)),
        "one value": np.where(np.arange(SIZE) == 5, 50.0, rows[:f]),
    }[kind]
    return np.concatenate([hostile, rows[f:]]).astype(np.float32)


KINDS = ["none", "sign flip", "scaled", "little is enough", "inner product", "one value"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def oracle(name, rows, module="aggregators", **options):
    return getattr(byzfl(module), name)(**options)(rows.astype(np.float64))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@every_kind
def test_median_and_trimmed_mean_are_byzfls(kind):
    rows = attacked(kind)
    assert_close(aggregated("median", rows), oracle("Median", rows))
    assert_close(aggregated("trimmed-mean", rows, trim=0.28), oracle("TrMean", rows, f=3))


@every_kind
@pytest.mark.parametrize(("iterations", "smoothing"), [(1, 0.1), (3, 0.1), (50, 1e-6)])
def test_the_geometric_median_is_byzfls(kind, iterations, smoothing):
    rows = attacked(kind)
    ours = aggregated("geometric-median", rows, iterations=iterations, smoothing=smoothing)
    assert_close(ours, oracle("GeometricMedian", rows, nu=smoothing, T=iterations))


@every_kind
@pytest.mark.parametrize(("radius", "iterations"), [(0.1, 1), (0.15, 5), (100.0, 2)])
def test_centered_clipping_is_byzfls(kind, radius, iterations):
    rows = attacked(kind)
    ours = aggregated("centered-clipping", rows, radius=radius, iterations=iterations)
    assert_close(ours, oracle("CenteredClipping", rows, tau=radius, L=iterations))


@every_kind
@pytest.mark.parametrize("f", [0, 1, 3, 5])
def test_krum_and_multi_krum_are_byzfls(kind, f):
    rows = attacked(kind)
    assert_close(aggregated("krum", rows, f=f), oracle("Krum", rows, f=f))
    assert_close(aggregated("multi-krum", rows, f=f), oracle("MultiKrum", rows, f=f))


@every_kind
@pytest.mark.parametrize("count", [4, 7, 11])
def test_robust_is_clipping_then_byzfls_mixing_and_trimmed_mean(kind, count):
    rows, f = attacked(kind, count), (count - 1) // 3
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    clipped = rows * np.minimum(1, np.median(lengths) / lengths)[:, None]
    mixed = oracle("NNM", clipped, "preaggregators", f=f)
    assert_close(aggregated("robust", rows), oracle("TrMean", mixed, f=f))


def test_two_updates_are_clipped_and_averaged():
    rows = honest(2)
    rows[1] *= 100
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    clipped = rows * np.minimum(1, lengths.mean() / lengths)[:, None]
    assert_close(aggregated("robust", rows), clipped.mean(axis=0))
    assert_close(aggregated("robust", rows[:1]), rows[0])


def test_a_round_that_grew_is_clipped_to_twice_the_running_norm():
    rows = honest(5)
    typical = float(np.median(np.linalg.norm(rows.astype(np.float64), axis=1)))
    free, held = aggregated("robust", rows), aggregated("robust", rows, running_norm=typical / 20)
    assert np.linalg.norm(held) <= typical / 10 < np.linalg.norm(free) * 0.2
    same = aggregated("robust", rows, running_norm=typical)
    assert free.tobytes() == same.tobytes()


def test_the_running_norm_follows_slowly_upwards():
    running = next_running_norm(1.0, 0.0)
    assert running == 1.0
    assert next_running_norm(1.5, running) == 0.8 * 1.0 + 0.2 * 1.5
    assert next_running_norm(1e9, running) == 0.8 + 0.2 * 2.0
    assert next_running_norm(0.0, running) == 0.8


# What an attacker cannot do.


@pytest.mark.parametrize("name", ALL[1:])
@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(7, 12),
    seed=st.integers(0, 50),
    size=st.sampled_from([10.0, 1e3, 1e6]),
    f=st.integers(1, 2),
)
def test_outliers_move_the_step_no_further_than_the_honest_spread(name, count, seed, size, f):
    if name == "trimmed-mean":
        f = min(f, int(0.2 * count))
    rows = honest(count, seed)
    attack = rows.copy()
    attack[-f:] = size * np.random.default_rng(seed).standard_normal(SIZE)
    options = {"trim": 0.2} if name == "trimmed-mean" else {}
    moved = aggregated(name, attack, **options) - rows[:-f].astype(np.float64).mean(axis=0)
    spread = max(
        float(np.linalg.norm(a.astype(np.float64) - b)) for a in rows[:-f] for b in rows[:-f]
    )
    assert np.linalg.norm(moved) <= spread


def test_robust_stays_with_the_honest_where_the_mean_is_turned_around():
    rows = attacked("sign flip", 10)
    mean = honest(10)[3:].astype(np.float64).mean(axis=0)
    ours, plain = aggregated("robust", rows), aggregated("fedavg", rows)
    assert np.dot(plain, mean) / np.linalg.norm(plain) / np.linalg.norm(mean) < 0.5
    assert np.dot(ours, mean) / np.linalg.norm(ours) / np.linalg.norm(mean) > 0.9


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None)
@given(power=st.integers(-20, 20), seed=st.integers(0, 50))
def test_a_step_scales_with_the_updates(name, power, seed):
    """By a power of two to the last bit; only the smoothing of the geometric median has a size."""
    rows, factor = honest(7, seed), 2.0**power
    options = {"smoothing": 1e-12} if name == "geometric-median" else {}
    whole, scaled = (aggregated(name, r, **options) for r in (rows, rows * np.float32(factor)))
    assert (whole * factor).tobytes() == scaled.tobytes()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(8)), seed=st.integers(0, 50))
def test_the_order_in_which_updates_are_given_does_not_matter(name, order, seed):
    some = updates(honest(8, seed))
    strategy = get_strategy(name, {})
    a = dict(strategy.aggregate(some, SHAPES))
    b = dict(strategy.aggregate([some[index] for index in order], SHAPES))
    assert all(a[tensor].tobytes() == b[tensor].tobytes() for tensor in SHAPES)


@pytest.mark.parametrize("name", ALL[3:])
def test_neither_blocks_nor_their_number_change_a_bit(name, monkeypatch):
    rows = attacked("scaled")
    before = aggregated(name, rows)
    monkeypatch.setattr(gramming, "MEMORY", 1)
    monkeypatch.setattr(gramming, "LONGEST", 16)
    monkeypatch.setattr(gramming, "ROOM", 2)
    monkeypatch.setattr(pipeline, "BLOCK", 8)
    monkeypatch.setattr(pipeline, "DECODED", 24)
    assert aggregated(name, rows).tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_of_equal_updates_the_lowest_id_is_chosen(name):
    rows = np.tile(honest(1), (5, 1))
    rows[3:] *= 2
    chosen = aggregated(name, rows, **({"keep": 1} if name == "multi-krum" else {}))
    assert chosen.tobytes() == rows[0].astype(np.float64).tobytes()


def test_mixing_prefers_the_lower_id_among_equally_far():
    distances = [[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 0.0, 2.0], [1.0, 0, 2, 0]]
    assert pipeline.outsiders(distances, 1) == [(3,), (2,), (3,), (2,)]
    assert pipeline.outsiders(distances, 2) == [(2, 3), (0, 2), (1, 3), (0, 2)]


# Exact inner products.


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_inner_products_are_those_of_the_rounded_values(rows):
    matrix = np.zeros((len(rows), SIZE), np.float32)
    matrix[:, 91:96] = rows
    assume((np.abs(matrix).max(axis=1) > 0).all())
    rounded = []
    for row in matrix.astype(np.float64).tolist():
        largest = max(map(abs, row))
        scale = 36 - math.frexp(largest)[1]
        assert 2**35 <= largest * 2.0**scale < 2**36
        rounded.append(
            [Fraction(round(value * 2.0**scale)) / Fraction(2) ** scale for value in row]
        )
    found = gram(updates(matrix))
    for i, a in enumerate(rounded):
        for j, b in enumerate(rounded):
            wanted = float(sum(x * y for x, y in zip(a, b, strict=True)))
            assert found.dots[i][j] == wanted


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "topk"])
def test_norms_and_cosines_are_the_usual_ones(codec):
    some = [update(number, row, codec) for number, row in enumerate(honest(5))]
    flat = np.array([[*u.delta.decode("a").flat, *u.delta.decode("b").flat] for u in some])
    wanted = np.linalg.norm(flat.astype(np.float64), axis=1)
    np.testing.assert_allclose(norms(some), wanted, rtol=1e-10)
    assert norms(some) == gram(some).norms
    cosine = float(flat[0].astype(np.float64) @ flat[1] / wanted[0] / wanted[1])
    assert gram(some).cosine(0, 1) == pytest.approx(cosine, abs=1e-10)


def test_long_rows_of_large_values_stay_exact():
    """Longer than a block, all values at the limit: no sum leaves the integers of float64."""
    codec, size = get_codec("f32", {}), 3 * gramming.LONGEST + 5
    largest = np.nextafter(np.float32(2), np.float32(0))
    delta = Delta.parse(
        delta_bytes({"w": np.full(size, largest)}, codec), {"w": (size,)}, codec, "delta"
    )
    found = gram([Update("a", 1, delta), Update("b", 1, delta)]).dots
    wanted = float(Fraction(float(largest)) ** 2 * size)
    assert found == [[wanted, wanted], [wanted, wanted]]


# Options.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("krum", {"f": -1}, "krum: f must be an integer from 0 to 1000000, not -1."),
        ("krum", {"f": 1.0}, "krum: f must be an integer from 0 to 1000000, not 1.0."),
        ("krum", {"keep": 2}, "krum: unknown option 'keep'; it takes: f."),
        (
            "multi-krum",
            {"keep": 0},
            "multi-krum: keep must be an integer from 1 to 1000000, not 0.",
        ),
        ("multi-krum", {"f": "2"}, "multi-krum: f must be an integer from 0 to 1000000, not '2'."),
        ("robust", {"f": True}, "robust: f must be an integer from 0 to 1000000, not True."),
        (
            "robust",
            {"running_norm": -1.0},
            "robust: running_norm must be from 0 to 1e+30, not -1.0.",
        ),
        (
            "geometric-median",
            {"iterations": 0},
            "geometric-median: iterations must be an integer from 1 to 10000, not 0.",
        ),
        (
            "geometric-median",
            {"smoothing": math.nan},
            "geometric-median: smoothing must be from 1e-12 to 1e+12, not nan.",
        ),
        (
            "centered-clipping",
            {"radius": 0.0},
            "centered-clipping: radius must be from 1e-12 to 1e+12, not 0.0.",
        ),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ConfigError) as raised:
        get_strategy(name, options)
    assert str(raised.value) == f"strategy {message}"


@pytest.mark.parametrize(("name", "least"), [("krum", 5), ("multi-krum", 5), ("robust", 7)])
def test_too_few_contributions_for_what_is_to_be_tolerated_are_said(name, least):
    assert aggregated(name, honest(least), f=2).any()
    with pytest.raises(MoshiError, match=f"f = 2 needs at least {least} contributions") as raised:
        aggregated(name, honest(least - 1), f=2)
    assert "min_contributions" in raised.value.hint
