"""Aggregation: the same bytes on every machine, and the mean that Flower computes."""

import hashlib
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_fl.aggregate import Update, apply_step, get_strategy
from moshi_fl.codec import CODECS, get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import ConfigError, MoshiError
from moshi_fl.weights import weights_digest

# The matrix is longer than a block of the aggregation, so that blocks have to fit together.
SHAPES = {"bias": (384,), "embedding": (40, 96), "scalar": (), "weight": (600, 120)}
STRATEGIES = [
    ("fedavg", {}),
    ("median", {}),
    ("trimmed-mean", {"trim": 0.2}),
    ("geometric-median", {}),
    ("centered-clipping", {}),
    ("krum", {}),
    ("multi-krum", {}),
    ("robust", {"running_norm": 0.1}),
]
every_strategy = pytest.mark.parametrize(("name", "options"), STRATEGIES)


def gaussian(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def delta_of(weights, codec_name="f32"):
    codec = get_codec(codec_name, {})
    shapes = {name: array.shape for name, array in weights.items()}
    return Delta.parse(delta_bytes(encode_delta(weights, codec)[0], codec), shapes, codec, "delta")


def updates(count, codec_name="f32"):
    return [
        Update(f"{hashlib.sha256(bytes([seed])).hexdigest()[:32]}", 3 * seed + 1, delta)
        for seed in range(count)
        if (delta := delta_of(gaussian(seed), codec_name))
    ]


def aggregated(name, options, given_updates, shapes=SHAPES):
    return dict(get_strategy(name, options).aggregate(given_updates, shapes))


def decoded(update, name):
    return update.delta.decode(name).astype(np.float64)


@pytest.mark.parametrize("codec_name", CODECS)
def test_equal_weights_average_alike_whatever_they_are(codec_name):
    ones, many = ([replace(u, weight=w) for u in updates(4, codec_name)] for w in (1, 4800))
    first, second = aggregated("fedavg", {}, ones), aggregated("fedavg", {}, many)
    assert all(first[name].tobytes() == second[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("codec_name", CODECS)
def test_fedavg_is_the_formula_in_float64_to_the_last_bit(codec_name):
    some = updates(7, codec_name)
    common = math.gcd(*(update.weight for update in some))
    step = aggregated("fedavg", {}, some)
    assert list(step) == sorted(SHAPES)
    for name, shape in SHAPES.items():
        total = np.zeros(shape)
        for update in sorted(some, key=lambda update: update.id):
            total = total + float(update.weight // common) * decoded(update, name)
        expected = total / float(sum(update.weight // common for update in some))
        assert step[name].shape == shape
        assert step[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_the_middle_of_each_weight(count):
    some = updates(count)
    step = aggregated("median", {}, some)
    for name in SHAPES:
        expected = np.median([decoded(update, name) for update in some], axis=0)
        np.testing.assert_allclose(step[name], expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("count", "trim", "drop"), [(5, 0.2, 1), (9, 0.2, 1), (10, 0.2, 2), (4, 0, 0)]
)
def test_trimmed_mean_leaves_out_both_ends(count, trim, drop):
    some = updates(count)
    step = aggregated("trimmed-mean", {"trim": trim}, some)
    for name in SHAPES:
        ordered = np.sort([decoded(update, name) for update in some], axis=0)
        expected = ordered[drop : count - drop].mean(axis=0)
        np.testing.assert_allclose(step[name], expected, rtol=1e-12, atol=1e-15)


def test_one_liar_moves_the_mean_but_not_the_median():
    honest = updates(6)
    liar = Update("f" * 32, 10**9, delta_of({"weight": np.full((600, 120), 1e6, np.float32)}))
    assert np.abs(aggregated("fedavg", {}, [*honest, liar])["weight"]).min() > 1e5
    for name, options in STRATEGIES[1:]:
        assert np.abs(aggregated(name, options, [*honest, liar])["weight"]).max() < 5


@every_strategy
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_in_which_updates_are_given_does_not_matter(name, options, order):
    some = updates(6, "topk")
    a = aggregated(name, options, some)
    b = aggregated(name, options, [some[index] for index in order])
    assert all(a[tensor].tobytes() == b[tensor].tobytes() for tensor in SHAPES)


@every_strategy
def test_a_delta_of_an_older_vocabulary_counts_as_zero_in_the_new_rows(name, options):
    older = {**gaussian(50), "embedding": gaussian(50)["embedding"][:38], "bias": np.ones(380)}
    older["bias"] = older["bias"].astype(np.float32)
    padded = {**older, "embedding": np.zeros((40, 96), np.float32), "bias": np.zeros(384)}
    padded["bias"] = padded["bias"].astype(np.float32)
    padded["embedding"][:38], padded["bias"][:380] = older["embedding"], older["bias"]
    some = updates(4)
    a = aggregated(name, options, [*some, Update("a", 5, delta_of(older))])
    b = aggregated(name, options, [*some, Update("a", 5, delta_of(padded))])
    assert all(a[tensor].tobytes() == b[tensor].tobytes() for tensor in SHAPES)


@every_strategy
def test_tensors_that_nobody_trained_stay_as_they_are(name, options):
    one = Update("a", 5, delta_of({"weight": gaussian(0)["weight"]}))
    two = Update(
        "b", 1, delta_of({"weight": gaussian(1)["weight"], "scalar": gaussian(1)["scalar"]})
    )
    step = aggregated(name, options, [one, two])
    assert list(step) == ["scalar", "weight"]
    base = {**gaussian(2), "bias": np.full(384, -0.0, np.float32)}
    new = apply_step(base, step.items())
    assert new["bias"] is base["bias"]
    assert sorted(new) == sorted(base)


@every_strategy
def test_the_sign_of_zero_does_not_depend_on_who_came_first(name, options):
    zeros = [
        Update(i, 1, delta_of({"bias": np.array([z, 1], np.float32)}))
        for i, z in (("a", 0.0), ("b", -0.0), ("c", -0.0), ("d", 0.0))
    ]
    for chosen in (zeros[:2], zeros[1:3], zeros[2:], zeros):
        step = aggregated(name, options, chosen, {"bias": (2,)})
        assert step["bias"][:1].tobytes() == np.zeros(1).tobytes()


def test_a_step_is_rounded_once():
    base = {"w": np.array([1.0, 1.0, -0.0], np.float32)}
    step = {"w": np.array([2.0**-24, 2.0**-24 + 2.0**-40, 0.0])}
    new = apply_step(base, step.items())["w"]
    assert new.tolist() == [1.0, 1.0 + 2.0**-23, 0.0]
    assert new.dtype == np.float32


@given(rate=st.floats(0.01, 3), seed=st.integers(0, 100))
def test_the_server_learning_rate_scales_the_step(rate, seed):
    base, step = gaussian(seed), {"weight": gaussian(seed + 1)["weight"].astype(np.float64)}
    new = apply_step(base, step.items(), rate)["weight"]
    expected = base["weight"].astype(np.float64) + step["weight"] * rate
    assert new.tobytes() == expected.astype(np.float32).tobytes()


def test_a_step_into_infinity_is_refused():
    base = {"w": np.full(3, 3e38, np.float32)}
    with pytest.raises(MoshiError, match="a weight of 'w' infinite") as raised:
        apply_step(base, {"w": np.full(3, 1e38)}.items())
    assert "server_learning_rate" in raised.value.hint


def test_weights_beyond_2_to_the_53_together_are_still_averaged():
    some = [Update(i, 2**53 - 1, delta_of({"scalar": np.array(2, np.float32)})) for i in "abc"]
    assert aggregated("fedavg", {}, some)["scalar"] == 2.0


def test_mistakes_of_the_caller_are_not_averaged():
    one = Update("a", 1, delta_of(gaussian(0)))
    with pytest.raises(MoshiError, match="no contributions"):
        aggregated("fedavg", {}, [])
    with pytest.raises(ValueError, match="appears twice"):
        aggregated("fedavg", {}, [one, one])
    with pytest.raises(ValueError, match="weight is not positive"):
        aggregated("fedavg", {}, [Update("b", 0, one.delta)])
    for shape in ((599, 120), (600, 119), (72000,)):
        with pytest.raises(ValueError, match="'weight' of shape"):
            aggregated("fedavg", {}, [one], {**SHAPES, "weight": shape})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {}, f"unknown strategy 'mean'; known: {', '.join(n for n, _ in STRATEGIES)}."),
        ("fedavg", {"x": 1}, "strategy fedavg: unknown option 'x'; it takes: none."),
        (
            "trimmed-mean",
            {"cut": 1},
            "strategy trimmed-mean: unknown option 'cut'; it takes: trim.",
        ),
        *(
            (
                "trimmed-mean",
                {"trim": trim},
                f"strategy trimmed-mean: trim must be from 0 to below 0.5, not {trim!r}.",
            )
            for trim in (0.5, -0.1, True, "0.1", float("nan"))
        ),
    ],
)
def test_unknown_strategies_options_and_values_are_named(name, options, message):
    with pytest.raises(ConfigError) as raised:
        get_strategy(name, options)
    assert str(raised.value) == message


DIGEST = """
import sys
sys.path.insert(0, "tests/core")
import test_aggregate as story
print(story.round_digest())
"""


def round_digest():
    digests = []
    for name, options in STRATEGIES:
        step = aggregated(name, options, [*updates(5, "topk"), *updates(9, "int8")[5:]])
        digests.append(weights_digest(apply_step(gaussian(99), step.items(), 0.7)))
    return " ".join(digests)


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512_ICL AVX512_SPR"},
    ],
    ids=["one thread", "four threads", "no AVX-512", "no AVX2"],
)
def test_neither_threads_nor_instruction_sets_change_a_bit(environment):
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIGEST],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == round_digest()


PEAK = """
import sys
from pathlib import Path
from moshi_fl.aggregate import Update, get_strategy
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) << 10

shapes, codec = {"w": (1 << 20,)}, get_codec("f32", {})

def average(files):
    updates = [Update(name, 1, Delta.open(Path(name), shapes, codec)) for name in files]
    for _ in get_strategy("fedavg", {}).aggregate(updates, shapes):
        pass

average(sys.argv[1:2])
before = resident("VmHWM")
average(sys.argv[1:])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_many_open_deltas_take_no_more_memory_than_one(tmp_path):
    codec = get_codec("f32", {})
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(24)]
    for file in files:
        Path(file).write_bytes(delta_bytes({"w": values}, codec))
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *files],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # The files are 24 times 4 MiB; without letting go of them all of that would be resident.
    assert int(run.stdout) < 8 << 20


def test_fedavg_equals_flowers_within_float32_rounding():
    pytest.importorskip("flwr")
    from flwr.app import Array, ArrayRecord, Metadata, MetricRecord, RecordDict
    from flwr.app.message import make_message
    from flwr.serverapp.strategy import FedAvg

    def reply(update):
        arrays = {name: Array(update.delta.decode(name)) for name in update.delta.names}
        content = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "metrics": MetricRecord({"num-examples": update.weight}),
            }
        )
        metadata = Metadata(
            run_id=0,
            message_id=update.id,
            src_node_id=1,
            dst_node_id=0,
            reply_to_message_id="",
            group_id="1",
            created_at=time.time(),
            ttl=60,
            message_type="train",
        )
        return make_message(metadata=metadata, content=content)

    some = updates(8)
    theirs, _ = FedAvg().aggregate_train(1, [reply(update) for update in some])
    ours = aggregated("fedavg", {}, some)
    assert sorted(theirs) == sorted(ours)
    for name in SHAPES:
        # Flower multiplies and adds 8 values below 6 in float32; each operation rounds once.
        np.testing.assert_allclose(theirs[name].numpy(), ours[name], rtol=0, atol=16 * 6 * 2.0**-24)
