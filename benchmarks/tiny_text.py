"""Make the tokenizer of small speech models: 512 tokens, by which any text can be written.

    python -m benchmarks.tiny_text moshi_fl/models/speech/tiny_text.model

Ids are laid out as in Kyutai's file: 0 unknown, 1 and 2 begin and end, 3 padding. Then come the
256 bytes, and what the sentences of the test dialogues are made of.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece

from tests.support.espeak import SENTENCES

SIZE = 512


def tiny_text() -> bytes:
    """The file; equal on every machine."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=SIZE,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(tiny_text())
