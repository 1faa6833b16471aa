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

from moshi_fl.models.speech.attention import floating
from moshi_fl.models.speech.layers import (
    Gating,
    RMSNorm,
    rotate,
    rotation,
    rotation_rates,
    sinusoids,
)
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.product import Product, Rows
from moshi_fl.models.speech.transformer import StreamingTransformerLayer


class Part(NamedTuple):
    """One layer with the weights of one step."""

    norm1: Rows
    inputs: Product
    outputs: Product
    scale1: Rows | None
    norm2: Rows
    gate: Product | None  # None where there is none: then ``feed_forward`` is all of it
    feed_forward: Rows
    down: Product | None
    scale2: Rows | None


class Place(NamedTuple):
    """Of one layer and step: where its queries, keys and values go, and views of what it sees.

    ``qkv`` (B, rows); ``pairs``, its queries and keys, (B, H + G, D); ``q`` (B, H, 1, D); ``k`` and
    ``v`` (B, G, steps so far, D).
    """

    qkv: Tensor
    pairs: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


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
        like, width = floating(lm.depformer), c.d_model // c.num_heads
        heads = self.heads + 2 * self.kv_heads
        # Queries, keys and values of each layer and step: (layers, steps, B, heads, D).
        shape = (len(layers), self.steps, batch, heads, width)
        kept = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.places = [[self._place(layer, s) for layer in kept] for s in range(self.steps)]
        self.position: Tensor | None = None
        self.turns: Tensor | None = None  # (steps, 1, D / 2)
        self.halves = c.positional_embedding == "rope_concat"
        steps = torch.arange(self.steps, device=like.device)[None]
        if c.positional_embedding.startswith("sin"):
            table = sinusoids(steps, c.d_model, c.max_period)
            self.position = (c.positional_scale * table[0]).to(like.dtype)
        if "rope" in c.positional_embedding:
            self.turns = rotation(steps, rotation_rates(width, c.max_period, like.device))[0]

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
            turn = None if self.turns is None else self.turns[step]
            for part, place in zip(self.parts[step], self.places[step], strict=True):
                x = self._layer(x, part, place, turn)
            token = choose(self.lm.depth_head(step, x))
            tokens.append(token)
        return torch.stack(tokens, dim=1)

    def _place(self, kept: Tensor, step: int) -> Place:
        """Of a layer's ``kept`` (steps, B, heads, D)."""
        seen = kept[: step + 1].permute(1, 2, 0, 3)  # (B, heads, steps so far, D)
        q, k, v = torch.split(seen, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        now = kept[step]
        return Place(now.flatten(1), now[:, : -self.kv_heads], q[:, :, -1:], k, v)

    def _layer(self, x: Tensor, part: Part, place: Place, turn: Tensor | None) -> Tensor:
        """``x``: (B, D), the same back; ``turn``: of this step's rotary position."""
        part.inputs.into(place.qkv, part.norm1(x))
        if turn is not None:
            place.pairs.copy_(rotate(place.pairs, turn, halves=self.halves))
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(place.q, place.k, place.v, enable_gqa=grouped)
        x = _added(x, y.reshape(x.shape), part.outputs, part.scale1)
        y = part.norm2(x)
        if part.down is None:
            y = part.feed_forward(y)
            return x + (y if part.scale2 is None else part.scale2(y))
        assert part.gate is not None
        u, w = part.gate(y).chunk(2, dim=-1)
        return _added(x, F.silu(u).mul_(w), part.down, part.scale2)


def _added(x: Tensor, y: Tensor, product: Product, scale: Rows | None) -> Tensor:
    return product.onto(x, y) if scale is None else x + scale(product(y))


def _part(layer: StreamingTransformerLayer, weights: int) -> Part:
    attention, gate = layer.self_attn, None
    if layer.gated:
        found = layer.gating
        gate = cast("Gating", found[weights] if isinstance(found, nn.ModuleList) else found)
    return Part(
        _norm(layer.norm1),
        Product(attention.in_projs[weights]),
        Product(attention.out_projs[weights]),
        _scale(layer.layer_scale_1),
        _norm(layer.norm2),
        None if gate is None else Product(gate.linear_in),
        partial(layer.feed_forward, sets=None),
        None if gate is None else Product(gate.linear_out),
        _scale(layer.layer_scale_2),
    )


def _scale(module: nn.Module) -> Rows | None:
    return None if isinstance(module, nn.Identity) else module


def _norm(module: nn.Module) -> Rows:
    """RMSNorm as one fused operator: the LayerNorm of a row and its negative, whose mean is 0."""
    if not isinstance(module, RMSNorm) or module.alpha.dtype != torch.float32:
        return module
    gain, epsilon, width = (
        module.alpha.detach().view(-1).repeat(2),
        module.epsilon,
        module.alpha.numel(),
    )

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(torch.cat([x, -x], dim=1), gain.shape, gain, None, epsilon)[:, :width]

    return norm
