"""The depth transformer for one frame at a time, where each call's overhead counts.

A frame takes ``dep_q`` steps through all layers with a few rows each, so that what surrounds the
products would cost as much as they do. Here weights, and the keys of a frame, are laid out once;
nothing but results is allocated later. Same numbers as ``LMModel.forward_depth``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.models import int8
from moshi_fl.models.speech.attention import floating
from moshi_fl.models.speech.layers import Gating, RMSNorm, sinusoids
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.transformer import StreamingTransformerLayer

Rows = Callable[[Tensor], Tensor]
"""From (B, in) to (B, out)."""


class Part(NamedTuple):
    """One layer with the weights of one step."""

    norm1: Rows
    inputs: Rows
    outputs: Rows
    scale1: Rows | None
    norm2: Rows
    feed_forward: Rows
    scale2: Rows | None


class DepthDecoder:
    """Chooses the audio tokens of a frame; for ``batch`` items at once.

    Args:
        lm: Weights of plain layers are used as they lie at this moment.
        batch: Items.
    """

    def __init__(self, lm: LMModel, batch: int) -> None:
        c = lm.config.depth
        self.lm, self.steps = lm, lm.config.dep_q
        self.heads, self.kv_heads = c.num_heads, c.num_heads // c.kv_repeat
        sets = c.sets or (0,) * self.steps
        layers = [cast("StreamingTransformerLayer", layer) for layer in lm.depformer.layers]
        self.parts = [[_part(layer, weights) for layer in layers] for weights in sets]
        like = floating(lm.depformer)
        # A layer's keys and values of each step: (layers, 2, B, G, steps, D).
        shape = (len(layers), 2, batch, self.kv_heads, self.steps, c.d_model // c.num_heads)
        self.kept = torch.zeros(shape, dtype=like.dtype, device=like.device)
        # Views of them: what a step writes, and what it sees.
        self.places = [[kept[..., s, :] for kept in self.kept] for s in range(self.steps)]
        self.seen = [[kept[..., : s + 1, :] for kept in self.kept] for s in range(self.steps)]
        self.position: Tensor | None = None
        if c.positional_embedding.startswith("sin"):
            table = sinusoids(torch.arange(self.steps)[None], c.d_model, c.max_period)
            self.position = (c.positional_scale * table[0]).to(like.device, like.dtype)

    @torch.no_grad()
    def frame(self, hidden: Tensor, text: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """The audio tokens (B, dep_q) of a frame.

        Args:
            hidden: Of the temporal transformer, (B, C).
            text: The frame's text token, (B,).
            choose: Given logits (B, card), the token (B,).
        """
        tokens, token = [], text
        for step in range(self.steps):
            x = self.lm.depth_input(step, hidden, token)  # (B, D)
            if self.position is not None:
                x = x + self.position[step]
            for layer, part in enumerate(self.parts[step]):
                x = self._layer(x, part, self.places[step][layer], self.seen[step][layer])
            token = choose(self.lm.depth_head(step, x))
            tokens.append(token)
        return torch.stack(tokens, dim=1)

    def _layer(self, x: Tensor, part: Part, place: Tensor, seen: Tensor) -> Tensor:
        """``x``: (B, D), the same back; its key and value go to ``place``, a part of ``seen``."""
        H, G = self.heads, self.kv_heads
        qkv = part.inputs(part.norm1(x)).view(len(x), 1, H + 2 * G, -1).transpose(1, 2)
        place.copy_(qkv[:, H:, 0].view(len(x), 2, G, -1).transpose(0, 1))
        y = F.scaled_dot_product_attention(qkv[:, :H], seen[0], seen[1], enable_gqa=H != G)
        y = part.outputs(y.reshape(x.shape))
        x = x + (y if part.scale1 is None else part.scale1(y))
        y = part.feed_forward(part.norm2(x))
        return x + (y if part.scale2 is None else part.scale2(y))


def _part(layer: StreamingTransformerLayer, weights: int) -> Part:
    attention = layer.self_attn
    return Part(
        _norm(layer.norm1),
        _linear(attention.in_projs[weights]),
        _linear(attention.out_projs[weights]),
        _scale(layer.layer_scale_1),
        _norm(layer.norm2),
        _feed_forward(layer, weights),
        _scale(layer.layer_scale_2),
    )


def _linear(module: nn.Module) -> Rows:
    if type(module) is nn.Linear:
        return int8.linear(module.weight, module.bias, "float32")
    return module


def _scale(module: nn.Module) -> Rows | None:
    return None if isinstance(module, nn.Identity) else module


def _norm(module: nn.Module) -> Rows:
    gain = module.alpha.view(-1) if isinstance(module, RMSNorm) else None
    if gain is None or gain.dtype != torch.float32:
        return module
    return lambda x: F.rms_norm(x, gain.shape, gain, module.epsilon)


def _feed_forward(layer: StreamingTransformerLayer, weights: int) -> Rows:
    if not layer.gated:
        return partial(layer.feed_forward, sets=None)
    gate = layer.gating[weights] if isinstance(layer.gating, nn.ModuleList) else layer.gating
    assert isinstance(gate, Gating)
    inputs, outputs = _linear(gate.linear_in), _linear(gate.linear_out)

    def feed_forward(x: Tensor) -> Tensor:
        u, w = inputs(x).chunk(2, dim=-1)
        return outputs(F.silu(u).mul_(w))

    return feed_forward
