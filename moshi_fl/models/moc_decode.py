"""MoC for generation: one token of each sequence at a time, keys and values kept in a ring.

The arithmetic is ``Moc.forward``'s, written without module calls: at one token the calls would cost
more than the mathematics. Rotary positions are relative, so past ``max_seq_len`` a new token simply
takes the place of the oldest: nothing is read again, and memory stays what it was.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_fl.models.int8 import Storage, linear
from moshi_fl.models.moc import Block, Moc
from moshi_fl.models.moc_experts import Expert
from moshi_fl.models.moc_layers import inverse_rms, rotate
from moshi_fl.models.moc_mixture import Mixture


class MocDecoder:
    """Reads tokens of ``batch`` sequences of equal length. Not for two threads at once.

    Args:
        model: Used as it is; its weights are not copied.
        batch: How many sequences are read side by side.
        storage: ``int8`` reads a quarter of the bytes for each token (not the router's).
    """

    @torch.inference_mode()
    def __init__(self, model: Moc, batch: int = 1, *, storage: Storage = "float32") -> None:
        config = model.config
        self._model, self._rotary = model, model.rotary
        self.context, self.length = config.max_seq_len, 0  # tokens: remembered at most, read so far
        weight = next(model.parameters())
        shape = (2, batch, config.n_kv_heads, config.max_seq_len, config.head_dim)
        self._memory = [weight.new_zeros(shape) for _ in range(config.n_layers)]
        self._blocks = [_Block(block, storage) for block in model.blocks]
        self._head = linear(model.lm_head.weight, None, storage)
        self._ln_f = cast("Tensor", model.transformer["ln_f"].weight)

    @torch.inference_mode()
    def restart(self, tokens: Tensor) -> Tensor:
        """Forget everything and read ``tokens`` (B, T); the logits (B, V) after the last.

        Of more than ``context`` tokens the last are read.
        """
        tokens = tokens[:, -self.context :]
        out = self._model.eval()(tokens)
        self.length = tokens.shape[1]
        for memory, (k, v) in zip(self._memory, out.present, strict=True):
            memory[0, :, :, : self.length], memory[1, :, :, : self.length] = k, v
        return cast("Tensor", out.logits[:, 0])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each sequence, (B,); the logits (B, V) after it."""
        place, seen = self.length % self.context, min(self.length + 1, self.context)
        turns = self._turns()
        x = F.embedding(tokens, self._model.lm_head.weight)  # (B, C)
        for block, memory in zip(self._blocks, self._memory, strict=True):
            x = block(x, memory, turns, place, seen)
        self.length += 1
        return self._head(_norm(x, self._ln_f))

    def _turns(self) -> Tensor:
        position, table = self.length, self._rotary.table
        if position < self._rotary.length:
            return table[:, position : position + 1]
        return self._rotary.turns(position, position + 1).to(table.device)


class _Block:
    """A layer's weights, and what it does with one token of each sequence."""

    def __init__(self, block: Block, storage: Storage) -> None:
        attention = block.attention
        self.heads, self.groups = attention.n_heads, attention.n_kv_heads
        self.attn_norm, self.ffn_norm = block.attn_norm.weight, block.ffn_norm.weight
        self.wqkv = linear(attention.wqkv.weight, None, storage)
        self.o_proj = linear(attention.o_proj.weight, None, storage)
        feed_forward = block.feed_forward
        self.feed_forward: _Mixture | _Expert
        if isinstance(feed_forward, Mixture):
            self.feed_forward = _Mixture(feed_forward, storage)
        else:
            self.feed_forward = _Expert(feed_forward, storage)

    def __call__(self, x: Tensor, memory: Tensor, turns: Tensor, place: int, seen: int) -> Tensor:
        x = x + self._attend(_norm(x, self.attn_norm), memory, turns, place, seen)
        return x + self.feed_forward(_norm(x, self.ffn_norm))

    def _attend(self, x: Tensor, memory: Tensor, turns: Tensor, place: int, seen: int) -> Tensor:
        B, H, G = len(x), self.heads, self.groups
        qkv = self.wqkv(x).view(B, 1, H + 2 * G, -1)
        qk = rotate(qkv[:, :, : H + G], turns)[:, 0]  # (B, H + G, D)
        memory[0, :, :, place] = qk[:, H:]
        memory[1, :, :, place] = qkv[:, 0, H + G :]
        keys, values = memory[:, :, :, :seen]  # (B, G, L, D)
        q = qk[:, :H].view(B, G, H // G, -1)  # the queries of a group share its keys
        y = F.scaled_dot_product_attention(q, keys, values)
        return self.o_proj(y.reshape(B, -1))


class _Expert:
    def __init__(self, expert: Expert, storage: Storage) -> None:
        self.w13 = linear(expert.w13.weight, None, storage)
        self.w2 = linear(expert.w2.weight, None, storage)
        self.steps = expert.steps

    def __call__(self, x: Tensor) -> Tensor:
        h, scale = x, self.steps**-0.5
        for _ in range(self.steps):
            g, u = self.w13(h + x).chunk(2, dim=-1)
            h = torch.add(h, self.w2(F.silu(g).mul_(u)), alpha=scale)
        return h


class _Mixture:
    def __init__(self, mixture: Mixture, storage: Storage) -> None:
        self.mixture, self.collab, self.K = mixture, mixture.config.collab, mixture.config.top_k
        self.experts = [_Expert(cast("Expert", e), storage) for e in mixture.experts]
        if self.collab != "none":
            self.o_proj = linear(mixture.o_proj.weight, None, storage)
        self.rounds = mixture.config.moc_collab_steps if self.collab == "moc" else 0
        if self.rounds:
            talk, (first, _, second) = mixture.collab_attn, mixture.collab_ffn
            self.talk_in = linear(talk.in_proj_weight, talk.in_proj_bias, storage)
            self.talk_out = linear(talk.out_proj.weight, talk.out_proj.bias, storage)
            self.ffn_in = linear(cast("Tensor", first.weight), None, storage)
            self.ffn_out = linear(cast("Tensor", second.weight), None, storage)

    def __call__(self, x: Tensor) -> Tensor:
        mixture = self.mixture
        wanted, chosen = mixture._route(x).topk(self.K)  # noqa: SLF001
        weights = wanted.softmax(-1).to(x.dtype)
        states = self._read(x, chosen)  # (B, K, C)
        if self.collab == "moc":
            return self._fuse(x, states, weights)
        answer = (weights[:, None] @ states)[:, 0]
        return answer if self.collab == "none" else self.o_proj(answer)

    def _read(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Answers of the chosen experts, (B, K, C)."""
        pairs = chosen.flatten().tolist()
        if len(x) == 1:
            return torch.stack([self.experts[e](x) for e in pairs], dim=1)
        by_expert: dict[int, list[int]] = {}
        for pair, expert in enumerate(pairs):
            by_expert.setdefault(expert, []).append(pair)
        order = torch.tensor([pair for group in by_expert.values() for pair in group])
        order = order.to(x.device)
        parts = torch.split(x[order // self.K], [len(group) for group in by_expert.values()])
        read = [self.experts[e](part) for e, part in zip(by_expert, parts, strict=True)]
        slots = x.new_empty(len(pairs), x.shape[1]).index_copy_(0, order, torch.cat(read))
        return slots.view(len(x), self.K, -1)

    def _fuse(self, x: Tensor, states: Tensor, weights: Tensor) -> Tensor:
        mixture = self.mixture
        if mixture.mediator is not None:
            mediator = mixture.mediator.expand(len(x), 1, -1)
            states = torch.cat([states, mediator], dim=1)
        for _ in range(self.rounds):
            states = self._talk(states)
        middle = states[:, self.K] if mixture.mediator is not None else states.mean(1)
        gate = torch.sigmoid(F.linear(x, mixture.fuse_gate.weight, mixture.fuse_gate.bias))
        answer = (weights[:, None] @ states[:, : self.K])[:, 0]
        return self.o_proj(torch.lerp(answer, middle, gate))

    def _talk(self, states: Tensor) -> Tensor:
        mixture, (B, S, C) = self.mixture, states.shape
        qkv = self.talk_in(states).view(B, S, 3, mixture.collab_attn.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, C)
        states = _norm(states + self.talk_out(y), mixture.collab_norm1.weight)
        z = F.gelu(self.ffn_in(_norm(states, mixture.collab_norm2.weight)))
        return states + self.ffn_out(z)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse_rms(x)).mul_(weight)
