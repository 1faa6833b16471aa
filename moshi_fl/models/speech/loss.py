"""The loss of fine-tuning: cross-entropy in nats, with weights for what matters more or less."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_fl.models.moc_layers import wide
from moshi_fl.models.speech.lm import LMOutput
from moshi_fl.models.speech.lm_config import LMConfig


class Losses(NamedTuple):
    """Scalars in nats per token: ``total = text + audio``."""

    total: Tensor
    text: Tensor
    audio: Tensor


def losses(
    output: LMOutput,
    codes: Tensor,
    config: LMConfig,
    *,
    first_codebook_weight: float = 1.0,
    text_padding_weight: float = 0.5,
) -> Losses:
    """How far ``output`` is from the ``codes`` (B, n_q + 1, T) that it was made from.

    Args:
        output: Of the model.
        codes: What it has read and should have predicted.
        config: Of the model; says which text tokens are padding.
        first_codebook_weight: Of the semantic codebook; each other one has weight 1.
        text_padding_weight: Of text padding; each other text token has weight 1.
    """
    text, audio = codes[:, :1], codes[:, 1 : 1 + config.dep_q]
    text_weights = output.text_mask.to(wide(output.text_logits.dtype))
    padding = [config.existing_text_padding_id, config.existing_text_end_padding_id]
    is_padding = torch.isin(text, torch.tensor(padding, device=text.device))
    text_weights = torch.where(is_padding, text_padding_weight * text_weights, text_weights)
    weights = output.mask.to(text_weights.dtype)
    weights = torch.cat([first_codebook_weight * weights[:, :1], weights[:, 1:]], dim=1)
    first = weighted_mean(cross_entropy(output.text_logits, text), text_weights)
    second = weighted_mean(cross_entropy(output.logits, audio), weights)
    return Losses(first + second, first, second)


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Nats of each token, (B, K, T), 0 for the zero token; logits (B, K, T, V), codes (B, K, T)."""
    flat = logits.flatten(0, 2).to(wide(logits.dtype))
    nats = F.cross_entropy(flat, codes.flatten(), ignore_index=-1, reduction="none")
    return nats.view(codes.shape)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean, 0 where all weights are."""
    total = weights.sum()
    return (weights * values).sum() / torch.where(total > 0, total, 1)
