"""The row of text tokens, frame by frame, as the specification lays it out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.speech import text_stream
from moshi_fl.models.speech.alignments import Word
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.models.speech.tiny import TEXT_CARD, tiny_text

PAD, END = 3, 0


@pytest.fixture(scope="module")
def text() -> TextStream:
    return TextStream(tiny_text())


def at(frame: float, text: str, frames: float = 1) -> Word:
    return Word(text, frame / 12.5, (frame + frames) / 12.5)


def test_a_words_tokens_start_in_the_frame_in_which_it_starts(text: TextStream) -> None:
    one, two, three = text.encode("abc")
    row = text.row([at(4.2, "abc")], 10 / 12.5)
    assert row.tolist() == [PAD, PAD, PAD, END, one, two, three, PAD, PAD, PAD]
    assert row.dtype == np.int16


def test_the_first_frame_is_that_which_ends_after_the_start(text: TextStream) -> None:
    (river,) = text.encode("river")
    for hundredth in range(8, 400):
        start = hundredth / 100
        first = next(t for t in range(60) if start * 12.5 < t + 1)
        row = text.row([Word("river", start, start + 0.1)], 5.0)
        assert row.tolist() == [PAD] * (first - 1) + [END, river] + [PAD] * (62 - first)


def test_a_word_in_the_first_frame_has_no_padding_to_end(text: TextStream) -> None:
    (river,) = text.encode("river")
    assert text.row([at(0.5, "river")], 3 / 12.5).tolist() == [river, PAD, PAD]


def test_a_later_word_takes_the_place_of_what_is_left_of_the_one_before(text: TextStream) -> None:
    one, two, _ = text.encode("abc")
    (river,) = text.encode("river")
    row = text.row([at(1, "abc"), at(3, "river")], 6 / 12.5)
    assert row.tolist() == [END, one, two, river, PAD, PAD]
    same_frame = text.row([at(1, "abc"), at(1.5, "river")], 4 / 12.5)
    assert same_frame.tolist() == [END, river, PAD, PAD]


def test_kept_and_shifted_words_wait_for_those_before_them() -> None:
    text = TextStream(tiny_text(), keep_and_shift=True)
    one, two, three = text.encode("abc")
    (river,) = text.encode("river")
    words = [at(1, "abc"), at(3, "river"), at(7, "river")]
    assert text.row(words, 9 / 12.5).tolist() == [END, one, two, three, river, PAD, END, river, PAD]
    assert text.row(words, 3 / 12.5).tolist() == [END, one, two]


def test_tokens_beyond_the_end_are_cut_off(text: TextStream) -> None:
    one, two, _ = text.encode("abc")
    assert text.row([at(1, "abc"), at(90, "river")], 3 / 12.5).tolist() == [END, one, two]


def test_the_length_is_that_of_the_sound_in_seconds(text: TextStream) -> None:
    assert [len(text.row([], seconds)) for seconds in (0.08, 0.0801, 10, 9.97)] == [1, 2, 125, 125]
    for frames in range(1, 3000):  # what is computed from a number of frames is that many
        assert text.frames(frames / 12.5) == frames


def test_any_word_can_be_written_and_read_back(text: TextStream) -> None:
    for word in ("river", "Zürich", "日本", "x\ty", "🙂"):
        tokens = text.encode(word)
        assert set(tokens).isdisjoint({0, 1, 2, 3})
        assert text.decode([PAD, END, *tokens, PAD, -1]).strip() == word
    row = text.row([at(1, "little"), at(4, "boats")], 1.0)
    assert text.decode(row.tolist()) == "little boats"
    assert "".join(text.piece(token) for token in row.tolist()) == " little boats"


def test_characters_that_a_tokenizer_lacks_leave_no_token() -> None:
    """Unknown is 0, which would end a padding that never was."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["river sea"] * 9),
        model_writer=model,
        vocab_size=14,
        pad_id=3,
        unk_id=0,
        model_type="char",
        minloglevel=2,
    )
    text = TextStream(model.getvalue())
    assert text.decode(text.encode("r日s")) == "rs"
    assert 0 not in text.encode("r日s") + text.encode("日本")


def test_the_small_tokenizer_has_the_size_that_is_promised(text: TextStream) -> None:
    assert text.size == TEXT_CARD
    text.require_within(TEXT_CARD)
    with pytest.raises(ConfigError, match="512 tokens; the model has text_card = 511"):
        text.require_within(511)


@pytest.mark.parametrize("model", [b"", b"not a model", tiny_text()[:1000]])
def test_what_is_no_tokenizer_is_refused(model: bytes) -> None:
    with pytest.raises(CorruptRecord, match="not a SentencePiece model"):
        TextStream(model)


@pytest.mark.parametrize("name", [b"<0xzz>", b"\xff0x41>", b"banana"])
def test_a_tokenizer_with_a_byte_by_another_name_is_refused(name: bytes) -> None:
    """It comes with the hub: whoever reads text with it must not fail on the way."""
    with pytest.raises(CorruptRecord, match="the tokenizer"):
        TextStream(tiny_text().replace(b"<0x41>", name))


def test_a_tokenizer_beyond_every_limit_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(text_stream, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(CorruptRecord, match=f"has {len(tiny_text())} bytes; 1000 are the most"):
        TextStream(tiny_text())
    monkeypatch.undo()
    monkeypatch.setattr(text_stream, "MAX_SIZE", 500)
    with pytest.raises(CorruptRecord, match="512 tokens; 500 are the most"):
        TextStream(tiny_text())
