"""Characters to token ids and back; any text can be encoded.

Ids in order: the special tokens, one token for each of the 256 byte values, then the characters of
the vocabulary. A character that the vocabulary lacks becomes its UTF-8 bytes. The vocabulary only
ever grows at its end, so an id keeps its meaning for the life of a hub, and weights of an older
vocabulary are the first rows of the newer one's.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moshi_fl import records
from moshi_fl.errors import ConfigError, CorruptRecord

Tokens = NDArray[np.uint16]

SPECIALS = ("<end>", "<prefix>", "<suffix>", "<middle>")
MAX_SIZE = 1 << 16  # ids are stored as uint16
DEFAULT_CHARACTERS = "\n\t" + "".join(map(chr, range(0x20, 0x7F))) + "…—→"


class VocabularyFile(records.Record, frozen=True, kw_only=True):
    """The tokenizer file of a hub."""

    format: Literal[1] = 1
    kind: Literal["char"] = "char"
    characters: str


@dataclass(frozen=True)
class CharVocabulary:
    """An ordered set of characters, each with a token id of its own.

    Raises:
        ConfigError: A character appears twice, is half of a surrogate pair, or there are too many.
    """

    characters: str = DEFAULT_CHARACTERS

    end = SPECIALS.index("<end>")
    prefix = SPECIALS.index("<prefix>")
    suffix = SPECIALS.index("<suffix>")
    middle = SPECIALS.index("<middle>")
    byte_row = len(SPECIALS)
    first_character = byte_row + 256

    def __post_init__(self) -> None:
        twice = [character for character, n in Counter(self.characters).items() if n > 1]
        if twice:
            raise ConfigError(f"vocabulary: {twice[0]!r} appears more than once.")
        if any("\ud800" <= character <= "\udfff" for character in self.characters):
            raise ConfigError("vocabulary: half of a surrogate pair is not a character.")
        if self.size > MAX_SIZE:
            raise ConfigError(f"vocabulary: {self.size} tokens, the limit is {MAX_SIZE}.")

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "tokenizer.json") -> CharVocabulary:
        """Read a tokenizer file.

        Raises:
            CorruptRecord: Not a canonical tokenizer file.
        """
        try:
            return cls(records.load(data, VocabularyFile, name=name).characters)
        except ConfigError as error:
            raise CorruptRecord(f"{name}: {error}") from error

    def to_bytes(self) -> bytes:
        """The tokenizer file: canonical JSON."""
        return records.dump(VocabularyFile(characters=self.characters))

    @property
    def size(self) -> int:
        """How many token ids there are."""
        return self.first_character + len(self.characters)

    def grown(self, new_characters: Iterable[str]) -> CharVocabulary:
        """This vocabulary with the characters that it lacks appended in the order given."""
        added = dict.fromkeys(c for c in new_characters if c not in self.characters)
        return CharVocabulary(self.characters + "".join(added))

    def missing(self, counts: Counter[str]) -> str:
        """The printable ones of these characters that have no id yet, most frequent first."""
        unknown = [c for c in counts if c not in self.characters and c.isprintable()]
        return "".join(sorted(unknown, key=lambda c: (-counts[c], c)))

    def encode(self, text: str) -> Tokens:
        """Token ids of a text. Half of a surrogate pair, which UTF-8 cannot say, becomes ``?``."""
        points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        ids = self._ids_by_code_point.take(points, mode="clip")
        unknown = ids == 0
        if not unknown.any():
            return ids
        wide = points[unknown]
        lengths = np.ones(len(ids), np.intp)
        lengths[unknown] += (wide >= 0x80).astype(np.intp) + (wide >= 0x800) + (wide >= 0x10000)
        tokens = np.repeat(ids, lengths)
        utf8 = wide.tobytes().decode("utf-32-le").encode()
        tokens[np.repeat(unknown, lengths)] = np.frombuffer(utf8, np.uint8) + np.uint16(
            self.byte_row
        )
        return tokens

    @cached_property
    def _ids_by_code_point(self) -> Tokens:
        """Id of each code point up to one past the highest known; 0 marks the unknown."""
        points = [ord(character) for character in self.characters]
        table = np.zeros(max(points, default=0) + 2, np.uint16)
        table[points] = np.arange(self.first_character, self.size, dtype=np.uint16)
        return table

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of these tokens; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        decoder = Decoder(self)
        return "".join(map(decoder.feed, tokens)) + decoder.finish()


class Decoder:
    """Turns tokens into text one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, vocabulary: CharVocabulary) -> None:
        self._characters = vocabulary.characters
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token >= CharVocabulary.first_character:
            return self.finish() + self._characters[token - CharVocabulary.first_character]
        if token >= CharVocabulary.byte_row:
            return self._utf8.decode(bytes([token - CharVocabulary.byte_row]))
        return self.finish()

    def finish(self) -> str:
        """What is left over: U+FFFD for a character that never became complete, else nothing."""
        return self._utf8.decode(b"", final=True)
