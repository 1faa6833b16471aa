"""Causal attention that streams: a ring of keys per layer, exact for pieces of any size.

A query sees the keys of the last ``context`` positions, its own among them. What all layers of a
call share (positions, masks, turns, slots of the ring) is computed once, as a ``Step``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.models.attention import causal_attention
from moshi_fl.models.speech.layers import rotate
from moshi_fl.models.speech.streaming import State, StreamingModule

SPARE = 7
"""Slots of a ring beyond the context: pieces of up to eight tokens are written before they are
attended to, without losing a key that their first query still sees."""
ROWS = 512  # of queries that are attended to at once where the context is shorter than the input


@dataclass(frozen=True)
class Block:
    """Queries that are attended to together.

    Attributes:
        rows: Which queries.
        columns: Which keys they can see any of.
        mask: What is added to the scores, (B or 1, 1, rows, columns): 0 or minus infinity;
            None where each query sees all keys up to its own and no others.
    """

    rows: slice
    columns: slice
    mask: Tensor | None


@dataclass(frozen=True)
class Placement:
    """Where new tokens go in a ring, and which of its slots are attended to.

    Attributes:
        slots: Slot of each of the last tokens of the call, (B, 1, tokens, 1).
        before: Whether they are written before they are attended to, so that the ring holds all
            keys; otherwise the new keys follow those of the ring.
        filled: How many of the first slots hold anything.
    """

    slots: Tensor
    before: bool
    filled: int


@dataclass(frozen=True)
class Step:
    """What the layers of one call share.

    Attributes:
        start: Tokens before this call, of the item that has most: the index of the first token's
            weights where they differ by step.
        positions: Of each token, (B or 1, T).
        turns: Of rotary positions, (B or 1, T, 1, D / 2) complex.
        halves: Whether rotary pairs are halves of a head instead of neighbours.
        blocks: Of queries, in order.
        placement: Of the tokens in the rings; None outside streaming.
    """

    start: int
    positions: Tensor
    turns: Tensor | None
    halves: bool
    blocks: tuple[Block, ...]
    placement: Placement | None


class Ring(State):
    """The last keys, turned, and values of one layer: (B, G, capacity, D) each.

    The token at position p lies in slot p mod capacity.
    """

    def __init__(self, batch: int, shape: tuple[int, int, int], like: Tensor) -> None:
        super().__init__(batch, like.device)
        self.keys = torch.zeros(batch, *shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.keys, mask)
        self.clear(self.values, mask)

    def extend(self, k: Tensor, v: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and of now, (B, G, L, D), for new ones (B, G, T, D)."""
        keys, values = self.keys[:, :, : placement.filled], self.values[:, :, : placement.filled]
        if not placement.before:
            keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        last = placement.slots.shape[2]
        index = placement.slots.expand(-1, k.shape[1], -1, k.shape[3])
        self._write(self.keys, k[:, :, -last:], index)
        self._write(self.values, v[:, :, -last:], index)
        return keys, values

    def _write(self, ring: Tensor, new: Tensor, index: Tensor) -> None:
        new = new.detach().to(ring.dtype)
        if not self.all_active:
            active = self.active[:, None, None, None]
            new = torch.where(active, new, ring.gather(2, index))
        ring.scatter_(2, index, new)


