"""Small MoC models with weights that make differences show, and tokens for them."""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_fl.models.moc import Moc
from moshi_fl.models.moc_config import MocConfig

TINY = MocConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=61,
    multiple_of=8,
    max_seq_len=32,
    n_experts=4,
    grad_ckpt_policy="none",
    n_reasoning_steps=2,
)


def model_of(config: MocConfig = TINY, seed: int = 0, gain: float = 5.0) -> Moc:
    """Random weights, larger than fresh ones, so that differences show."""
    torch.manual_seed(seed)
    model = Moc(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Moc, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(idx, targets).loss.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
