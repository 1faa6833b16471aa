"""What a stream of a TTT layer remembers, and how a single token is read.

The weights that learn, and what the tokens of an unfinished mini-batch would change in them; places
for all of it are made once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moshi_fl.models.speech.attention import floating
from moshi_fl.models.speech.product import Product
from moshi_fl.models.speech.streaming import State
from moshi_fl.models.speech.ttt_rule import FastLayer, Step, wide

if TYPE_CHECKING:
    from moshi_fl.models.speech.ttt import Ttt

TAPS = 4  # of the convolutions that tell queries from keys where they share a projection


class Projected(NamedTuple):
    """Queries, keys and targets (N, T, D), and learning rates (N, T); N: items times heads."""

    q: Tensor
    k: Tensor
    target: Tensor
    eta: Tensor

    def part(self, start: int, stop: int) -> Projected:
        """The tokens from ``start`` to ``stop``."""
        return Projected(*(tensor[:, start:stop] for tensor in self))


class TokenReader:
    """``Ttt.project`` for one token of each stream at a time: places for its results lie ready.

    Weights are used as they lie when a stream begins; what ``read`` gives holds until the next.
    """

    def __init__(self, layer: Ttt, batch: int) -> None:
        c, like = layer.config, floating(layer.q_proj)
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.products = [Product(projection) for projection in projections]
        self.rows = like.new_zeros(3, batch, c.d_model)
        self.exact = self.rows.to(wide(like.dtype))  # the same tensor, where it is that already
        heads = self.exact.view(3, batch, c.n_heads, -1)
        self.pairs = _as_complex(heads[:2])
        self.values = heads[2].view(batch * c.n_heads, 1, -1)
        turned = torch.zeros_like(heads[:2])
        self.turned = _as_complex(turned)
        self.q, self.k = turned.view(2, *self.values.shape).unbind()
        self.turns = torch.view_as_complex(layer.turns)[:, None]  # (K, 1, D / 2)
        self.rate_weight = layer.learnable_ttt_lr_weight[:, 0].t()  # (C, H)
        self.rate_bias = layer.learnable_ttt_lr_bias[:, 0]
        self.rate_scale = c.learning_rate / c.head_dim

    def read(self, x: Tensor, place: Tensor) -> Projected:
        """Of tokens ``x`` (B, C) at ``place`` (B,) of their mini-batches."""
        for row, product in zip(self.rows, self.products, strict=True):
            product.into(row, x)
        if self.exact is not self.rows:
            self.exact.copy_(self.rows)
        torch.mul(self.pairs, self.turns.index_select(0, place), out=self.turned)
        rate = torch.addmm(self.rate_bias, x, self.rate_weight).to(self.exact.dtype)  # (B, H)
        eta = rate.sigmoid_().mul_(self.rate_scale).view(-1, 1)
        return Projected(self.q, self.k, self.values - self.k, eta)


class TttState(State):
    """Of each stream: its fast weights, and what the tokens of its unfinished mini-batch say.

    Attributes:
        count: Tokens in the unfinished mini-batch, (B,).
        rates: Their learning rates, (B, H, K).
        recent: The last inputs of the convolutions, (B, TAPS - 1, C).
    """

    # Not a part of what is saved: constants, and views of what is.
    __slots__ = ("causal", "fast", "kept", "layer", "norm", "reader", "steps")

    def __init__(self, layer: Ttt, batch: int) -> None:
        like, c = floating(layer.q_proj), layer.config
        super().__init__(batch, like.device)
        self.layer, self.norm, self.causal = layer, layer.head_norm(batch), layer.causal()
        self.reader = None if c.share_qk else TokenReader(layer, batch)
        self.count = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.recent = like.new_zeros(batch, TAPS - 1, c.d_model if c.share_qk else 0)
        self.fast: list[FastLayer] = []
        self.steps: list[Step] = []
        self.kept: list[Tensor] = []  # the same as ``steps``, each (B, H, K, ...)
        for number, first in enumerate(layer.first_weights(batch), start=1):
            buffers = [
                first.weight.new_zeros(len(first.weight), c.mini_batch, width)
                for width in first.weight.shape[1:]
            ]
            self.fast.append(FastLayer(first.weight.clone(), first.bias.clone()))
            self.steps.append(Step(*buffers))
            for name, value in zip(
                ("W", "b", "inputs", "grads"), (*self.fast[-1], *buffers), strict=True
            ):
                setattr(self, f"{name}{number}", value.view(batch, c.n_heads, *value.shape[1:]))
            self.kept += [getattr(self, f"{name}{number}") for name in ("inputs", "grads")]
        self.rates = first.weight.new_zeros(batch, c.n_heads, c.mini_batch)

    def write(self, steps: list[Step], eta: Tensor, position: Tensor) -> None:
        """Keep new tokens' steps (N, n, ...) and rates (N, n) at ``position`` (B, n)."""
        B, n = position.shape
        spot = position[:, None].expand(-1, self.rates.shape[1], -1)  # (B, H, n)
        self.put(self.rates, spot, eta.view(B, -1, n))
        spot = spot[..., None]
        for buffer, rows in zip(self.kept, itertools.chain(*steps), strict=True):
            new = rows.view(B, -1, n, rows.shape[-1])
            self.put(buffer, spot.expand_as(new), new)

    def advance(self, count: int) -> None:
        """``count`` tokens have been read."""
        if self.all_active:
            self.count.add_(count)
        else:
            self.count.add_(self.active, alpha=count)

    def replace(self, new: list[FastLayer], mask: Tensor) -> None:
        """Give the items of ``mask`` (B,) other weights and an empty mini-batch."""
        chosen = mask.repeat_interleave(self.layer.config.n_heads)[:, None, None]  # (N, 1, 1)
        for kept, fresh in zip(self.fast, new, strict=True):
            for old, values in zip(kept, fresh, strict=True):
                old.copy_(torch.where(chosen, values.detach(), old))
        self.count.masked_fill_(mask, 0)

    def reset(self, mask: Tensor) -> None:
        """Back to the weights that the layer has learnt to begin with."""
        super().reset(mask)
        self.replace(self.layer.first_weights(self.batch), mask)
        for kept in (*self.kept, self.rates, self.recent):  # what is not finite counts, times zero
            self.clear(kept, mask)


def _as_complex(x: Tensor) -> Tensor:
    """Neighbouring columns of ``x`` (..., D) as one number, (..., D / 2); the same memory."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
