"""What small speech models come with: a tokenizer that any text fits in, and a codec.

Both are made from the sentences and voices of the test dialogues (``benchmarks/tiny_text.py`` and
``benchmarks/tiny_codec.py``): enough to learn and to test with, no match for Kyutai's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.models.speech.quantizer import QuantizerConfig
from moshi_fl.models.speech.seanet import SeanetConfig
from moshi_fl.models.speech.transformer import TransformerConfig
from moshi_fl.weights import open_weights

TEXT_CARD = 512  # tokens of the tokenizer
TINY_MIMI = MimiConfig(
    seanet=SeanetConfig(dimension=48, n_filters=4),
    quantizer=QuantizerConfig(dimension=16, n_q=4, bins=256),
    transformer=TransformerConfig(
        d_model=48,
        num_heads=4,
        num_layers=1,
        dim_feedforward=128,
        context=50,  # 2 s
        positional_embedding="rope",
        layer_scale=0.01,
    ),
)
"""Mimi's rates and layers, four hundred times smaller: 4 codebooks of 256."""


def tiny_text() -> bytes:
    """A SentencePiece file of 512 tokens, with ids laid out as in Kyutai's."""
    return Path(__file__).with_name("tiny_text.model").read_bytes()


def tiny_codec() -> Mimi:
    """A trained codec of 24 kHz and 12.5 frames a second, ready for use; 4 codebooks of 256."""
    arrays = open_weights(Path(__file__).with_name("tiny_codec.safetensors"))
    mimi = Mimi(TINY_MIMI)
    load_checkpoint(mimi, {name: torch.tensor(array) for name, array in arrays.items()})
    return mimi.eval()
