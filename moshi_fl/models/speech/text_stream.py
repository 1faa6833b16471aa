"""The text that Moshi thinks while it speaks: one token a frame, beside the audio codes.

Each word's tokens start in the frame in which the word starts; the rest is padding, and the last
padding before a word says so. Tokens are SentencePiece's, and Kyutai's file is read as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.speech.alignments import Word

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_MODEL_BYTES = 8 << 20
MAX_SIZE = 1 << 15  # tokens are kept as int16
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TextStream:
    """A tokenizer, and how its tokens are laid over the frames.

    Tokens that mean unknown, a control or padding stand for no text: they are left out of words.

    Attributes:
        model: A SentencePiece file, such as ``tokenizer_spm_32k_3.model``.
        frame_rate: Frames a second.
        padding: Token of a frame in which no word begins or goes on.
        end_of_padding: Token of the last such frame before a word.
        keep_and_shift: Whether a word waits until those before it are complete; else it takes
            the place of what is left of them.

    Raises:
        CorruptRecord: The file is no SentencePiece model, or it is too large.
    """

    model: bytes
    frame_rate: float = 12.5
    padding: int = 3
    end_of_padding: int = 0
    keep_and_shift: bool = False

    def __post_init__(self) -> None:
        if self.size > MAX_SIZE:
            raise CorruptRecord(f"a tokenizer of {self.size} tokens; {MAX_SIZE} are the most.")

    @cached_property
    def _processor(self) -> SentencePieceProcessor:
        return _load(self.model)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._processor.vocab_size())

    def require_within(self, text_card: int) -> None:
        """Check that a language model with so many text tokens knows all of these.

        Raises:
            ConfigError: It has fewer.
        """
        if self.size > text_card:
            raise ConfigError(
                f"the tokenizer has {self.size} tokens; the model has text_card = {text_card}.",
                hint="tokenizer and configuration must belong together",
            )

    def encode(self, text: str) -> list[int]:
        """Tokens of a word or a sentence."""
        return [token for token in self._processor.encode(text) if self._is_text(token)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens as they come out of the stream, padding among them.

        Raises:
            IndexError: A token that the tokenizer does not have.
        """
        return str(self._processor.decode([int(t) for t in tokens if self._is_text(int(t))]))

    def piece(self, token: int) -> str:
        """The text of one token, with a space where a word begins; empty for padding.

        For text that appears token by token. A model may know more tokens than the tokenizer; what
        it says with those is empty, too.
        """
        if token >= self.size or not self._is_text(token):
            return ""
        found: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(found[3:-1], 16)]).decode(errors="replace")
        return found.replace("▁", " ")

    def pieces(self, tokens: Sequence[int]) -> str:
        """The text of some tokens in a row, with a space where a word begins."""
        return "".join(map(self.piece, tokens))

    def _is_text(self, token: int) -> bool:
        if token in {self.padding, self.end_of_padding} or token < 0:
            return False
        p = self._processor
        return not (p.is_control(token) or p.is_unknown(token))

    def frames(self, seconds: float) -> int:
        """Frames of so much sound; the last one may be in part."""
        return math.ceil(round(seconds * self.frame_rate, 6))

    def row(self, words: Sequence[Word], seconds: float) -> NDArray[np.int16]:
        """One token for each frame of ``seconds`` of sound, (T,).

        Args:
            words: In order of their start; those after the end leave no token.
            seconds: Length of the sound.
        """
        row = np.full(self.frames(seconds), self.padding, np.int16)
        said = [(word, tokens) for word in words if (tokens := self.encode(word.text))]
        starts = [int(word.start * self.frame_rate) for word, _ in said]
        free = 0  # the first frame after the last token
        for (_, tokens), (start, limit) in zip(said, pairwise([*starts, len(row)]), strict=True):
            if self.keep_and_shift:
                start, limit = max(start, free), len(row)  # noqa: PLW2901
            laid = tokens[: max(0, min(limit, len(row)) - start)]
            if laid:
                row[start : start + len(laid)] = laid
                free = start + len(laid)
                if start > 0 and row[start - 1] == self.padding:
                    row[start - 1] = self.end_of_padding
        return row


def require_sentencepiece() -> None:
    """Fail early where the extra is not installed.

    Raises:
        ConfigError: The library sentencepiece is not installed.
    """
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the text of speech needs the library sentencepiece, which is not installed.",
            hint="pip install 'moshi-fl[speech]'",
        ) from error


def _load(model: bytes) -> SentencePieceProcessor:
    require_sentencepiece()
    from sentencepiece import SentencePieceProcessor

    if len(model) > MAX_MODEL_BYTES:
        raise CorruptRecord(
            f"the tokenizer has {len(model)} bytes; {MAX_MODEL_BYTES} are the most."
        )
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    except (RuntimeError, UnicodeDecodeError) as error:  # or what it says of pieces is no text
        raise CorruptRecord(
            "the tokenizer is not a SentencePiece model.",
            hint="Kyutai's is called tokenizer_spm_32k_3.model",
        ) from error
    for token, piece in enumerate(pieces):
        if processor.is_byte(token) and not _BYTE.fullmatch(piece):
            raise CorruptRecord(f"the tokenizer's token {token} is a byte called {piece[:40]!r}.")
    return processor
