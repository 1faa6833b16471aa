"""A model whose products take their weights in eight bits, for steps of a few rows."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import Tensor, nn

from moshi_fl.models import int8

Module = TypeVar("Module", bound=nn.Module)


class EightBitLinear(nn.Module):
    """A linear layer in eight bits; many rows go through the weights that it was made from."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias  # shared
        bias = None if plain.bias is None else plain.bias.detach()
        self.product = int8.linear(plain.weight.detach(), bias, "int8")

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., in), to (..., out)."""
        return self.product(x)


def in_eight_bits(model: Module) -> Module:
    """A twin of ``model`` for inference, its linear layers in eight bits, all else shared."""
    if isinstance(model, nn.Linear):
        return cast("Module", EightBitLinear(model))
    twin = copy.copy(model)
    parts = {name: part and in_eight_bits(part) for name, part in model._modules.items()}  # noqa: SLF001
    twin.__dict__["_modules"] = parts
    return twin
