"""Experts: gated feed-forwards that read their own answer again, and how rows reach them.

Two ways lead the same rows through the same arithmetic. ``ragged`` sorts the rows by expert and
multiplies each expert's block; it needs the counts on the host. ``padded`` gives every expert the
same number of places, so that no shape depends on the data: nothing waits for the device, and the
compiler sees one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moshi_fl.models.moc_config import MocConfig

Blocks = list[tuple[int, int]]
"""First row and row after the last of each expert."""


class Expert(nn.Module):
    """A gated feed-forward (SwiGLU, Shazeer 2020) that reasons in steps.

    With f(z) = W2 (silu(g) * u) and [g | u] = W13 z: h = x, then S times
    h = h + f(h + x) / sqrt(S). So the input is part of the output.
    """

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.steps, self.dropout = config.n_reasoning_steps, config.dropout
        self.w13 = nn.Linear(config.d_model, 2 * config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., C), the same back."""
        h = x
        for _ in range(self.steps):
            g, u = self.w13(h + x).chunk(2, dim=-1)  # (..., F)
            y = F.dropout(self.w2(F.silu(g) * u), self.dropout, self.training)
            h = h + y * self.steps**-0.5
        return h


@dataclass(frozen=True)
class Plan:
    """Which expert reads which row.

    ``order`` (N K) lists the (row, choice) pairs by expert, the most wanted first; ``rank`` is a
    pair's place at its expert, ``expert`` which one that is, ``kept`` whether it has room, all
    in that order. ``counts`` (E): pairs that each expert was sent, dropped ones included.
    """

    order: Tensor
    expert: Tensor
    rank: Tensor
    kept: Tensor
    counts: Tensor
    capacity: int
    choices: int  # K

    @property
    def kept_slots(self) -> Tensor:
        """Whether each pair has room, (N, K)."""
        return (
            torch.empty_like(self.kept).index_copy(0, self.order, self.kept).view(-1, self.choices)
        )


def plan(chosen: Tensor, wanted: Tensor, n_experts: int, capacity: int) -> Plan:
    """Order (row, expert) pairs by expert and, within an expert, by how much they are wanted.

    Args:
        chosen: Expert of each pair, (N, K); ``n_experts`` stands for none.
        wanted: The router's logit of each pair, (N, K); an expert without room for all keeps the
            highest.
        n_experts: How many experts there are.
        capacity: Most pairs that one expert takes.
    """
    flat = chosen.flatten()
    order = wanted.flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    expert = flat[order]
    counts = F.one_hot(flat, n_experts + 1).sum(0)  # unlike bincount, deterministic on CUDA
    rank = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[expert]
    kept = (rank < capacity) & (expert < n_experts)
    return Plan(order, expert, rank, kept, counts[:n_experts], capacity, chosen.shape[1])