class StreamingAttention(StreamingModule):
    """Causal self-attention with rotary positions and, optionally, fewer heads for keys.

    Projections are lists: one entry, or one for each set of weights of a depth transformer. Stacked
    forms (``in_proj_weight``, ``in_proj.weight``, ``out_proj.weight``) are split as they load.
    """

    def __init__(
        self, width: int, heads: int, kv_repeat: int = 1, capacity: int = 0, sets: int = 1
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads // kv_repeat
        self.head_width = width // heads
        self.capacity = capacity  # of the ring
        rows = (heads + 2 * self.kv_heads) * self.head_width
        self.in_projs = nn.ModuleList(nn.Linear(width, rows, bias=False) for _ in range(sets))
        self.out_projs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(sets))
        self.register_load_state_dict_pre_hook(_split_stacked)  # type: ignore[no-untyped-call]

    def initial_state(self, batch: int) -> Ring:
        """An empty ring in the dtype of the weights."""
        return Ring(batch, (self.kv_heads, self.capacity, self.head_width), floating(self))

    def forward(self, x: Tensor, step: Step, sets: list[int] | None = None) -> Tensor:
        """``x``: (B, T, C), the same back.

        Args:
            x: After the norm.
            step: What the layers of this call share.
            sets: Which weights each of the T tokens uses; None where there is one set.
        """
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = by_set(self.in_projs, x, sets).view(B, T, H + 2 * G, -1)  # (B, T, H + 2 G, D)
        qk, v = qkv[:, :, : H + G], qkv[:, :, H + G :]
        if step.turns is not None:
            qk = rotate(qk, step.turns, halves=step.halves)
        q, k, v = (y.transpose(1, 2) for y in (qk[:, :, :H], qk[:, :, H:], v))  # (B, H, T, D)
        if step.placement is not None:
            k, v = cast("Ring", self.state()).extend(k, v, step.placement)
            q = q.to(k.dtype)  # autocast
        y = attend(q, k, v, step.blocks)
        return by_set(self.out_projs, y.transpose(1, 2).reshape(B, T, -1), sets)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """Attention (B, H, T, D) of queries to keys (B, G, L, D): head h uses keys h // (H / G)."""
    if len(blocks) == 1 and blocks[0].mask is None:
        return causal_attention(q, k, v, training=False)
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for block in blocks:
        rows, columns = q[:, :, block.rows], block.columns
        mask = None if block.mask is None else block.mask.to(q.dtype)  # autocast
        y = F.scaled_dot_product_attention(
            rows, k[:, :, columns], v[:, :, columns], mask, enable_gqa=grouped
        )
        parts.append(y)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def offline_blocks(length: int, context: int | None, like: Tensor) -> tuple[Block, ...]:
    """Blocks of queries of an input that stands alone; memory grows with length times context."""
    if context is None or length <= context:
        return (Block(slice(None), slice(None), None),)
    blocks = []
    for start in range(0, length, ROWS):
        stop, first = min(start + ROWS, length), max(0, start - context + 1)
        positions = torch.arange(first, stop, device=like.device)[None]  # (1, columns)
        mask = visible(positions[:, start - first :], positions, context, like)
        blocks.append(Block(slice(start, stop), slice(first, stop), mask))
    return tuple(blocks)


def visible(queries: Tensor, keys: Tensor, context: int | None, like: Tensor) -> Tensor:
    """Mask (B, 1, T, L) of queries at positions (B, T) and keys at (B, L); negative: no key."""
    distance = queries[:, :, None] - keys[:, None, :]  # (B, T, L)
    seen = (distance >= 0) & (keys >= 0)[:, None, :]
    if context is not None:
        seen &= distance < context
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~seen, -torch.inf)[:, None]


def slot_positions(last: Tensor, capacity: int, filled: int) -> Tensor:
    """Positions (B, filled) in the first slots of rings whose newest token is at ``last`` (B,).

    Slots that nothing was written to get a negative position.
    """
    slots = torch.arange(filled, device=last.device)
    return last[:, None] - (last[:, None] - slots) % capacity


def by_set(linears: nn.ModuleList, x: Tensor, sets: list[int] | None) -> Tensor:
    """``x`` (B, T, C) through one of several linear layers, each token through its own."""
    if sets is None:
        return cast("Tensor", linears[0](x))
    if len(sets) == 1:
        return cast("Tensor", linears[sets[0]](x))
    rows = zip(sets, x.unbind(1), strict=True)  # the gradient of slices would be summed up, T times
    return torch.stack([linears[i](row) for i, row in rows], dim=1)


def floating(module: nn.Module) -> Tensor:
    """A tensor of the module in the dtype, and on the device, in which it computes."""
    tensors = (*module.parameters(), *module.buffers())
    return next(tensor for tensor in tensors if tensor.is_floating_point())


def _split_stacked(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """``in_proj_weight``, ``out_proj.weight``, ``in_proj.lora_A.weight``, ... become lists."""
    for name in ("in_proj", "out_proj"):
        count = len(cast("nn.ModuleList", getattr(module, name + "s")))
        start = prefix + name
        for key in [k for k in state_dict if k.startswith((start + "_", start + "."))]:
            rest = key.removeprefix(start)[1:]
            for index, part in enumerate(state_dict.pop(key).chunk(count)):
                state_dict[f"{start}s.{index}.{rest}"] = part
