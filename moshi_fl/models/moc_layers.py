"""Parts of the MoC model that every transformer has: RMSNorm, rotary positions, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moshi_fl.models.attention import Dropout, causal_attention
from moshi_fl.models.moc_config import MocConfig

EPSILON = 1e-6
KeyValue = tuple[Tensor, Tensor]
"""Keys after rotation and values of one layer, each (B, n_kv_heads, L, head_dim)."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """Divides each row by its root mean square and multiplies by a gain (Zhang, Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back; the mean square is taken in float32 at least."""
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, (x.shape[-1],), self.weight, EPSILON)
        return rms_norm(x, self.weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    """``x`` (..., C) over the root mean square of each row, times ``weight`` (C,)."""
    y: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


def inverse_rms(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """One over the root mean square of each row, (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    inverse: Tensor = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
    return inverse


class _RMSNorm(torch.autograd.Function):
    """On a CPU the composite ``F.rms_norm`` runs at a fifth of the memory's speed; this does not.

    With r = 1 / rms and n = x r: y = n w; dx = r (dy w - n mean(dy w n)); dw = sum(dy n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = inverse_rms(x, epsilon)
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        y: Tensor = normal * weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, weight = ctx.saved_tensors
        product = dy * normal
        rows = product.flatten(0, -2)
        dw = rows.sum(0, dtype=wide(rows.dtype)).to(weight.dtype)
        share = torch.mv(rows, weight.to(rows.dtype)).div_(-dy.shape[-1])  # (rows,)
        dx = (dy * weight).addcmul_(normal, share.view(inverse.shape)).mul_(inverse)
        return dx, dw, None


class Rotary(nn.Module):
    """Rotates pairs of columns by an angle that grows with the position (Su et al. 2021).

    Columns 2i and 2i + 1 turn by ``position * theta ** (-2i / D)``. The tables stay float32
    whatever the module is converted to: a bfloat16 angle is not a rotation any more.
    """

    table: Tensor  # (2, L, D): cosines, and sines with the sign of the pair's first column turned

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.length, self.width, self.theta = config.max_seq_len, config.head_dim, config.rope_theta
        self.register_buffer("table", self.turns(0, self.length), persistent=False)

    def turns(self, start: int, stop: int) -> Tensor:
        """Cosines and signed sines of these positions, (2, stop - start, D)."""
        rates = self.theta ** (-torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        angles = torch.arange(start, stop, dtype=torch.float64)[:, None] * rates  # (L, D / 2)
        sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(1)
        return torch.stack([angles.cos().repeat_interleave(2, 1), sines]).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.table.dtype != torch.float32:
            self.table = self.turns(0, self.length).to(self.table.device)
        return self

    def forward(self, x: Tensor, start: int) -> Tensor:
        """``x``: (B, T, H, D), its first row at position ``start``; the same back."""
        return rotate(x, self.table[:, start : start + x.shape[1]])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """``x`` (B, T, H, D) turned by ``turns`` (2, T, D), in float32 at least."""
    cosine, sine = turns[:, None, :, None]
    y = x.to(wide(x.dtype))
    swapped = y.view(*y.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(y * cosine, swapped, sine).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with fewer key heads than query heads (Ainslie et al. 2023)."""

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.dropout, self.dropped = config.dropout, Dropout(config.dropout)
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.wqkv = nn.Linear(config.d_model, rows, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """``x``: (B, T, C), after ``past``; the same back, and keys and values of all so far."""
        B, T, C = x.shape
        H, G = self.n_heads, self.n_kv_heads
        qkv = self.wqkv(x).view(B, T, H + 2 * G, -1)  # (B, T, H + 2 G, D)
        start = past[0].shape[2] if past else 0
        qk = rotary(qkv[:, :, : H + G], start).transpose(1, 2)  # (B, H + G, T, D)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, :, H + G :].transpose(1, 2)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if past is None:
            y = causal_attention(q, k, v, dropout=self.dropout, training=self.training)
        else:
            y = self._attend(q, k, v)
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        return self.dropped(y), (k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of rows that follow a past: row t of T sees the first L - T + t + 1 keys."""
        T, L = q.shape[2], k.shape[2]
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T) if T > 1 else None
        groups = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, mask)
