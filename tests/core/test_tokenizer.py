from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.tokenizer import DEFAULT_CHARACTERS, CharVocabulary, Decoder

vocabulary = CharVocabulary()


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.text(), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_comes_back_whatever_the_vocabulary(text: str, characters: str) -> None:
    small = CharVocabulary("").grown(characters)
    assert small.decode(small.encode(text)) == text


def test_ids_are_specials_then_bytes_then_characters_in_order() -> None:
    tiny = CharVocabulary("ab")
    assert (tiny.end, tiny.prefix, tiny.suffix, tiny.middle, tiny.byte_row) == (0, 1, 2, 3, 4)
    assert tiny.encode("ba").tolist() == [261, 260]
    assert tiny.encode("é").tolist() == [4 + 0xC3, 4 + 0xA9]
    assert tiny.size == 262


def test_growing_moves_no_id_and_adds_each_character_once() -> None:
    text = "def naïve(): return 'é'"
    grown = vocabulary.grown("éï" + "é" + "a")
    assert grown.characters == DEFAULT_CHARACTERS + "éï"
    known = "".join(c for c in text if c in DEFAULT_CHARACTERS)
    assert np.array_equal(grown.encode(known), vocabulary.encode(known))
    assert len(grown.encode(text)) == len(text)
    assert grown.decode(vocabulary.encode(text)) == text


@given(st.text(), st.integers(0, 10), st.integers(0, 10))
def test_streaming_gives_the_same_text_as_decoding_at_once(text: str, a: int, b: int) -> None:
    tokens = vocabulary.encode(text).tolist()[a : len(text) - b]
    decoder = Decoder(vocabulary)
    pieces = [decoder.feed(token) for token in tokens]
    assert "".join(pieces) + decoder.finish() == vocabulary.decode(tokens)


def test_a_character_appears_only_when_its_last_byte_arrives() -> None:
    decoder = Decoder(vocabulary)
    assert [decoder.feed(token) for token in vocabulary.encode("a€b")] == ["a", "", "", "€", "b"]


def test_broken_byte_sequences_become_replacement_characters() -> None:
    euro = vocabulary.encode("€").tolist()
    assert vocabulary.decode(euro[:2]) == "\ufffd"
    assert vocabulary.decode([*euro[:2], *vocabulary.encode("a")]) == "\ufffda"
    assert vocabulary.decode([*vocabulary.encode("a"), vocabulary.end]) == "a"


def test_half_a_surrogate_pair_is_encoded_as_a_question_mark() -> None:
    assert vocabulary.decode(vocabulary.encode("a\udc80b")) == "a?b"


def test_the_file_is_canonical_and_comes_back() -> None:
    grown = vocabulary.grown("äöü")
    assert CharVocabulary.from_bytes(grown.to_bytes()) == grown
    with pytest.raises(CorruptRecord, match="canonical"):
        CharVocabulary.from_bytes(grown.to_bytes() + b"\n")
    with pytest.raises(CorruptRecord, match="more than once"):
        CharVocabulary.from_bytes(
            b'{\n  "characters": "aa",\n  "format": 1,\n  "kind": "char"\n}\n'
        )
    with pytest.raises(CorruptRecord, match="kind"):
        CharVocabulary.from_bytes(b'{\n  "characters": "a",\n  "format": 1,\n  "kind": "bpe"\n}\n')


def test_a_vocabulary_with_a_repeated_character_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a' appears more than once"):
        CharVocabulary("aba")


def test_missing_characters_are_listed_most_frequent_first_without_the_unprintable() -> None:
    assert vocabulary.missing(Counter("öäöäöß\x00\u200bab")) == "öäß"
