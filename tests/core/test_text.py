from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.text import (
    Count,
    Duration,
    Figure,
    Moment,
    Percent,
    Size,
    age,
    clean,
    human,
    markdown,
    shorten,
    spell,
    width,
)

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (1499, "1.50 KB"),
        (168_000, "168 KB"),
        (999_600, "1.00 MB"),
        (33_554_432, "33.6 MB"),
        (-2_000_000, "-2 MB"),
        (10**18, "1000 PB"),
    ],
)
def test_sizes_read_as_transfer_tools_print_them(number, text):
    assert str(Size(number)) == text
    assert f"{Size(number)}" == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (99_999, "99,999"), (100_000, "100 k"), (8_400_000, "8.40 M")]
)
def test_counts_stay_exact_while_they_are_short(number, text):
    assert str(Count(number)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.62, "0.6 s"),
        (42.4, "42 s"),
        (80, "1 m 20 s"),
        (59.9, "60 s"),
        (11_100, "3 h 05 m"),
        (4 * 86_400 + 7 * 3600, "4 d 7 h"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert str(Duration(seconds)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "0.0123"), (0.5, "0.50"), (5.9041, "5.90"), (17.44, "17.4"),
     (918.4, "918"), (12450.2, "12,450"), (80.0, "80"), (1e300, "1e+300"), (float("inf"), "inf")],
)  # fmt: skip
def test_measured_numbers_have_three_digits(value: float, text: str) -> None:
    assert str(Figure(value)) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-01-31T11:59:55Z", "just now"),
        ("2026-01-31T11:57:00Z", "3 minutes ago"),
        ("2026-01-31T11:00:00Z", "1 hour ago"),
        ("2026-01-01T12:00:00Z", "30 days ago"),
        ("2026-01-31T12:05:00Z", "in 5 minutes"),
        ("2026-01-31T11:57:00", "3 minutes ago"),
        ("yesterday", "yesterday"),
    ],
)
def test_times_of_records_read_as_ages(moment, text):
    assert age(moment, NOON) == text


def test_a_fact_stays_a_number_for_programs():
    assert Size(168_000) + 1 == 168_001
    assert Percent(0.0085) == 0.0085
    assert str(Percent(0.0085)) == "0.85 %"
    assert Moment("2026-01-31T12:00:00Z") == "2026-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        (True, "yes"),
        (2.345678, "2.3457"),
        (1.5e-6, "1.5e-06"),
        (["a", Size(2000)], "a, 2 KB"),
        ((), "-"),
        ({"binary": 3, "too large": 1}, "binary 3, too large 1"),
    ],
)
def test_facts_of_any_kind_become_one_line(value, text):
    assert human(value) == text


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("good\rbad", "good\\x0dbad"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u200bb\ufeffc", "a\\u200bb\\ufeffc"),
        ("\x9b31mred", "\\x9b31mred"),
        ("\udc80", "\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("line\nbreak\u2028again", "line\\x0abreak\\u2028again"),
    ],
)
def test_controls_from_strangers_are_made_visible(hostile, shown):
    assert clean(hostile) == shown


def test_ordinary_text_of_any_language_passes_unchanged():
    for text in ("plain", "Größe", "モデル", "שלום", "a\u3000b", "café", "🙂"):
        assert clean(text) == text


@given(st.text())
def test_nothing_that_moves_the_cursor_survives(text):
    result = clean(text)
    assert all(c.isprintable() or c.isspace() for c in result)
    assert not set(result) & set("\r\n\t\x1b\x07\x08\x0b\x0c\u2028\u2029")


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8", "no-such-encoding"]))
def test_every_stream_can_carry_what_is_spelled_for_it(text, encoding):
    spelled = spell(clean(text), encoding)
    spelled.encode("ascii" if encoding == "no-such-encoding" else encoding)


def test_typography_has_plain_substitutes():
    assert spell("✓ 3 × 2 → 6…", "ascii") == "ok 3 x 2 -> 6..."


@given(st.text(), st.integers(min_value=1, max_value=20))
def test_shortened_text_fits(text, columns):
    assert width(shorten(clean(text), columns)) <= columns


def test_a_strangers_text_is_no_markdown_and_calls_nobody():
    text = markdown("<b>*a*</b> @ann #12 www.example.org https://example.org `x`|\n# big", 200)
    for found in ("@ann", "#12", "www.", "https:", "\n", " <b", " `x"):
        assert found not in text
    assert markdown("Ann Example, 3.11") == "Ann Example, 3.11"
    assert len(markdown("x" * 500, 300)) == 300
