"""Linear layers for a few rows at a time, as streams have them, and for many, as in training.

With a few, a product is the reading of its weights, and how fast they are read from memory depends
on which factor comes first: for a row or two times a matrix MKL takes two to four times as long as
for the matrix times a column or two (float32, AVX512). It is the other way around for weights that
wait in a cache, but the weights of a model whose layers take turns do not. With many rows, oneDNN,
which PyTorch's compiler calls for products, takes nine tenths of MKL's time (float32, AVX512, AMD).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moshi_fl.models.speech.eight_bits import EightBitLinear

# Rows, and columns of the weights, up to which turning the product around pays.
PAIR, WIDE = 2, 1536
SOME, NARROW = 8, 512
MANY = 32  # rows from which on oneDNN pays
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; ``x`` (..., in) to (..., out)."""
    rows = x.shape[:-1].numel()
    if rows >= MANY and bias is None and _suits_onednn(x, weight):
        product: Tensor = _OneDnn.apply(x.reshape(rows, -1), weight)  # type: ignore[no-untyped-call]
        return product.view(*x.shape[:-1], -1)
    if torch.is_grad_enabled() or not _turns(rows, weight):
        return F.linear(x, weight, bias)
    y = _turned(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


class _OneDnn(torch.autograd.Function):
    """``x`` (N, in) to (N, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = ctx.needs_input_grad
        return (
            _by_onednn(gradient, weight.t()) if by_x else None,
            gradient.t().mm(x) if by_weight else None,  # oneDNN is no faster here
        )


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
    return cast("Tensor", product(x.contiguous(), weight, None, "none", [], ""))


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_contiguous()
    special = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return plain and HAS_ONEDNN and not special


class Linear(nn.Linear):
    """``nn.Linear``, fast for a few rows, too."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., in), to (..., out)."""
        return linear(x, self.weight, self.bias)


def _turns(rows: int, weight: Tensor) -> bool:
    width = weight.shape[1]
    few = 0 < rows <= (SOME if width <= NARROW else PAIR) and width <= WIDE
    return few and weight.dtype == torch.float32 and weight.is_cpu


def _turned(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (N, in) to (N, out), as weights times columns."""
    if len(x) > 1:
        return torch.mm(weight, x.contiguous().t()).t().contiguous()
    columns = torch.mm(weight, torch.cat([x, x]).t())  # a second column makes the first one faster
    return columns[:, 0].contiguous()[None]


Rows = Callable[[Tensor], Tensor]
"""From (B, in) to (B, out)."""


class Product:
    """A linear layer for a few rows, (B, in) to (B, out), with little around the product."""

    def __init__(self, module: nn.Module) -> None:
        plain = type(module) in {nn.Linear, Linear} and module.bias is None
        self.weight = cast("Tensor", module.weight) if plain else None  # (out, in)
        self.may_turn = type(module) is Linear
        self.rows: Rows = module.product if isinstance(module, EightBitLinear) else module

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if self.weight is None:
            return self.rows(x)
        if self._turns(x):
            return _turned(x, self.weight)
        return torch.mm(x, self.weight.t())

    def into(self, place: Tensor, x: Tensor) -> None:
        """The product, written to ``place``."""
        if self.weight is None or self._turns(x):
            place.copy_(self(x))
        else:
            torch.mm(x, self.weight.t(), out=place)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """The product, added to ``base``."""
        if self.weight is None or self._turns(x):
            return base + self(x)
        return torch.addmm(base, x, self.weight.t())

    def _turns(self, x: Tensor) -> bool:
        return self.may_turn and self.weight is not None and _turns(len(x), self.weight)
