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

Settings = tuple[int, list[tuple[int, int]], int, float]
"""Choices per row, first row and row after the last of each expert, reasoning steps, dropout."""


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
    settings: Settings = (plan.choices, blocks, first.steps, dropout)
    slots: Tensor = _RaggedExperts.apply(x, order, settings, *weights)  # type: ignore[no-untyped-call]
    return slots


class _RaggedExperts(torch.autograd.Function):
    """``Expert.forward`` for rows sorted by expert, with its backward written out.

    One expert after the other, so that a block of rows stays in the cache through all its steps.
    Weights' gradients are added up in place, and are zero for an expert that read nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, settings: Settings, *weights: Tensor) -> Tensor:
        choices, blocks, steps, dropout = settings
        rows = x.index_select(0, order // choices)  # (M, C)
        answers, kept = torch.empty_like(rows), []
        for (start, stop), w13, w2 in zip(blocks, weights[::2], weights[1::2], strict=True):
            block = rows[start:stop]
            answers[start:stop], saved = _read(block, w13, w2, steps, dropout)
            kept += saved
        ctx.settings, ctx.shape = settings, x.shape
        ctx.save_for_backward(order, *weights, *kept)
        slots = x.new_zeros(len(x) * choices, x.shape[1])
        return slots.index_copy_(0, order, answers).view(len(x), choices, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dslots: Tensor) -> tuple[Tensor | None, ...]:
        choices, blocks, steps, dropout = ctx.settings
        order, *saved = ctx.saved_tensors
        weights, kept = saved[: 2 * len(blocks)], saved[2 * len(blocks) :]
        grads = [torch.zeros_like(weight) for weight in weights]
        drows = dslots.reshape(-1, dslots.shape[-1]).index_select(0, order)  # (M, C)
        for e, (start, stop) in enumerate(blocks):
            part = slice(e * 3 * steps, (e + 1) * 3 * steps)
            pair = slice(2 * e, 2 * e + 2)
            if start < stop:
                dh = drows[start:stop]
                dh.copy_(_unread(dh, kept[part], weights[pair], grads[pair], dropout))
        back = dslots.new_zeros(ctx.shape[0] * choices, ctx.shape[1]).index_copy_(0, order, drows)
        return back.view(-1, choices, ctx.shape[1]).sum(1), None, None, *grads


def _read(
    x: Tensor, w13: Tensor, w2: Tensor, steps: int, dropout: float
) -> tuple[Tensor, list[Tensor]]:
    """``Expert.forward`` of one block, and what its backward needs: z, [g | u], mask per step."""
    h, saved = x, []
    for _ in range(steps):
        z = h + x
        gu = z @ w13.t()  # (m, 2 F)
        g, u = gu.chunk(2, dim=-1)
        y = F.silu(g).mul_(u) @ w2.t()  # (m, C)
        mask = y.new_empty(0)
        if dropout:
            mask = (torch.rand_like(y) >= dropout) / (1 - dropout)
            y.mul_(mask)
        h = torch.add(h, y, alpha=steps**-0.5)
        saved += [z, gu, mask]
    return h, saved


def _unread(
    dh: Tensor, saved: list[Tensor], weights: list[Tensor], grads: list[Tensor], dropout: float
) -> Tensor:
    """Gradient of a block's rows; adds to the gradients of its expert's weights."""
    (w13, w2), (dw13, dw2), steps = weights, grads, len(saved) // 3
    dx = torch.zeros_like(dh)
    for step in reversed(range(steps)):
        z, gu, mask = saved[3 * step : 3 * step + 3]
        dy = dh * steps**-0.5
        if dropout:
            dy.mul_(mask)
        da = dy @ w2  # (m, F)
        a, dgu = _gate_backward(gu, da)
        dw2.addmm_(dy.t(), a)
        dw13.addmm_(dgu.t(), z)
        dz = dgu @ w13  # (m, C)
        dh = dh + dz
        dx.add_(dz)
    return dh.add_(dx)


def _gate_backward(gu: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """A = silu(g) u again, and the gradient of [g | u], from one exponential.

    With s = sigmoid(g) and t = g s: d silu = t + s (1 - t).
    """
    g, u = gu.chunk(2, dim=-1)
    s = torch.sigmoid(g)
    t = g * s
    dgu = torch.empty_like(gu)
    dg, du = dgu.chunk(2, dim=-1)
    torch.mul(da, t, out=du)
    torch.mul(da.mul_(u), torch.addcmul(t, s, 1 - t), out=dg)
    return t.mul_(u), dgu
