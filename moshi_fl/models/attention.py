"""Causal attention for training, and the cheap dropout that goes with it.

On a CPU, PyTorch's fused attention recomputes the probabilities in the backward pass and falls
back to whole T x T matrices under dropout. Here a block of rows meets only the keys that it can
see, as plain batched products, and its probabilities are kept: less arithmetic, more memory
(about B x H x T x T / 2 numbers). On other devices it is ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 96  # of queries in a block; 64 to 128 are equally fast


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, training: bool
) -> Tensor:
    """Attention in which a position sees itself and those before it; (B, H, T, D) like ``q``.

    Args:
        q: Queries (B, H, T, D).
        k: Keys (B, G, T, D), where G divides H: query head h uses key head h // (H / G).
        v: Values (B, G, T, D).
        dropout: Probability with which an attention weight is dropped in training.
        training: Whether dropout applies.
    """
    rate = dropout if training else 0.0
    plain = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and torch.is_grad_enabled():
        return cast("Tensor", _BlockedAttention.apply(q, k, v, rate))  # type: ignore[no-untyped-call]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=rate, is_causal=True, enable_gqa=grouped
    )


class Dropout(nn.Module):
    """Zeroes elements at this rate and scales the rest up, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, the same back."""
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.rate)
        return x * _scaled(keep_mask(x.shape, self.rate), self.rate, x.dtype)


def keep_mask(shape: torch.Size, rate: float) -> Tensor:
    """Random booleans of which ``1 - rate`` are true.

    Eight elements share one 64-bit word of PyTorch's generator, a byte each: a third of the time of
    ``bernoulli_``. The rate is rounded to a 256th.
    """
    count = shape.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64)
    words.random_(-(1 << 63), None)
    return words.view(torch.uint8)[:count].view(shape) >= _threshold(rate)


def _threshold(rate: float) -> int:
    return min(max(round(rate * 256), 1), 255)


def _scaled(keep: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """The mask as a factor: 0, or what makes up for the dropped."""
    return keep.to(dtype).mul_(256 / (256 - _threshold(rate)))


class _BlockedAttention(torch.autograd.Function):
    """Attention by blocks of rows; the probabilities of each block are kept for the gradient.

    All query heads of a key head lie under one another, so that one product serves them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
        B, H, T, D = q.shape
        G = k.shape[1]
        q = (q * D**-0.5).reshape(B * G, H // G, T, D)
        k, v = k.reshape(B * G, T, D), v.reshape(B * G, T, D)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        future = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype).triu(1)
        kept: list[Tensor] = []
        for start, stop in _blocks(T):
            rows = stop - start
            scores = torch.bmm(_rows(q, start, stop), k[:, :stop].transpose(1, 2))
            scores.view(B * G, -1, rows, stop)[..., start:].add_(future[:rows, :rows])
            weights = scores.softmax(-1)
            kept.append(weights)
            if rate:
                kept.append(keep_mask(weights.shape, rate))
                weights = weights * _scaled(kept[-1], rate, weights.dtype)
            y = torch.bmm(weights, v[:, :stop])
            out[:, :, start:stop] = y.view(B * G, -1, rows, D)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.rate, ctx.shape = rate, (B, H, G, T, D)
        return out.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        B, H, G, T, D = ctx.shape
        q, k, v, out, *kept = ctx.saved_tensors
        d_out = d_out.reshape(q.shape)
        # Row sums of weights times their gradients, without the weights (Dao et al. 2022, B.2).
        sums = (d_out * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop), (weights, keep) in zip(_blocks(T), _pairs(kept, ctx.rate), strict=True):
            y, sums_y = _rows(d_out, start, stop), _rows(sums, start, stop)
            dropped = weights if keep is None else weights * keep
            dv[:, :stop].baddbmm_(dropped.transpose(1, 2), y)
            d_scores = torch.bmm(y, v[:, :stop].transpose(1, 2))
            if keep is None:
                d_scores.sub_(sums_y).mul_(weights)
            else:
                d_scores.mul_(dropped).addcmul_(weights, sums_y, value=-1)
            block = torch.bmm(d_scores, k[:, :stop]).mul_(D**-0.5)
            dq[:, :, start:stop] = block.view(B * G, -1, stop - start, D)
            dk[:, :stop].baddbmm_(d_scores.transpose(1, 2), _rows(q, start, stop))
        return dq.view(B, H, T, D), dk.view(B, G, T, D), dv.view(B, G, T, D), None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, ROWS):
        yield start, min(start + ROWS, length)


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows of (B G, H / G, T, D) as (B G, H / G times rows, D)."""
    return x[:, :, start:stop].reshape(len(x), -1, x.shape[-1])


def _pairs(kept: list[Tensor], rate: float) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weights of each block and the scaled mask that was laid over them."""
    if not rate:
        yield from ((weights, None) for weights in kept)
        return
    for weights, keep in zip(kept[::2], kept[1::2], strict=True):
        yield weights, _scaled(keep, rate, weights.dtype)
