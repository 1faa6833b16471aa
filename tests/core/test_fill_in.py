"""Filling in the middle with the char family: what it is trained on, and what it then writes."""

from pathlib import Path
from string import ascii_lowercase as letters

import pytest

from moshi_fl.models import get_family
from moshi_fl.models.char_corpus import CharCorpus
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import load_weights
from moshi_fl.models.family import Sampling
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.train import Recipe, train

MODEL = {"n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 128, "context": 32}
MARKS = CharVocabulary


def task_of(share: float) -> CharTask:
    tokenizer = CharVocabulary(letters).to_bytes()
    task = get_family("char").load({**MODEL, "fill_in_middle": share}, tokenizer)
    assert isinstance(task, CharTask)
    return task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CharCorpus:
    """Every run of 12 to 24 letters of the alphabet, which goes round: one in each file."""
    folder = tmp_path_factory.mktemp("runs")
    for start in range(26):
        for length in range(12, 25):
            run = (letters * 2)[start : start + length]
            (folder / f"{run}.txt").write_text(run)
    return task_of(0.0).read([folder], seed=0)


def rearranged(corpus: CharCorpus) -> list[tuple[list[int], list[int]]]:
    """Windows with their pieces rearranged, and the text of each."""
    plain = next(task_of(0.0).batches(corpus, 200, seed=1)).tolist()
    rows = next(task_of(0.99).batches(corpus, 200, seed=1)).tolist()
    return [pair for pair in zip(rows, plain, strict=True) if pair[0] != pair[1]]


def pieces(row: list[int]) -> list[list[int]]:
    """The row cut before each ``<prefix>``."""
    starts = [i for i, token in enumerate(row) if token == MARKS.prefix]
    return [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def read_back(piece: list[int]) -> list[int]:
    """The text of a whole piece in its own order. Fails where a mark is out of place."""
    a, b = piece.index(MARKS.suffix), piece.index(MARKS.middle)
    assert (piece[0], piece[-1]) == (MARKS.prefix, MARKS.end)
    text = piece[1:a] + piece[b + 1 : -1] + piece[a + 1 : b]
    assert min(text, default=MARKS.byte_row) >= MARKS.byte_row, "a piece crosses files"
    return text


def test_a_share_of_the_windows_is_rearranged_and_the_others_stay(corpus: CharCorpus) -> None:
    plain = next(task_of(0.0).batches(corpus, 400, seed=2))
    rows = next(task_of(0.25).batches(corpus, 400, seed=2))
    changed = (rows != plain).any(1)
    assert 70 <= int(changed.sum()) <= 130
    assert (rows[changed][:, 0] == MARKS.prefix).all()


def test_pieces_keep_the_text_and_move_the_middle_last(corpus: CharCorpus) -> None:
    windows = rearranged(corpus)
    assert len(windows) > 180
    for row, window in windows:
        *whole, last = pieces(row)
        kept = [token for piece in whole for token in read_back(piece)]
        if MARKS.suffix in last:
            kept += read_back(last)
        else:  # cut off by the end of the window
            kept += [token for token in last[1:] if token != MARKS.end]
        text = [token for token in window if token != MARKS.end]
        assert kept == text[: len(kept)]
        assert len(row) == len(window) <= len(kept) + 5 * len(pieces(row))


def test_the_place_of_the_end_does_not_give_the_stop_away(tmp_path: Path) -> None:
    """Files longer than the context: nothing but chance makes a piece end."""
    (tmp_path / "long.txt").write_text(letters * 100)
    windows = rearranged(task_of(0.0).read([tmp_path], seed=0))
    first = [pieces(row)[0] for row, _ in windows]
    ends = [len(piece) for piece in first]
    assert min(ends) <= 10
    assert max(ends) >= 30
    assert max(map(ends.count, ends)) < len(ends) / 6
    assert len({piece.index(MARKS.middle) for piece in first}) > 15


@pytest.mark.slow
def test_a_trained_model_fills_the_gap_and_stops_by_itself(corpus: CharCorpus) -> None:
    """Texts that it was not trained on: where to start is in the prefix, where to stop after it."""
    task = task_of(0.9)
    module = task.build()
    load_weights(module, task.initial_weights(0))
    train(module, task, corpus, Recipe(steps=500, batch_size=32, learning_rate=5e-3))
    greedy = Sampling(temperature=0, max_tokens=40)
    gaps = [
        (text[:a], text[a:b], text[b:])
        for text in corpus.split.held_out
        for a, b in ((2, 4), (4, 10), (8, len(text) - 3))
    ]
    filled = ["".join(task.fill_in(module, before, after, greedy)) for before, _, after in gaps]
    right = sum(made == middle for made, (_, middle, _) in zip(filled, gaps, strict=True))
    assert len(gaps) > 30
    assert right >= 0.9 * len(gaps), list(zip(filled, gaps, strict=True))
