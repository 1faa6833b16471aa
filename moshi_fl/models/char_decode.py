"""The character transformer for generation: one token at a time, keys and values kept.

The arithmetic is ``CharTransformer.forward``'s, written without module calls: at one token the
calls would cost as much as the mathematics. Weights are used in place, memory is taken once.

Positions are added to the input, so each key depends on where its token stood when it was read:
keys cannot be shifted along, and a window that slides has to be read anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.models.char import Block, CharTransformer
from moshi_fl.models.int8 import Linear, Storage, linear


@dataclass(frozen=True)
class _Layer:
    """A block's layers, and its memory of the tokens read so far."""

    memory: Tensor  # (2, H, context, D): keys and values
    attention_in: Linear
    attention_out: Linear
    ff_in: Linear
    ff_out: Linear
    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]


class CharDecoder:
    """Reads tokens and gives the logits after the last one. Not for two threads at once.

    Args:
        model: Its weights are used as they are at each step.
        weights: ``"int8"`` rounds the matrices once, at the start, and reads single tokens with
            them: a quarter of the memory traffic, which pays where the CPU has AVX512.
    """

    @torch.inference_mode()
    def __init__(self, model: CharTransformer, weights: Storage = "float32") -> None:
        self._storage = weights
        self._model, self.context, self.length = model, model.config.context, 0
        self._width, self._heads = (model.config.d_model,), model.config.n_head
        self._layers = [self._layer(cast("Block", block)) for block in model.blocks]
        self._head = linear(model.fc_out.weight, model.fc_out.bias, "float32")

    def _layer(self, block: Block) -> _Layer:
        attention = block.attn
        first, second = cast("nn.Linear", block.ff[0]), cast("nn.Linear", block.ff[2])
        (width,) = self._width
        shape = (2, self._heads, self.context, width // self._heads)
        return _Layer(
            memory=attention.in_proj_weight.new_zeros(shape),
            attention_in=self._linear(attention.in_proj_weight, attention.in_proj_bias),
            attention_out=self._linear(attention.out_proj.weight, attention.out_proj.bias),
            ff_in=self._linear(first.weight, first.bias),
            ff_out=self._linear(second.weight, second.bias),
            norm1=(block.norm1.weight, block.norm1.bias),
            norm2=(block.norm2.weight, block.norm2.bias),
        )

    def _linear(self, weight: Tensor, bias: Tensor) -> Linear:
        return linear(weight, bias, self._storage)

    def restart(self, tokens: list[int]) -> Tensor:
        """Forget everything and read these tokens; the logits (V,) after the last."""
        self.length = 0
        return self._read(tokens)

    def step(self, token: int) -> Tensor:
        """Read one more token, with ``length < context``; the logits (V,) after it."""
        return self._read([token])

    @torch.inference_mode()
    def _read(self, tokens: list[int]) -> Tensor:
        start, stop = self.length, self.length + len(tokens)
        model = self._model
        ids = torch.tensor(tokens, device=model.positions.device)
        x = F.embedding(ids, model.embedding.weight)  # (T, C)
        x = x + model.positions[start:stop].to(x.dtype)
        block = self._pre_norm if model.config.norm == "pre" else self._post_norm
        for layer in self._layers:
            x = block(layer, x, start, stop)
        x = x[-1:]
        if model.ln_f is not None:
            x = F.layer_norm(x, self._width, model.ln_f.weight, model.ln_f.bias)
        self.length = stop
        return self._head(x)[0]

    def _post_norm(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        y = self._attention(layer, x, start, stop)
        x = F.layer_norm(y.add_(x), self._width, *layer.norm1)
        y = layer.ff_out(F.gelu(layer.ff_in(x)))
        return F.layer_norm(y.add_(x), self._width, *layer.norm2)

    def _pre_norm(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        y = F.layer_norm(x, self._width, *layer.norm1)
        x = self._attention(layer, y, start, stop).add_(x)
        y = F.layer_norm(x, self._width, *layer.norm2)
        return layer.ff_out(F.gelu(layer.ff_in(y))).add_(x)

    def _attention(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        qkv = layer.attention_in(x).view(len(x), 3, self._heads, -1).permute(1, 2, 0, 3)
        layer.memory[:, :, start:stop] = qkv[1:]
        seen = layer.memory[:, :, :stop]  # (2, H, L, D)
        y = F.scaled_dot_product_attention(
            qkv[:1],
            seen[:1],
            seen[1:],
            is_causal=len(x) > 1,  # then start is 0; a single token sees all before it
        )
        y = y[0].transpose(0, 1).reshape(x.shape)  # (T, C)
        return layer.attention_out(y)
