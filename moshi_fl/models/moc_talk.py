"""Attention among the three or so states of a token, on a CPU.

Products of 3 x 64 matrices are too small for a matrix library, and bringing heads together copies
everything. Here each pair of states meets element by element, a block of tokens at a time that
stays in the cache, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # tokens in a block


def talk(qkv: Tensor, n_heads: int, heard: Tensor | None) -> Tensor:
    """Every state of a token attends to those of the token that are heard.

    Args:
        qkv: Queries, keys and values side by side, (N, S, 3 C), float32 or wider.
        n_heads: Divides C.
        heard: Which states may be looked at, (N, S); a token with none gets zeros.

    Returns:
        (N, S, C).
    """
    y: Tensor = _Talk.apply(qkv, n_heads, heard)  # type: ignore[no-untyped-call]
    return y


class _Talk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int, heard: Tensor | None) -> Tensor:
        N, S, width = qkv.shape
        states = qkv.view(N, S, 3, n_heads, -1)
        y = qkv.new_empty(N, S, n_heads, width // 3 // n_heads)
        weights = qkv.new_empty(S, S, N, n_heads)
        for rows in _blocks(N):
            part = weights[:, :, rows]
            q, k, v = states[rows].unbind(2)  # (n, S, H, D)
            part.copy_(_weights(q, k, None if heard is None else heard[rows]))
            for i in range(S):
                torch.mul(v[:, 0], part[i, 0, ..., None], out=y[rows, i])
                for j in range(1, S):
                    y[rows, i].addcmul_(v[:, j], part[i, j, ..., None])
        ctx.save_for_backward(states, weights)
        return y.view(N, S, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        states, weights = ctx.saved_tensors
        N, S, _, H, D = states.shape
        grads, dy = torch.zeros_like(states), dy.reshape(N, S, H, D)
        for rows in _blocks(N):
            _meet_again(states[rows], weights[:, :, rows], dy[rows], grads[rows])
        return grads.view(N, S, -1), None, None


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, ROWS):
        yield slice(start, min(start + ROWS, length))


def _weights(q: Tensor, k: Tensor, heard: Tensor | None) -> Tensor:
    """Softmax over the second axis of (S, S, n, H): which state looks at which."""
    n, S, H, D = q.shape
    scores = q.new_empty(S, S, n, H)
    for i in range(S):
        for j in range(S):
            torch.sum(q[:, i] * k[:, j], -1, out=scores[i, j])
    scores.mul_(D**-0.5)
    if heard is None:
        return scores.softmax(1)
    mask = heard.t()[None, :, :, None]  # (1, S, n, 1)
    return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(1).mul_(mask)


def _meet_again(states: Tensor, weights: Tensor, dy: Tensor, grads: Tensor) -> None:
    """Fill in the gradients of a block's queries, keys and values."""
    (q, k, v), (dq, dk, dv) = states.unbind(2), grads.unbind(2)
    S = q.shape[1]
    dweights = torch.empty_like(weights)
    for i in range(S):
        for j in range(S):
            torch.sum(dy[:, i] * v[:, j], -1, out=dweights[i, j])
            dv[:, j].addcmul_(dy[:, i], weights[i, j, ..., None])
    mean = (dweights * weights).sum(1, keepdim=True)
    dscores = dweights.sub_(mean).mul_(weights).mul_(q.shape[-1] ** -0.5)
    for i in range(S):
        for j in range(S):
            dq[:, i].addcmul_(k[:, j], dscores[i, j, ..., None])
            dk[:, j].addcmul_(q[:, i], dscores[i, j, ..., None])
