"""Words and their times: what recognisers get wrong is repaired, what makes no sense is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import DataError
from moshi_fl.models.speech import alignments
from moshi_fl.models.speech.alignments import Word, parse_alignments, read_alignments

DURATION = 10.0


def entry(text: str, start: float, end: float, speaker: str = "SPEAKER_MAIN") -> list[object]:
    return [text, [start, end], speaker]


def parsed(*entries: object, **options: bool) -> tuple[Word, ...]:
    data = json.dumps({"alignments": entries}).encode()
    return parse_alignments(data, DURATION, name="x.json", **options)


def spans(words: tuple[Word, ...]) -> list[tuple[str, float, float]]:
    return [(word.text, word.start, word.end) for word in words]


def test_the_main_speakers_words_are_read_from_the_file_beside_the_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    entries = [entry(" hello", 0.5, 0.9), entry("hi", 1, 1.2, "SPEAKER_01"), entry("you", 2, 2.5)]
    path.write_text(json.dumps({"alignments": entries, "text_conditions": {"mood": "calm"}}))
    words = read_alignments(path, DURATION)
    assert words == (Word("hello", 0.5, 0.9), Word("you", 2.0, 2.5))
    everyone = read_alignments(path, DURATION, keep_main_only=False)
    assert [word.speaker for word in everyone] == ["SPEAKER_MAIN", "SPEAKER_01", "SPEAKER_MAIN"]


def test_words_out_of_order_are_sorted_by_their_start() -> None:
    words = parsed(entry("b", 2, 3), entry("a", 1, 2), entry("c", 2, 3))
    assert [word.text for word in words] == ["a", "b", "c"]


def test_a_word_that_overlaps_the_next_of_its_speaker_ends_there() -> None:
    others = entry("x", 1.5, 3, "SPEAKER_01")
    words = parsed(entry("a", 1, 2.5), others, entry("b", 2, 3), keep_main_only=False)
    assert spans(words) == [("a", 1, 2), ("x", 1.5, 3), ("b", 2, 3)]


def test_a_word_that_runs_past_the_end_of_the_sound_ends_there() -> None:
    assert spans(parsed(entry("a", 9.9, 10.4))) == [("a", 9.9, DURATION)]


def test_words_without_a_character_are_left_out() -> None:
    assert parsed(entry("  ", 1, 2), entry("", 2, 3)) == ()


def test_words_that_last_no_time_are_left_out_as_the_reference_does() -> None:
    assert spans(parsed(entry("a", 1, 1), entry("b", 1, 1.5))) == [("b", 1, 1.5)]
    both = parsed(entry("a", 1, 1.2), entry("b", 1, 1.5))  # of which the second hides the first
    assert spans(both) == [("a", 1, 1), ("b", 1, 1.5)]


def test_no_words_are_no_error() -> None:
    assert parsed() == ()


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        (-0.1, 1, "word 2 of x.json, 'late', lasts from -0.1 to 1 s"),
        (3, 2, "lasts from 3 to 2 s"),
        (10, 10.5, "starts at 10 s; the sound ends at 10 s"),
        (5000, 5400, "starts at 5000 s"),
    ],
    ids=["negative", "backwards", "at the end", "in milliseconds"],
)
def test_times_that_cannot_be_are_refused_by_the_word(start: float, end: float, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parsed(entry("early", 0, 1), entry("late", start, end))
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe{",
        b"[]",
        b"{}",
        b'{"alignments": null}',
        b'{"alignments": {}}',
        b'{"alignments": [["a", [0, 1]]]}',
        b'{"alignments": [["a", [0], "S"]]}',
        b'{"alignments": [["a", ["0", 1], "S"]]}',
        b'{"alignments": [["a", [0, NaN], "S"]]}',
        b'{"alignments": [["a", [0, Infinity], "S"]]}',
        b'{"alignments": [["a", [0, 1e999], "S"]]}',
        b'{"alignments": [["a", [true, 1], "S"]]}',
        b'{"alignments": [[7, [0, 1], "S"]]}',
        b'{"alignments": [["' + b"a" * 201 + b'", [0, 1], "S"]]}',
        b'{"alignments": [["\\ud800", [0, 1], "S"]]}',
        b'{"alignments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_not_alignments_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        parse_alignments(data, DURATION, name="x.json")
    assert str(caught.value).startswith("x.json holds no alignments: ")
    assert '"alignments"' in caught.value.hint


def test_a_file_beyond_every_limit_is_not_read_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(alignments, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_alignments(path, DURATION)
    with pytest.raises(DataError, match="cannot be read"):
        read_alignments(tmp_path / "none.json", DURATION)


@given(st.binary(max_size=200))
def test_any_bytes_are_words_or_an_error(data: bytes) -> None:
    try:
        parse_alignments(data, DURATION, name="x.json")
    except DataError:
        return


@given(
    st.lists(
        st.tuples(st.floats(0, 9.99), st.floats(0.01, 5), st.sampled_from(["SPEAKER_MAIN", "B"])),
        max_size=12,
    )
)
def test_repaired_words_are_in_order_and_never_overlap(
    times: list[tuple[float, float, str]],
) -> None:
    entries = [entry("a", start, start + long, who) for start, long, who in times]
    words = parsed(*entries, keep_main_only=False)
    assert len(words) == len(times)
    for speaker in ("SPEAKER_MAIN", "B"):
        own = [word for word in words if word.speaker == speaker]
        for word, after in pairwise(own):
            assert word.start <= word.end <= after.start
    assert all(word.end <= DURATION for word in words)


def test_speakers_of_other_names_are_told_and_not_trained_as_silence() -> None:
    with pytest.raises(DataError, match="no word of SPEAKER_MAIN; its speakers are SPEAKER_00"):
        parsed(entry("hello", 1, 2, "SPEAKER_00"), entry("hi", 3, 4, "SPEAKER_USER"))
    assert parsed(entry("hello", 1, 2, "SPEAKER_USER")) == ()  # Moshi only listens
