"""Sub-word tokens: byte-level BPE by Hugging Face ``tokenizers``, read strictly.

Bytes are the alphabet (Radford et al. 2019), so any text can be encoded and comes back unchanged.
The file is the library's own ``tokenizer.json``, but it comes from strangers: it is parsed and
checked here, and the library only ever gets what passed. Special tokens stand for the end of a
document and for filling in; text that looks like one is text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moshi_fl.errors import ConfigError, CorruptRecord

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = NDArray[np.uint16]

END = "<|endoftext|>"
SPECIALS = (END, "<|prefix|>", "<|suffix|>", "<|middle|>")
MAX_SIZE = 1 << 16  # ids are stored as uint16
MAX_FILE_BYTES = 8 << 20
_REMEDY = "Make a tokenizer with: moshi-fl tokenize train"
MAX_TOKEN_LENGTH = 1024  # characters
# Where no token may reach across. A line's end goes with the punctuation before it and with the
# indentation after it, a word with the one sign before it, and a digit with nothing: 6 % fewer
# tokens for Python's standard library than by GPT-2's pattern, at 4096 tokens.
CODE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|[\r\n]+[ \t]*|\s+(?!\S)|\s+"
_CUT = {"type": "Split", "pattern": {"Regex": CODE}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True)
class Subwords:
    """A tokenizer file that passed all checks.

    Attributes:
        vocabulary: Token, in the byte alphabet, to id; specials are not in it.
        merges: Pairs that become one token, first ones first.
        specials: Special token to id.
        for_code: Whether texts are cut by ``CODE``, or else as GPT-2 does.
    """

    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    specials: Mapping[str, int]
    for_code: bool = True

    @classmethod
    def bytes_only(cls) -> Subwords:
        """One token for each byte value; needs no training."""
        first = len(SPECIALS)
        vocabulary = {c: first + byte for byte, c in enumerate(_alphabet())}
        return cls(vocabulary, (), {name: i for i, name in enumerate(SPECIALS)})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Subwords:
        """Merge the most frequent pairs until there are ``vocab_size`` tokens, specials included.

        Equal texts give equal tokenizers.

        Raises:
            ConfigError: Too few tokens for all bytes, or more than 65,536.
        """
        smallest = len(SPECIALS) + 256
        if not smallest <= vocab_size <= MAX_SIZE:
            raise ConfigError(
                f"vocabulary of {vocab_size} tokens: must be from {smallest} to {MAX_SIZE}."
            )
        from tokenizers import trainers

        start = cls.bytes_only()
        tokenizer = start.tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=_alphabet(),
            max_token_length=MAX_TOKEN_LENGTH,
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_whole, texts), trainer)
        return cls.from_bytes(tokenizer.to_str().encode())

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "tokenizer.json") -> Subwords:
        """Read a ``tokenizer.json``.

        Raises:
            CorruptRecord: Not a byte-level BPE that can encode any text and give it back.
        """
        if len(data) > MAX_FILE_BYTES:
            raise CorruptRecord(f"{name}: {len(data)} bytes, the limit is {MAX_FILE_BYTES}.")
        try:
            table = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptRecord(f"{name}: not JSON ({error}).", hint=_REMEDY) from error
        return _Reader(name).read(table)

    def to_bytes(self) -> bytes:
        """The file: equal tokenizers, equal bytes; the library reads it, too."""
        added = [
            {"id": i, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, i in sorted(self.specials.items(), key=lambda item: item[1])
        ]
        everything = sorted({**self.vocabulary, **self.specials}.items(), key=lambda item: item[1])
        steps = [_CUT, _BYTES | {"use_regex": False}] if self.for_code else [_BYTES]
        table = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": None,
            "decoder": _BYTES,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": dict(everything),
                "merges": [list(pair) for pair in self.merges],
            },
        }
        return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()

    @property
    def size(self) -> int:
        """How many token ids there are."""
        return len(self.vocabulary) + len(self.specials)

    @property
    def end(self) -> int:
        """Id that ends a document."""
        return self.specials[END]

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, which never are special ones."""
        if not self.merges:
            return self._of_bytes[np.frombuffer(text.encode("utf-8", "replace"), np.uint8)]
        ids = self.tokenizer.encode(_whole(text), add_special_tokens=False).ids
        return np.array(ids, np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of these tokens; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        stream = self.stream()
        return "".join(map(stream.feed, tokens)) + stream.finish()

    def stream(self) -> Stream:
        """A decoder that gives text as soon as it is certain."""
        return Stream(self)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The library's object."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=dict(self.vocabulary), merges=list(self.merges)))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.for_code)
        steps = [pre_tokenizers.Split(Regex(CODE), "isolated")] if self.for_code else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
        return tokenizer  # it knows no special tokens, so no text can become one

    @cached_property
    def _of_bytes(self) -> Tokens:
        """Token of each byte value."""
        return np.array([self.vocabulary[c] for c in _alphabet()], np.uint16)

    @cached_property
    def spelling(self) -> dict[int, bytes]:
        """Bytes of each token but the special ones."""
        byte = {c: i for i, c in enumerate(_alphabet())}
        return {i: bytes(byte[c] for c in token) for token, i in self.vocabulary.items()}


def start_of(path: Path) -> bytes:
    """As much of a file as decides whether it is a tokenizer: a byte more than it may have."""
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


class Stream:
    """Turns tokens into text one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, subwords: Subwords) -> None:
        self._spelling = subwords.spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        return self._utf8.decode(self._spelling.get(token, b""))

    def finish(self) -> str:
        """What is left over: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


def _alphabet() -> list[str]:
    """The character that stands for each byte value (GPT-2's table): printable ones themselves."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in kept}
    others = (byte for byte in range(256) if byte not in table)
    table |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _whole(text: str) -> str:
    """The text with half surrogate pairs, which UTF-8 cannot say, replaced."""
    return text.encode("utf-8", "replace").decode()


class _Reader:
    """Checks a parsed file, part by part."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self, table: Any) -> Subwords:
        model = self._table(table, "the file").get("model")
        model = self._table(model, "model")
        self._require(model.get("type", "BPE") == "BPE", "only models of type BPE can be used")
        for part in ("normalizer", "truncation", "padding"):
            self._require(table.get(part) is None, f"a {part} would change texts")
        for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            self._require(model.get(part) in (None, "", False), f"{part} cannot be used")
        specials = self._specials(table.get("added_tokens") or [])
        vocabulary = self._vocabulary(model.get("vocab"), specials)
        merges = self._merges(model.get("merges"), vocabulary)
        return Subwords(vocabulary, merges, specials, self._for_code(table.get("pre_tokenizer")))

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise CorruptRecord(f"{self._name}: {what}.", hint=_REMEDY)

    def _table(self, value: Any, what: str) -> dict[str, Any]:
        self._require(isinstance(value, dict), f"{what} is not an object")
        return value  # type: ignore[no-any-return]

    def _specials(self, added: Any) -> dict[str, int]:
        self._require(isinstance(added, list), "added_tokens is not a list")
        found: dict[str, int] = {}
        for entry in added:
            text, number = self._table(entry, "an added token").get("content"), entry.get("id")
            if not isinstance(text, str) or type(number) is not int:
                raise CorruptRecord(f"{self._name}: an added token without text or id.")
            self._require(_whole(text) == text, "an added token has half a surrogate pair")
            found[text] = number
        self._require(END in found, f"it has no {END}")
        return found

    def _vocabulary(self, table: Any, specials: Mapping[str, int]) -> dict[str, int]:
        table = self._table(table, "model.vocab")
        size = len({*table, *specials})
        self._require(size <= MAX_SIZE, f"{size} tokens, the limit is {MAX_SIZE}")
        whole = all(type(number) is int for number in table.values())
        in_order = whole and {*table.values(), *specials.values()} == set(range(size))
        self._require(in_order, "ids are not 0, 1, 2 and so on")
        agree = all(table.get(text, number) == number for text, number in specials.items())
        self._require(agree, "a special token has two ids")
        plain = {token: number for token, number in table.items() if token not in specials}
        letters = set(_alphabet())
        known = all(0 < len(t) <= MAX_TOKEN_LENGTH and letters.issuperset(t) for t in plain)
        self._require(known, "a token is not made of bytes")
        self._require(letters.issubset(plain), "not every byte has a token")
        return plain

    def _merges(self, listed: Any, vocabulary: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
        self._require(isinstance(listed, list), "model.merges is not a list")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in listed]
        for pair in pairs:
            fits = isinstance(pair, list) and len(pair) == 2
            fits = fits and all(isinstance(part, str) and part in vocabulary for part in pair)
            self._require(fits and "".join(pair) in vocabulary, "a merge of unknown tokens")
        return tuple((left, right) for left, right in pairs)

    def _for_code(self, table: Any) -> bool:
        """Which known way to cut a text this is; a stranger's pattern could take for ever."""
        table = self._table(table, "pre_tokenizer")
        steps = table.get("pretokenizers") if table.get("type") == "Sequence" else [table]
        self._require(isinstance(steps, list) and bool(steps), "an unknown pre_tokenizer")
        *before, level = (self._table(step, "a pre_tokenizer") for step in steps)
        known = level.get("type") == "ByteLevel" and level.get("add_prefix_space") is False
        known = known and level.get("use_regex", True) is not bool(before)
        self._require(known and before in ([], [_CUT]), "an unknown pre_tokenizer")
        return bool(before)
