"""Linear layers for a few rows at a time, where each call's overhead counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moshi_fl.models.speech.eight_bits import EightBitLinear

Rows = Callable[[Tensor], Tensor]
"""From (B, in) to (B, out)."""


class Product:
    """A linear layer for a few rows, (B, in) to (B, out)."""

    def __init__(self, module: nn.Module) -> None:
        plain = type(module) is nn.Linear and module.bias is None
        self.weight = cast("Tensor", module.weight).t() if plain else None  # (in, out)
        self.rows: Rows = module.product if isinstance(module, EightBitLinear) else module

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return self.rows(x) if self.weight is None else torch.mm(x, self.weight)

    def into(self, place: Tensor, x: Tensor) -> None:
        """The product, written to ``place``."""
        if self.weight is None:
            place.copy_(self.rows(x))
        else:
            torch.mm(x, self.weight, out=place)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """The product, added to ``base``."""
        return base + self.rows(x) if self.weight is None else torch.addmm(base, x, self.weight)
