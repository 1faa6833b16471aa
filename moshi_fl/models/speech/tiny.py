"""What small speech models come with: a tokenizer that any text fits in.

``benchmarks/tiny_text.py`` makes it.
"""

from __future__ import annotations

from pathlib import Path

TEXT_CARD = 512  # tokens of the tokenizer


def tiny_text() -> bytes:
    """A SentencePiece file of 512 tokens, with ids laid out as in Kyutai's."""
    return Path(__file__).with_name("tiny_text.model").read_bytes()
