"""Small parts of the speech transformers: norms, gating, layer scale, positions.

Parameter names are those of Kyutai's checkpoints.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import ConfigError
from moshi_fl.models.moc_layers import rms_norm, wide
from moshi_fl.models.speech.product import Linear

NormName = Literal["layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32"]
PositionName = Literal["sin", "rope", "rope_concat", "sin_rope", "none"]


class RMSNorm(nn.Module):
    """Divides each row by its root mean square and multiplies by a gain (Zhang, Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float = 1e-5, *, in_float32: bool = False) -> None:
        super().__init__()
        self.epsilon, self.in_float32 = epsilon, in_float32
        self.alpha = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back."""
        dtype = wide(x.dtype) if self.in_float32 else x.dtype
        gain = self.alpha.view(-1).to(dtype)
        y = x.to(dtype)
        if torch.is_grad_enabled() and not (x.is_cuda or torch.compiler.is_compiling()):
            return rms_norm(y, gain, self.epsilon).to(x.dtype)  # its gradient takes half the time
        return F.rms_norm(y, gain.shape, gain, self.epsilon).to(x.dtype)


class LayerNormF32(nn.LayerNorm):
    """Layer normalisation that computes in float32 whatever the weights are."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back."""
        dtype = wide(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(name: NormName, width: int) -> nn.Module:
    """The norm of this name.

    Raises:
        ConfigError: There is none.
    """
    match name:
        case "layer_norm":
            return nn.LayerNorm(width, eps=1e-5)
        case "layer_norm_f32":
            return LayerNormF32(width)
        case "rms_norm":
            return RMSNorm(width)
        case "rms_norm_f32":
            return RMSNorm(width, 1e-8, in_float32=True)
    raise ConfigError(
        f"norm = {name!r} is unknown; known: layer_norm, layer_norm_f32, rms_norm, rms_norm_f32."
    )


class LayerScale(nn.Module):
    """Multiplies each channel by a factor that starts small (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back."""
        return self.scale * x


class Gating(nn.Module):
    """Feed-forward with a gate: ``linear_out(silu(u) * w)`` (Shazeer 2020)."""

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        hidden = 21 * width // 8 if feed_forward == 4 * width else 2 * feed_forward // 3
        self.linear_in = Linear(width, 2 * hidden, bias=False)
        self.linear_out = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back."""
        u, w = self.linear_in(x).chunk(2, dim=-1)  # (..., hidden) each
        return self.linear_out(F.silu(u) * w)  # type: ignore[no-any-return]


def rotation_rates(width: int, max_period: float, device: torch.device) -> Tensor:
    """Radians a position by which each pair of columns turns, (D / 2,) float32."""
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    return torch.exp(pairs * (-math.log(max_period) * 2 / width))


def rotation(positions: Tensor, rates: Tensor) -> Tensor:
    """Turns of these positions (B, T) as complex numbers of length one, (B, T, 1, D / 2).

    Angles are float32: exact to a position of 2 ** 24, which is 15 days of frames.
    """
    angles = positions.to(rates.dtype)[:, :, None, None] * rates
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor, *, halves: bool = False) -> Tensor:
    """Rotary positions (Su et al. 2021): ``x`` (B, T, ..., D) by ``turns`` (B, T, ..., D / 2).

    Columns 2i and 2i + 1 are a pair, or i and i + D / 2 with ``halves``; in float32 at least.
    """
    y = x.to(wide(x.dtype))
    if halves:
        turned = torch.complex(*y.chunk(2, dim=-1)) * turns
        return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
    pairs = torch.view_as_complex(y.view(*y.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def sinusoids(positions: Tensor, width: int, max_period: float) -> Tensor:
    """Position vectors (B, T, C) of ``positions`` (B, T): all cosines, then all sines; float32."""
    half = width // 2
    columns = torch.arange(half, dtype=torch.float32, device=positions.device)
    periods = max_period ** (columns / max(half - 1, 1))
    phase = positions.float()[..., None] / periods
    return torch.cat([phase.cos(), phase.sin()], dim=-1)
