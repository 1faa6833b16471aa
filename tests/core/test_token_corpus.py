"""Windows of a token stream: each once an epoch, shuffled without memory, resumable anywhere."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import DataError
from moshi_fl.models.family import DataSummary
from moshi_fl.models.token_corpus import Shuffle, TokenArray, TokenCorpus, token_windows

SUMMARY = DataSummary(files=1, bytes=1, tokens=1)


def corpus(size: int, context: int) -> TokenCorpus:
    return TokenCorpus(TokenArray(np.arange(size, dtype=np.uint16)), context, SUMMARY)


@given(
    windows=st.integers(1, 40),
    left_over=st.integers(0, 5),
    context=st.integers(6, 12),
    batch=st.integers(1, 17),
    seed=st.integers(0, 1 << 70),
)
def test_an_epoch_has_each_window_once_and_so_each_token_is_once_a_target(
    windows, left_over, context, batch, seed
):
    data = corpus(windows * context + 1 + left_over, context)
    assert data.num_examples == windows
    stream = token_windows(data, batch, seed=seed)
    rows = np.concatenate(list(islice(stream, -(-3 * windows // batch))))
    assert rows.dtype == np.int64
    assert (np.diff(rows) == 1).all()
    for epoch in range(3):
        targets = rows[epoch * windows : (epoch + 1) * windows, 1:]
        assert sorted(targets.ravel()) == list(range(1, windows * context + 1))


@given(start=st.integers(0, 10**12), batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_a_batch_depends_on_nothing_that_came_before(start, batch, seed):
    data = corpus(1000, 7)
    later = next(token_windows(data, batch, seed=seed, start=start + 2))
    stream = token_windows(data, batch, seed=seed, start=start)
    assert np.array_equal(list(islice(stream, 3))[2], later)


def test_epochs_and_seeds_differ_in_order():
    orders = {
        tuple(Shuffle(50, seed).pick(epoch * 50, 50)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 10, 99, 4097])
def test_every_count_is_permuted(count):
    for epoch in range(3):
        assert sorted(Shuffle(count, 3).pick(epoch * count, count)) == list(range(count))


def test_all_orders_are_about_equally_likely():
    orders = Counter(tuple(Shuffle(3, seed).pick(0, 3).tolist()) for seed in range(1200))
    assert len(orders) == 6
    assert all(abs(times - 200) < 5 * 200**0.5 for times in orders.values())


def test_neighbours_do_not_stay_neighbours():
    order = Shuffle(100_000, 1).pick(0, 100_000)
    steps = np.diff(order)
    assert (np.abs(steps) == 1).sum() < 20  # 2 expected
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


def test_a_stream_of_any_length_is_shuffled_at_once():
    huge = Shuffle(10**15, 1)
    picked = huge.pick(10**15 - 4, 8)  # across the end of the epoch
    assert len(picked) == 8
    assert (picked < 10**15).all()


def test_a_stream_shorter_than_a_window_yields_what_there_is():
    data = corpus(5, 64)
    assert data.num_examples == 1
    assert next(token_windows(data, 2, seed=0)).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("size", [0, 1])
def test_a_stream_with_nothing_to_predict_is_refused_at_once(size):
    with pytest.raises(DataError, match=f"Only {size} token"):
        token_windows(corpus(size, 8), 1, seed=0)
    assert len(corpus(size, 8).fingerprint) == 64
