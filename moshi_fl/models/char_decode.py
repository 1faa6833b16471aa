"""The character transformer for generation: one token at a time, keys and values kept.

The arithmetic is ``CharTransformer.forward``'s, written without module calls: at one token the
calls would cost as much as the mathematics. Weights are used in place, memory is taken once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.models.char import Block, CharTransformer


@dataclass(frozen=True)
class _Layer:
    """A block's weights, transposed for ``addmm``, and its memory of the tokens read so far."""

    memory: Tensor  # (2, H, context, D): keys and values
    attention_in: tuple[Tensor, Tensor]
    attention_out: tuple[Tensor, Tensor]
    ff_in: tuple[Tensor, Tensor]
    ff_out: tuple[Tensor, Tensor]
    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]


class CharDecoder:
    """Reads tokens and gives the logits after the last one. Not for two threads at once."""

    @torch.inference_mode()
    def __init__(self, model: CharTransformer) -> None:
        self._model, self.context, self.length = model, model.config.context, 0
        self._width, self._heads = (model.config.d_model,), model.config.n_head
        self._layers = [self._layer(cast("Block", block)) for block in model.blocks]
        self._head = _transposed(model.fc_out.weight, model.fc_out.bias)

    def _layer(self, block: Block) -> _Layer:
        attention = block.attn
        first, second = cast("nn.Linear", block.ff[0]), cast("nn.Linear", block.ff[2])
        (width,) = self._width
        shape = (2, self._heads, self.context, width // self._heads)
        return _Layer(
            memory=attention.in_proj_weight.new_zeros(shape),
            attention_in=_transposed(attention.in_proj_weight, attention.in_proj_bias),
            attention_out=_transposed(attention.out_proj.weight, attention.out_proj.bias),
            ff_in=_transposed(first.weight, first.bias),
            ff_out=_transposed(second.weight, second.bias),
            norm1=(block.norm1.weight, block.norm1.bias),
            norm2=(block.norm2.weight, block.norm2.bias),
        )

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
        return _linear(self._head, x)[0]

    def _post_norm(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        y = self._attention(layer, x, start, stop)
        x = F.layer_norm(y.add_(x), self._width, *layer.norm1)
        y = _linear(layer.ff_out, F.gelu(_linear(layer.ff_in, x)))
        return F.layer_norm(y.add_(x), self._width, *layer.norm2)

    def _pre_norm(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        y = F.layer_norm(x, self._width, *layer.norm1)
        x = self._attention(layer, y, start, stop).add_(x)
        y = F.layer_norm(x, self._width, *layer.norm2)
        return _linear(layer.ff_out, F.gelu(_linear(layer.ff_in, y))).add_(x)

    def _attention(self, layer: _Layer, x: Tensor, start: int, stop: int) -> Tensor:
        qkv = _linear(layer.attention_in, x).view(len(x), 3, self._heads, -1).permute(1, 2, 0, 3)
        layer.memory[:, :, start:stop] = qkv[1:]
        seen = layer.memory[:, :, :stop]  # (2, H, L, D)
        y = F.scaled_dot_product_attention(
            qkv[:1],
            seen[:1],
            seen[1:],
            is_causal=len(x) > 1,  # then start is 0; a single token sees all before it
        )
        y = y[0].transpose(0, 1).reshape(x.shape)  # (T, C)
        return _linear(layer.attention_out, y)


def _transposed(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.t(), bias


def _linear(layer: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    weight, bias = layer
    return torch.addmm(bias, x, weight)
