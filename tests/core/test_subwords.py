"""Sub-word tokens: any text comes back, no text becomes a mark, and no file does harm."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.subwords import END, MAX_FILE_BYTES, SPECIALS, Subwords

CODE = "def area(width, height):\n    return width * height  # 42 × 7\n\n\nprint(area(3, 4096))\n"
TEXTS = [
    CODE * 9,
    "    return one\n    return two\n" * 20,
    "<|endoftext|>" * 50,
    "if x:\n\ty = 'ünïcödé'\n" * 9,
]


@pytest.fixture(scope="module")
def trained() -> Subwords:
    return Subwords.train(TEXTS, 340)


KINDS = pytest.mark.parametrize("kind", ["trained", "bytes"])


def of(kind: str, trained: Subwords) -> Subwords:
    return trained if kind == "trained" else Subwords.bytes_only()


ODD = st.text(st.characters(codec="utf-8")) | st.lists(
    st.sampled_from(
        [
            *SPECIALS,
            "<|",
            "endoftext",
            "|>",
            "\r\n",
            "\t",
            " ",
            "Ġ",
            "Ċ",
            "\0",
            "７",
            "👩‍👩‍👧",
            CODE,
        ]
    )
).map("".join)


@KINDS
@given(text=ODD)
@example("\r\n\r \n\t  \u2028")
@example("\ufeff<|endoftext|>\0\ufffd\U0010ffff")
def test_any_text_comes_back_as_it_was(kind, trained, text):
    subwords = of(kind, trained)
    tokens = subwords.encode(text)
    assert tokens.dtype == np.uint16
    assert subwords.decode(tokens.tolist()) == text
    stream = subwords.stream()
    pieces = [stream.feed(token) for token in tokens.tolist()]
    assert "".join(pieces) + stream.finish() == text


@KINDS
@given(text=ODD)
@example("<|endoftext|>")
@example("a<|prefix|>b<|suffix|>c<|middle|> <|endoftext|>")
def test_text_that_looks_like_a_mark_stays_text(kind, trained, text):
    subwords = of(kind, trained)
    assert not set(subwords.specials.values()) & set(subwords.encode(text).tolist())


def test_half_a_surrogate_pair_becomes_a_question_mark(trained):
    for subwords in (trained, Subwords.bytes_only()):
        assert subwords.decode(subwords.encode("a\ud800b").tolist()) == "a?b"


def test_marks_and_foreign_ids_are_no_text_and_broken_bytes_are_told(trained):
    assert trained.decode([*trained.specials.values(), 65535, -1]) == ""
    euro = trained.encode("€").tolist()
    assert trained.decode(euro[:-1]) == "�"
    stream = trained.stream()
    assert [stream.feed(token) for token in euro] == [*[""] * (len(euro) - 1), "€"]


def test_an_empty_text_has_no_tokens(trained):
    for subwords in (trained, Subwords.bytes_only()):
        assert subwords.encode("").tolist() == []


def test_one_token_a_byte_is_what_the_library_makes_of_no_merges():
    subwords = Subwords.bytes_only()
    text = "".join(map(chr, range(700)))
    library = subwords.tokenizer.encode(text, add_special_tokens=False).ids
    assert subwords.encode(text).tolist() == library
    assert subwords.size == 260
    assert subwords.end == 0


def test_training_finds_what_is_frequent_and_counts_digit_by_digit(trained):
    assert 300 < trained.size <= 340
    assert len(trained.encode(CODE)) < 0.7 * len(CODE.encode())
    assert len(trained.encode("4096")) == 4
    assert not any(any("0" <= c <= "9" for c in t) for t in trained.vocabulary if len(t) > 1)


def test_a_lines_end_and_the_next_indentation_are_one_token(trained):
    tokens = trained.encode("    return width\n    return height").tolist()
    assert "\n    " in [trained.decode([token]) for token in tokens]


SCRIPT = """
import sys
from moshi_fl.subwords import Subwords
sys.stdout.buffer.write(Subwords.train(eval(sys.argv[1]), 340).to_bytes())
"""


def test_equal_texts_give_an_equal_file_in_any_process_on_any_number_of_threads(trained):
    for threads in ("1", "4"):
        made = subprocess.run(
            [sys.executable, "-c", SCRIPT, repr(TEXTS)],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            check=True,
        )
        assert made.stdout == trained.to_bytes()
        assert made.stderr == b""


def test_neither_reading_nor_encoding_bytes_imports_the_library():
    code = "import sys; from moshi_fl.subwords import Subwords as S; s = S.bytes_only()\n"
    code += "S.from_bytes(s.to_bytes()).encode('x'); assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [0, 259, 65537, 1 << 40])
def test_a_vocabulary_has_room_for_all_bytes_and_fits_16_bits(size):
    with pytest.raises(ConfigError, match="from 260 to 65536"):
        Subwords.train(TEXTS, size)


def test_the_smallest_vocabulary_and_no_text_at_all_are_bytes():
    for made in (Subwords.train(TEXTS, 260), Subwords.train([], 1000)):
        assert made.size == 260
        assert not made.merges
        assert made.decode(made.encode(CODE).tolist()) == CODE


def test_the_file_is_read_back_and_read_alike_by_the_library(trained):
    from tokenizers import Tokenizer

    data = trained.to_bytes()
    assert Subwords.from_bytes(data).to_bytes() == data
    library = Tokenizer.from_str(data.decode())
    library.encode_special_tokens = True
    for text in (*TEXTS, "ab  c\n\n d 123 ‰"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == trained.encode(text).tolist()
        assert library.decode(ids) == text


# Files from strangers.


def table() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(Subwords.train(TEXTS, 280).to_bytes())
    return made


TABLE = table()
MERGES = TABLE["model"]["merges"]


def changed(path: str, value: Any) -> bytes:
    result = copy.deepcopy(TABLE)
    *parents, key = path.split(".")
    target = result
    for parent in parents:
        target = target[int(parent)] if isinstance(target, list) else target[parent]
    target[int(key) if isinstance(target, list) else key] = value
    return json.dumps(result).encode()


VOCAB = TABLE["model"]["vocab"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
HOSTILE = {
    "nothing": (b"", "not JSON"),
    "no text": (b"\xff\xfe\xfd", "not JSON"),
    "a pickle": (b"\x80\x04\x8c\x05posix", "not JSON"),
    "deep": (b"[" * 1_000_000, "not JSON"),
    "a huge number": (b"9" * 1_000_000, "not JSON"),
    "no object": (b"[]", "not an object"),
    "huge": (b" " * (MAX_FILE_BYTES + 1), "limit"),
    "another model": (changed("model.type", "Unigram"), "type BPE"),
    "an unheard-of model": (changed("model.type", ["BPE"]), "type BPE"),
    "a model that is no object": (changed("model", "BPE"), "not an object"),
    "lower-casing": (changed("normalizer", {"type": "Lowercase"}), "normalizer"),
    "an endless replacement": (
        changed("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        "normalizer",
    ),
    "cutting": (changed("truncation", {"max_length": 1}), "truncation"),
    "dropout": (changed("model.dropout", 0.5), "dropout"),
    "merges that are passed over": (changed("model.ignore_merges", True), "ignore_merges"),
    "a word ending": (changed("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    "a slow pattern": (
        changed("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}}),
        "pre_tokenizer",
    ),
    "a space in front": (
        changed("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}),
        "pre_tokenizer",
    ),
    "no cutting": (changed("pre_tokenizer", None), "pre_tokenizer"),
    "empty cutting": (
        changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
        "pre_tokenizer",
    ),
    "no end mark": (changed("added_tokens", []), END),
    "marks that are no list": (changed("added_tokens", 3), "added_tokens"),
    "a mark without text": (changed("added_tokens.0", {"id": 0}), "without text"),
    "a mark that is half a character": (
        changed("added_tokens.1.content", "\ud800"),
        "half a surrogate",
    ),
    "a mark for a letter": (
        changed("added_tokens.1", {"id": VOCAB["a"], "content": "a"}),
        "",
    ),
    "a mark with two ids": (changed("added_tokens.0.id", 7), "two ids"),
    "no vocabulary": (changed("model.vocab", None), "vocab"),
    "a list for a vocabulary": (changed("model.vocab", []), "vocab"),
    "an id that is a list": (changed("model.vocab.a", [1]), "ids"),
    "an id that is an object": (changed("model.vocab.a", {}), "ids"),
    "an id that is a text": (changed("model.vocab.a", "5"), "ids"),
    "an id that is nearly whole": (changed("model.vocab.a", float(VOCAB["a"])), "ids"),
    "an id that is true": (changed("model.vocab", {**VOCAB, SPECIALS[1]: True}), "ids"),
    "an id below zero": (changed("model.vocab.a", -1), "ids"),
    "an id beyond all": (changed("model.vocab.a", 10**100), "ids"),
    "one id for two": (changed("model.vocab.a", VOCAB["b"]), "ids"),
    "too many tokens": (
        changed("model.vocab", VOCAB | {f"a{i}": len(VOCAB) + i for i in range(70_000)}),
        "limit",
    ),
    "a missing byte": (
        changed("model.vocab", {("zz" if t == "z" else t): i for t, i in VOCAB.items()}),
        "",
    ),
    "letters that are no bytes": (changed("model.vocab", VOCAB | {"中": len(VOCAB)}), "bytes"),
    "an empty token": (changed("model.vocab", VOCAB | {"": len(VOCAB)}), "bytes"),
    "an endless token": (changed("model.vocab", VOCAB | {"a" * 5000: len(VOCAB)}), "bytes"),
    "no merges": (changed("model.merges", None), "merges"),
    "merges of nothing": (changed("model.merges.0", []), "merge"),
    "merges of three": (changed("model.merges.0", ["a", "b", "c"]), "merge"),
    "merges of numbers": (changed("model.merges.0", [1, 2]), "merge"),
    "merges of unknown tokens": (changed("model.merges.0", ["qq", "q"]), "merge"),
    "merges into unknown tokens": (changed("model.merges.0", ["q", "~"]), "merge"),
    "merges of marks": (changed("model.merges.0", [END, "a"]), "merge"),
    "merges into a mark": (changed("model.merges", [*MERGES, ["<", "|endoftext|>"]]), "merge"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_would_change_texts_or_harm_is_refused_in_words(kind):
    data, what = HOSTILE[kind]
    start = time.process_time()
    with pytest.raises(CorruptRecord, match=r"^hub's tokenizer: ") as caught:
        Subwords.from_bytes(data, name="hub's tokenizer")
    assert what in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
PLACES = [
    "model",
    "model.vocab",
    "model.vocab.a",
    "model.merges",
    "model.merges.3",
    "model.merges.3.0",
    "model.type",
    "model.dropout",
    "added_tokens",
    "added_tokens.0",
    "added_tokens.0.id",
    "added_tokens.1.content",
    "pre_tokenizer",
    "pre_tokenizer.type",
    "pre_tokenizer.pretokenizers",
    "pre_tokenizer.pretokenizers.0",
    "pre_tokenizer.pretokenizers.1.use_regex",
    "normalizer",
    "decoder",
]


@settings(max_examples=300)
@given(place=st.sampled_from(PLACES), value=JSON)
def test_whatever_stands_anywhere_a_file_is_refused_or_works(place, value):
    try:
        subwords = Subwords.from_bytes(changed(place, value))
    except CorruptRecord:
        return
    assert subwords.decode(subwords.encode(CODE + END).tolist()) == CODE + END
    assert subwords.end not in subwords.encode(END)
    assert Subwords.from_bytes(subwords.to_bytes()).to_bytes() == subwords.to_bytes()


GOOD = json.dumps(TABLE, separators=(",", ":")).encode()


@settings(max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_file_with_changed_bytes_is_refused_or_works(position, put, cut):
    data = GOOD[:position] + put + GOOD[position + cut :]
    try:
        subwords = Subwords.from_bytes(data)
    except CorruptRecord:
        return
    assert subwords.decode(subwords.encode(CODE).tolist()) == CODE


def test_the_format_of_gpt2s_own_file_is_read():
    old = copy.deepcopy(TABLE)
    old["pre_tokenizer"] = BYTE_LEVEL | {"trim_offsets": True}
    old["model"] = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "vocab": old["model"]["vocab"],
        "merges": [" ".join(pair) for pair in MERGES],
    }
    subwords = Subwords.from_bytes(json.dumps(old).encode())
    assert subwords.decode(subwords.encode(CODE).tolist()) == CODE
    assert not subwords.for_code
    assert subwords.merges == Subwords.from_bytes(GOOD).merges


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, " " * 1_000_000, "\n \n" * 300_000, "x1" * 400_000]
)
def test_a_megabyte_of_one_kind_takes_no_longer_than_other_text(trained, text):
    start = time.process_time()
    assert trained.decode(trained.encode(text).tolist()) == text
    assert time.process_time() - start < 20  # a quadratic algorithm would take hours
