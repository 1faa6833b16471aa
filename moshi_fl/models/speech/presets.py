"""Ready-made settings of the ``speech`` family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_fl.models.family import Preset
from moshi_fl.models.speech.family_config import codec_table
from moshi_fl.models.speech.tiny import TEXT_CARD, TINY_MIMI, tiny_text

# Of Kyutai's models: how they are built, whatever their size.
KYUTAI: Mapping[str, Any] = {
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "text_card": 32000,
    "delays": [0, *[0, 1, 1, 1, 1, 1, 1, 1] * 2],
    "hidden_scale": 4.125,
    "norm": "rms_norm_f32",
    "gating": "silu",
    "depformer_gating": "silu",
    "context": 3000,
    "positional_embedding": "rope",
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_pos_emb": "none",
}
MOSHI_7B: Mapping[str, Any] = {
    **KYUTAI,
    "dim": 4096,
    "num_heads": 32,
    "num_layers": 32,
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_max_period": 10000,  # as released; it has no positions
}
SMALL: Mapping[str, Any] = {
    **KYUTAI,
    "dim": 512,
    "num_heads": 8,
    "num_layers": 8,
    "depformer_dim": 256,
    "depformer_num_heads": 4,
    "depformer_num_layers": 4,
}
TINY: Mapping[str, Any] = {
    **KYUTAI,
    "dim": 96,
    "num_heads": 4,
    "num_layers": 2,
    "n_q": 2 * TINY_MIMI.quantizer.n_q,
    "dep_q": TINY_MIMI.quantizer.n_q,
    "card": TINY_MIMI.quantizer.bins,
    "text_card": TEXT_CARD,
    "delays": [0, *[0, *[1] * (TINY_MIMI.quantizer.n_q - 1)] * 2],
    "context": 250,
    "depformer_dim": 64,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "lora_rank": 4,
    "segment_frames": 50,
    "mimi": codec_table(TINY_MIMI),
}


def presets() -> Mapping[str, Preset]:
    """``tiny`` learns visibly in a minute on one core; ``small`` has 118 million parameters.

    ``moshi-7b`` is Kyutai's Moshi of September 2024 with adapters, which are what trains.
    """
    tokenizer = tiny_text()
    return {
        "tiny": Preset(
            model=TINY,
            # A few dialogues are soon learnt by heart; so many steps are still good for others.
            training={"steps": 60, "batch_size": 8, "learning_rate": 1e-3},
            # Denser than the others: it shall show something after one round.
            delta={"codec": "topk", "options": {"keep": 512}},
            evaluation={"sequences": 32},
            tokenizer=tokenizer,
        ),
        "small": Preset(
            model=SMALL,
            training={
                "steps": 200,
                "batch_size": 4,
                "learning_rate": 3e-4,
                "beta2": 0.95,
                "precision": "auto",  # twice as fast where bf16 is native
            },
            delta={"codec": "topk"},
            evaluation={"sequences": 32, "precision": "float32"},
            tokenizer=tokenizer,
            note="The codec's weights are random, too: it tells sounds apart, but what it speaks "
            "is noise. (moshi-fl import-checkpoint DIR --preset small begins with Kyutai's)",
        ),
        "moshi-7b": Preset(
            model={**MOSHI_7B, "lora_rank": 64, "first_codebook_weight": 100.0},
            training={
                "steps": 200,
                "batch_size": 1,
                "accumulation": 16,
                "learning_rate": 2e-6,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "precision": "bf16",
                "trains": "lora",
            },
            delta={"codec": "topk"},
            evaluation={"sequences": 32, "precision": "float32"},
            tokenizer=tokenizer,
        ),
    }
