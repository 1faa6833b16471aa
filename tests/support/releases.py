"""Released files in miniature: the names, types and layout of Kyutai's, with small tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moshi_fl.models.speech.checkpoints import released_state
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.tiny import tiny_text
from tests.support.mimis import small_spec, small_weights
from tests.support.speeches import FIXTURES, Reference

MODEL = "model.safetensors"
CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"
TEXT = "tokenizer_spm_32k_3.model"


def release_config(**changes: Any) -> dict[str, Any]:
    """A ``config.json``: the small reference model, with room for our small tokenizer."""
    return {**Reference("lm_small").spec["cfg"], "text_card": 512, **changes}


def released_lm(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """A language model's tensors under released names, bfloat16."""
    torch.manual_seed(seed)
    model = LMModel(LMConfig.from_kyutai(config))
    return {name: value.bfloat16().contiguous() for name, value in released_state(model).items()}


def write_release(folder: Path, **changes: Any) -> Path:
    """A folder as Kyutai's hub of models gives it."""
    folder.mkdir(parents=True)
    config = release_config(mimi_config_name="mimi.json", **changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mimi.json").write_text(json.dumps(small_spec()["cfg"]))
    (folder / TEXT).write_bytes(tiny_text())
    save_file(released_lm(config), folder / MODEL, {"format": "pt"})
    save_file({n: t.contiguous() for n, t in small_weights().items()}, folder / CODEC)
    return folder


def names_of_the_7b(layers: int, depth_layers: int) -> set[str]:
    """Names of the released 7B, of its first layers."""
    keys = json.loads((FIXTURES / "keys.json").read_text())["lm_7b"]["keys"]
    kept = set()
    for name in keys:
        found = re.match(r"(transformer|depformer)\.layers\.(\d+)\.", name)
        most = {"transformer": layers, "depformer": depth_layers}
        if found is None or int(found[2]) < most[found[1]]:
            kept.add(name)
    return kept
