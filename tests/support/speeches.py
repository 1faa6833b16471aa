"""Small speech models, and the reference's numbers for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig

FIXTURES = Path(__file__).parents[1] / "fixtures/speech"
SHARED = Path(__file__).parents[3] / "shared/fixtures/speech"


class Reference:
    """One fixture: its configuration, and its tensors by name."""

    def __init__(self, name: str, folder: Path = FIXTURES) -> None:
        self.spec: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        path = folder / f"{name}.safetensors"
        self.tensors: dict[str, Tensor] = load_file(path) if path.exists() else {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def lm(self) -> LMModel:
        model = LMModel(LMConfig.from_kyutai(self.spec["cfg"]))
        load_checkpoint(model, self.part("w."))
        return model


def not_in_the_repository(name: str) -> Path:
    """The folder of a file that may not be copied here; without one the test is skipped."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} may not be copied into the repository, and is not beside it")
    return SHARED


def worst(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference, where ``mask`` holds."""
    difference = (found.detach() - wanted).abs()
    return float((difference if mask is None else difference[mask]).max())


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the root mean square of what is wanted."""
    return worst(found, wanted) / float(wanted.square().mean().sqrt())


def tiny(**changes: Any) -> LMConfig:
    """A Moshi in miniature: 4 streams, 2 of them predicted."""
    settings: dict[str, Any] = {
        "dim": 16,
        "num_heads": 2,
        "num_layers": 3,
        "n_q": 3,
        "dep_q": 2,
        "delays": (0, 0, 2, 1),
        "card": 20,
        "text_card": 24,
        "context": 5,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "hidden_scale": 4.125,
        "depformer_dim": 8,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_multi_linear": True,
        "depformer_weights_per_step": True,
        "depformer_pos_emb": "none",
    }
    return LMConfig(**settings | changes)


def lm_of(config: LMConfig, seed: int = 0) -> LMModel:
    torch.manual_seed(seed)
    return LMModel(config)


def codes_of(config: LMConfig, batch: int = 2, length: int = 30, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_card, (batch, 1, length), generator=generator)
    audio = torch.randint(config.card, (batch, config.n_q, length), generator=generator)
    return torch.cat([text, audio], dim=1)


class Spelling:
    """A text that shows the tokens."""

    def pieces(self, ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in ids if token not in {0, 3})