def padded(experts: Sequence[Expert], x: Tensor, plan: Plan) -> Tensor:
    """Outputs of the chosen experts, (N, K, C) for ``x`` (N, C); zero where there was no room."""
    N, C, E, K = len(x), x.shape[1], len(experts), plan.choices
    places = E * plan.capacity
    place = torch.where(plan.kept, plan.expert * plan.capacity + plan.rank, places)  # last: none
    reader = plan.order.new_full((places + 1,), N * K).index_copy(0, place, plan.order)
    none = x.new_zeros(1, C)
    rows = torch.cat([x, none])[(reader[:-1] // K).clamp_max(N)].view(E, -1, C)
    w13 = torch.stack([expert.w13.weight for expert in experts]).transpose(1, 2)
    w2 = torch.stack([expert.w2.weight for expert in experts]).transpose(1, 2)
    first = experts[0]
    h = rows
    for _ in range(first.steps):
        g, u = torch.bmm(h + rows, w13).chunk(2, dim=-1)  # (E, capacity, F)
        y = F.dropout(torch.bmm(F.silu(g) * u, w2), first.dropout, first.training)
        h = h + y * first.steps**-0.5
    found = torch.empty_like(place).index_copy(0, plan.order, place)
    return torch.cat([h.flatten(0, 1), none])[found].view(N, K, C)


def ragged(experts: Sequence[Expert], x: Tensor, plan: Plan) -> Tensor:
    """The same as ``padded``, with the work that is there and no more; reads counts on the host."""
    counts = plan.counts.clamp_max(plan.capacity).tolist()
    stops = torch.tensor(counts).cumsum(0).tolist()
    blocks = [(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    order = plan.order[plan.kept] if stops[-1] < len(plan.order) else plan.order
    weights = [w for e in experts for w in (e.w13.weight, e.w2.weight)]
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(kind), [weight.to(kind) for weight in weights]
    first = experts[0]
    dropout = first.dropout if first.training else 0.0
    settings = (plan.choices, blocks, first.steps, dropout)
    slots: Tensor = _RaggedExperts.apply(x, order, settings, *weights)  # type: ignore[no-untyped-call]
    return slots


class _RaggedExperts(torch.autograd.Function):
    """``Expert.forward`` for rows sorted by expert, with its backward written out.

    Elementwise work runs over all rows at once; only the products go expert by expert, into
    buffers that are there. Weights' gradients are added up in place over the steps, and are zero
    for an expert that read nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, settings: Any, *weights: Tensor) -> Tensor:
        choices, blocks, steps, dropout = settings
        w13, w2 = weights[::2], weights[1::2]
        rows = x.index_select(0, order // choices)  # (M, C)
        h, kept, masks = rows, [], []
        for step in range(steps):
            z = h * 2 if step == 0 else h + rows
            gu = _products(z, w13, blocks, w13[0].shape[0], transposed=True)
            y = _products(_gated(gu), w2, blocks, rows.shape[1], transposed=True)
            if dropout:
                masks.append(torch.rand_like(y, dtype=torch.float32) >= dropout)
                y.mul_(masks[-1]).div_(1 - dropout)
            h = torch.add(h, y, alpha=steps**-0.5)
            kept += [z, gu]
        ctx.settings, ctx.shape = settings, x.shape
        ctx.save_for_backward(order, *kept, *masks, *weights)
        slots = x.new_zeros(len(x) * choices, x.shape[1])
        return slots.index_copy_(0, order, h).view(len(x), choices, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dslots: Tensor) -> tuple[Tensor | None, ...]:
        choices, blocks, steps, dropout = ctx.settings
        order, *saved = ctx.saved_tensors
        kept, masks = saved[: 2 * steps], saved[2 * steps : len(saved) - 2 * len(blocks)]
        weights = saved[len(saved) - 2 * len(blocks) :]
        w13, w2 = weights[::2], weights[1::2]
        grads = [torch.zeros_like(weight) for weight in weights]
        dh = dslots.reshape(-1, dslots.shape[-1]).index_select(0, order)  # (M, C)
        dx = None
        for step in reversed(range(steps)):
            z, gu = kept[2 * step : 2 * step + 2]
            dy = dh * steps**-0.5
            if dropout:
                dy.mul_(masks[step]).div_(1 - dropout)
            a = _gated(gu)
            da = _products(dy, w2, blocks, a.shape[1], transposed=False)
            _accumulate(grads[1::2], dy, a, blocks)
            dgu = _gated_backward(gu, da)
            _accumulate(grads[::2], dgu, z, blocks)
            dz = _products(dgu, w13, blocks, z.shape[1], transposed=False)
            dh = dh + dz
            dx = dz if dx is None else dx.add_(dz)
        drows = dh.add_(dx) if dx is not None else dh
        back = dslots.new_zeros(ctx.shape[0] * choices, ctx.shape[1]).index_copy_(0, order, drows)
        return back.view(-1, choices, ctx.shape[1]).sum(1), None, None, *grads


def _products(x: Tensor, weights: Any, blocks: Blocks, width: int, *, transposed: bool) -> Tensor:
    """Each block of rows times its expert's weight, (M, width)."""
    out = x.new_empty(len(x), width)
    for (start, stop), weight in zip(blocks, weights, strict=True):
        if start < stop:
            torch.mm(x[start:stop], weight.t() if transposed else weight, out=out[start:stop])
    return out


def _accumulate(grads: list[Tensor], dy: Tensor, x: Tensor, blocks: Blocks) -> None:
    for (start, stop), grad in zip(blocks, grads, strict=True):
        if start < stop:
            grad.addmm_(dy[start:stop].t(), x[start:stop])


def _gated(gu: Tensor) -> Tensor:
    g, u = gu.chunk(2, dim=-1)
    return F.silu(g).mul_(u)


def _gated_backward(gu: Tensor, da: Tensor) -> Tensor:
    g, u = gu.chunk(2, dim=-1)
    dgu = torch.empty_like(gu)
    dg, du = dgu.chunk(2, dim=-1)
    torch.mul(da, F.silu(g), out=du)
    dg.copy_(torch.ops.aten.silu_backward(da.mul_(u), g))
    return dgu
