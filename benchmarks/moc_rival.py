"""The MoC reference, written again from its formulas: correct, and as plain as they are.

One loop over the experts, ``nn.MultiheadAttention`` for the conversation, composite RMSNorm,
complex rotations, ``torch.optim.AdamW``. Where the reference's code crashes or is wrong (grouped
queries, cached attention), this does what it meant to. Tensor names are those of
``moshi_fl.models.moc``, so that both start from the same weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_fl.models.moc_config import MocConfig


class RivalNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return y.type_as(x) * self.weight


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, T, H, D), turns (T, D / 2) complex."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)


class RivalAttention(nn.Module):
    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.h, self.g, self.d = config.n_heads, config.n_kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.d_model, (self.h + 2 * self.g) * self.d, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, turns: Tensor, past: Any) -> tuple[Tensor, Any]:
        B, T, C = x.shape
        q, k, v = self.wqkv(x).split([self.h * self.d, self.g * self.d, self.g * self.d], dim=-1)
        q = rotate(q.view(B, T, self.h, self.d), turns).transpose(1, 2)
        k = rotate(k.view(B, T, self.g, self.d), turns).transpose(1, 2)
        v = v.view(B, T, self.g, self.d).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        present = (k, v)
        k, v = (z.repeat_interleave(self.h // self.g, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.o_proj(y.transpose(1, 2).contiguous().view(B, T, C)), present


class RivalExpert(nn.Module):
    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.steps = config.n_reasoning_steps
        self.w13 = nn.Linear(config.d_model, 2 * config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(self.steps):
            g, u = self.w13(h + x).chunk(2, -1)
            h = h + self.w2(F.silu(g) * u) / math.sqrt(self.steps)
        return h


class RivalMixture(nn.Module):
    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        D, self.c = config.d_model, config
        self.gate = nn.Linear(D, config.n_experts, bias=False)
        self.experts = nn.ModuleList(RivalExpert(config) for _ in range(config.n_experts))
        self.collab_attn = nn.MultiheadAttention(D, config.moc_collab_heads, batch_first=True)
        self.collab_norm1, self.collab_norm2 = RivalNorm(D), RivalNorm(D)
        self.collab_ffn = nn.Sequential(
            nn.Linear(D, D, bias=False), nn.GELU(), nn.Linear(D, D, bias=False)
        )
        self.fuse_gate = nn.Linear(D, 1)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.mediator = nn.Parameter(torch.randn(1, 1, D) * 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, T, D = x.shape
        flat, c = x.reshape(-1, D), self.c
        N, K, E = len(flat), c.top_k, c.n_experts
        logits = self.gate(flat.float())
        wanted, chosen = logits.topk(K, dim=-1)
        p, P = wanted.softmax(-1), logits.softmax(-1)
        load = (F.one_hot(chosen, E) * p.unsqueeze(-1)).sum(1)
        aux = c.aux_loss_weight * E * (P.mean(0) * load.mean(0)).sum()
        aux = aux + c.router_z_loss_weight * logits.logsumexp(-1).pow(2).mean()
        slots, keep = self._dispatch(flat, chosen.flatten(), wanted.flatten())
        aux = aux + c.drop_penalty_weight * (1 - keep.float().mean())
        weights = p * keep
        weights = (weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)).to(x.dtype)
        states = torch.cat([slots.view(N, K, D), self.mediator.to(x.dtype).expand(N, 1, D)], 1)
        masked = torch.cat([~keep, keep.new_zeros(N, 1)], 1) if self.training else None
        for _ in range(c.moc_collab_steps):
            said, _ = self.collab_attn(
                states, states, states, key_padding_mask=masked, need_weights=False
            )
            states = self.collab_norm1(states + said)
            states = states + self.collab_ffn(self.collab_norm2(states))
        answer = (states[:, :K] * weights.unsqueeze(-1)).sum(1)
        gate = torch.sigmoid(self.fuse_gate(flat))
        y = self.o_proj(gate * states[:, K] + (1 - gate) * answer)
        return y.view(B, T, D), aux

    def _dispatch(self, flat: Tensor, chosen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        K = self.c.top_k
        slots = flat.new_zeros(len(chosen), flat.shape[1])
        keep = torch.zeros(len(chosen), dtype=torch.bool)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.c.n_experts)
        capacity = self.c.capacity(len(flat)) if self.training else len(chosen)
        start = 0
        for e, expert in enumerate(self.experts):
            n = int(counts[e].item())
            pairs = order[start : start + n]
            start += n
            if n > capacity:
                pairs = pairs[wanted[pairs].topk(capacity).indices]
            if len(pairs):
                out = expert(flat[pairs // K])
                slots = slots.index_copy(0, pairs, out.to(slots.dtype))
                keep[pairs] = True
        return slots, keep.view(-1, K)


class RivalBlock(nn.Module):
    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.policy = config.grad_ckpt_policy
        self.attn_norm, self.ffn_norm = RivalNorm(config.d_model), RivalNorm(config.d_model)
        self.attention, self.feed_forward = RivalAttention(config), RivalMixture(config)

    def forward(self, x: Tensor, turns: Tensor, past: Any) -> tuple[Tensor, Tensor, Any]:
        y, present = self.attention(self.attn_norm(x), turns, past)
        x = x + y
        z = self.ffn_norm(x)
        if self.training and self.policy == "ffn":
            y, aux = checkpoint(self.feed_forward, z, use_reentrant=False)
        else:
            y, aux = self.feed_forward(z)
        return x + y, aux, present


class Rival(nn.Module):
    def __init__(self, config: MocConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(RivalBlock(config) for _ in range(config.n_layers))
        parts = {"wte": embedding, "h": blocks, "ln_f": RivalNorm(config.d_model)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = embedding.weight
        rates = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_seq_len), rates)
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def forward(self, idx: Tensor, targets: Tensor | None = None, past: Any = None) -> Any:
        start = 0 if past is None else past[0][0].shape[2]
        x, aux, present = self.transformer["wte"](idx), 0.0, []
        turns = self.turns[start : start + idx.shape[1]]
        for i, block in enumerate(self.transformer["h"]):
            x, term, kv = block(x, turns, None if past is None else past[i])
            aux = aux + term
            present.append(kv)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), present
        logits = self.lm_head(x)
        main = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, main + aux / len(present)

    def optimizer(self) -> torch.optim.Optimizer:
        named = list(self.named_parameters())
        router = [p for n, p in named if ".feed_forward.gate." in n]
        rest = [p for n, p in named if ".feed_forward.gate." not in n]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
            {"params": router, "weight_decay": 0.0, "lr": 1.5e-4},
        ]
        return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
