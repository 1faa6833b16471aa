"""The mixture of collaborating experts: route, read, talk, fuse."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_experts import Expert, padded, plan, ragged
from moshi_fl.models.moc_layers import RMSNorm, wide
from moshi_fl.models.moc_talk import talk

FEW_ROWS = 64  # so few are not worth a wait for the device


class Report(NamedTuple):
    """What a mixture tells its model: chosen experts (N, K), and the router's loss terms."""

    chosen: Tensor
    aux: Tensor


class Load(NamedTuple):
    """Figures of a pass: share of the pairs by expert (E), share dropped, mean of the gate."""

    use: Tensor
    dropped: Tensor
    gate: Tensor


class DenseFeedForward(Expert):
    """The feed-forward of a model without experts."""

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """``x``: (B, T, C), the same back; no report."""
        return super().forward(x), None


class Conversation(nn.Module):
    """Multi-head attention among the few states of one token; names of ``nn.MultiheadAttention``.

    Args:
        config: ``moc_collab_heads``, ``moc_collab_dropout``, ``save_attn_weights``.
    """

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        width = config.d_model
        self.n_heads, self.dropout = config.moc_collab_heads, config.moc_collab_dropout
        self.save, self.seen = config.save_attn_weights, torch.empty(0)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, heard: Tensor | None) -> Tensor:
        """``x``: (N, S, C), the same back; ``heard`` (N, S) says which states may be looked at.

        A row that may look at none gets the output projection of zero, which is its bias.
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (N, S, 3 C)
        dropout = self.dropout if self.training else 0.0
        exact = qkv.dtype in {torch.float32, torch.float64}
        if x.is_cuda or dropout or self.save or not exact or torch.compiler.is_compiling():
            y = self._talk(qkv, heard)
        else:
            y = talk(qkv, self.n_heads, heard)
        return self.out_proj(y)  # type: ignore[no-any-return]

    def _talk(self, qkv: Tensor, heard: Tensor | None) -> Tensor:
        """The same for any device and precision, with dropout, and with its weights to show."""
        N, S, width = qkv.shape
        C = width // 3
        q, k, v = qkv.view(N, S, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (N, H, S, D)
        scores = q @ k.transpose(-1, -2) * (C // self.n_heads) ** -0.5  # (N, H, S, S)
        if heard is not None:
            scores = scores.masked_fill(~heard[:, None, None], torch.finfo(scores.dtype).min)
        p = scores.softmax(-1)
        if heard is not None:
            p = p * heard[:, None, None]
        if self.save:
            self.seen = p.detach().mean(1)  # (N, S, S)
        p = F.dropout(p, self.dropout, self.training)
        y: Tensor = (p @ v).transpose(1, 2).reshape(N, S, C)
        return y


class Mixture(nn.Module):
    """K of E experts read a token, talk for R rounds, and are fused into one answer.

    1. The router's logits choose and weigh K experts (softmax over the chosen ones).
    2. In training an expert has room for ``MocConfig.capacity`` pairs; the least wanted are dropped
       and the others' weights renormalised. Outside training there is room for all.
    3. States X: the K answers, and a learned mediator. Each round: X = norm(X + attention(X)),
       then X = X + F2 gelu(F0 norm(X)), the same weights in every round.
    4. Answer: Wo (g m + (1 - g) a), with m the mediator's state (or the mean of the K), a the
       weighted sum of the kept states, and g a learned gate on the input.
    """

    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.config, width = config, config.d_model
        self.gate = nn.Linear(width, config.n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_experts))
        self.last: Load | None = None
        self.mediator: nn.Parameter | None = None
        if config.collab == "moc":
            if config.moc_collab_steps:
                self.collab_attn = Conversation(config)
                self.collab_norm1, self.collab_norm2 = RMSNorm(width), RMSNorm(width)
                layers = [nn.Linear(width, width, bias=False) for _ in range(2)]
                self.collab_ffn = nn.Sequential(layers[0], nn.GELU(), layers[1])
            self.fuse_gate = nn.Linear(width, 1)
            if config.moc_use_mediator:
                self.mediator = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if config.collab != "none":
            self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Report]:
        """``x``: (B, T, C), the same back; ``counted`` (B, T) says which tokens are routed."""
        rows = x.flatten(0, 1)  # (N, C)
        routed = None if counted is None else counted.flatten()
        logits = self._route(rows)  # (N, E), float32
        wanted, chosen = logits.topk(self.config.top_k, sorted=True)  # (N, K)
        weights = wanted.softmax(-1)
        if routed is not None:
            weights = weights * routed[:, None]
        n_experts = self.config.n_experts
        capacity = self.config.capacity(len(rows)) if self.training else len(rows)
        sent = chosen if routed is None else chosen.where(routed[:, None], n_experts)
        table = plan(sent, wanted.detach(), n_experts, capacity)
        static = x.is_cuda and (self.training or len(rows) <= FEW_ROWS)
        read = padded if static or torch.compiler.is_compiling() else ragged
        slots = read(cast("list[Expert]", list(self.experts)), rows, table)  # (N, K, C)
        kept = table.kept_slots if self.training or routed is not None else None
        y, gate = self._fuse(rows, slots, weights, kept)
        aux, dropped = self._aux(logits, chosen, weights, kept, routed)
        pairs = table.counts.sum().clamp_min(1)
        self.last = Load(table.counts / pairs, dropped.detach(), gate.detach())
        return y.view_as(x), Report(chosen, aux)

    def _route(self, rows: Tensor) -> Tensor:
        """Float32 at least, even under autocast: a rounded logit sends tokens elsewhere."""
        with torch.autocast(rows.device.type, enabled=False):
            kind = wide(rows.dtype)
            logits = F.linear(rows.to(kind), self.gate.weight.to(kind))
        if self.training and self.config.router_noise_std:
            logits = logits + torch.randn_like(logits) * self.config.router_noise_std
        return logits

    def _aux(
        self,
        logits: Tensor,
        chosen: Tensor,
        weights: Tensor,
        kept: Tensor | None,
        routed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Balance, z and drop terms (Shazeer 2017; Zoph 2022), and the share that was dropped."""
        config, N = self.config, len(logits)
        count = N if routed is None else routed.sum().clamp_min(1)
        probabilities, z = logits.softmax(-1), logits.logsumexp(-1).square()
        if routed is not None:
            probabilities, z = probabilities * routed[:, None], z * routed
        load = torch.zeros_like(logits).scatter(1, chosen, weights)  # (N, E)
        balance = (probabilities.sum(0) / count * (load.sum(0) / count)).sum() * config.n_experts
        dropped = logits.new_zeros(())
        if kept is not None:
            dropped = 1 - kept.sum() / (count * config.top_k)
        aux = config.aux_loss_weight * balance + config.router_z_loss_weight * z.sum() / count
        return aux + config.drop_penalty_weight * dropped, dropped

    def _fuse(
        self, rows: Tensor, slots: Tensor, weights: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One answer (N, C) from the experts', and the mean of the gate."""
        if kept is not None:
            weights = weights * kept
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        weights = weights.to(slots.dtype)
        if self.config.collab == "none":
            return _weighted(slots, weights), weights.new_ones(())
        if self.config.collab == "simple":
            return self.o_proj(_weighted(slots, weights)), weights.new_ones(())
        states = self._converse(slots, kept)  # (N, K or K + 1, C)
        K = self.config.top_k
        middle = states[:, K] if self.mediator is not None else states.mean(1)
        gate = torch.sigmoid(self.fuse_gate(rows))  # (N, 1)
        answer = _weighted(states[:, :K], weights)
        fused = torch.lerp(answer.to(middle.dtype), middle, gate.to(middle.dtype))
        return self.o_proj(fused), gate.mean()

    def _converse(self, slots: Tensor, kept: Tensor | None) -> Tensor:
        states, heard = slots, kept
        if self.mediator is not None:
            mediator = self.mediator.to(slots.dtype).expand(len(slots), 1, -1)
            states = torch.cat([slots, mediator], dim=1)
            heard = None if kept is None else F.pad(kept, (0, 1), value=True)
        for _ in range(self.config.moc_collab_steps):
            states = self.collab_norm1(states + self.collab_attn(states, heard))
            states = states + self.collab_ffn(self.collab_norm2(states))
        return states


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Sum of the K states (N, K, C) by their weights (N, K)."""
    y: Tensor = (weights[:, None] @ states)[:, 0]
    return y
