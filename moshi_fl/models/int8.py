"""Weights in eight bits for generation: a quarter of the bytes to read for each token.

Each row of a weight is ``scale * integer``, with the row's largest magnitude at 127. Activations
are rounded to bfloat16 for the product. Reading weights is what one token's work consists of, so it
pays at a few rows; at many, the plain product is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""From (N, in) to (N, out)."""

Storage = Literal["float32", "int8"]
MOST_ROWS = 4  # of an input whose product with eight-bit weights is faster
LANES = (
    32  # PyTorch 2.13's AVX512 kernel reads whole lanes: past the end, if a row is not filled up
)


def linear(weight: Tensor, bias: Tensor | None, storage: Storage) -> Linear:
    """The product with a weight (out, in), whose numbers are kept as they are or in eight bits."""
    if storage == "float32":
        return partial(_plain, weight, weight.t(), bias)
    scale = weight.float().abs().amax(1).clamp_min(1e-30) / 127  # (out,)
    missing = -weight.shape[1] % LANES
    integers = F.pad((weight.float() / scale[:, None]).round().to(torch.int8), (0, missing))
    scale = scale.to(torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) > MOST_ROWS:
            return F.linear(x, weight, bias)
        filled = F.pad(rows.bfloat16(), (0, missing)) if missing else rows.bfloat16()
        y = torch._weight_int8pack_mm(filled, integers, scale)  # noqa: SLF001
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)

    return product


def _plain(weight: Tensor, transposed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is not None and x.dim() == 2:
        return torch.addmm(bias, x, transposed)  # what F.linear does, without its overhead
    return F.linear(x, weight, bias)
