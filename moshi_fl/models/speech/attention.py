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
from moshi_fl.models.speech.product import Linear
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
        turns: Of rotary positions, (B or 1, T, H / G + 2, 1, D / 2) complex: the same for each
            group of G heads of queries and for the keys, and none for the values, which are last.
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
    """The last keys, turned, and values of one layer: (B, 2 G, capacity, D), keys first.

    The token at position p lies in slot p mod capacity.
    """

    def __init__(self, batch: int, shape: tuple[int, int, int], like: Tensor) -> None:
        super().__init__(batch, like.device)
        self.held = torch.zeros(batch, *shape, dtype=like.dtype, device=like.device)

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.held, mask)

    def extend(self, new: Tensor, placement: Placement) -> Tensor:
        """Keys and values of the past and of now (B, 2 G, L, D), for new ones (B, 2 G, T, D)."""
        seen = self.held[:, :, : placement.filled]
        if not placement.before:
            seen = torch.cat([seen, new], dim=2)
        new = new[:, :, -placement.slots.shape[2] :].to(self.held.dtype)
        self.put(self.held, placement.slots.expand_as(new), new)
        return seen


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
        self.in_projs = nn.ModuleList(Linear(width, rows, bias=False) for _ in range(sets))
        self.out_projs = nn.ModuleList(Linear(width, width, bias=False) for _ in range(sets))
        self.register_load_state_dict_pre_hook(_split_stacked)  # type: ignore[no-untyped-call]

    def initial_state(self, batch: int) -> Ring:
        """An empty ring in the dtype of the weights."""
        return Ring(batch, (2 * self.kv_heads, self.capacity, self.head_width), floating(self))

    def forward(self, x: Tensor, step: Step, sets: list[int] | None = None) -> Tensor:
        """``x``: (B, T, C), the same back.

        Args:
            x: After the norm.
            step: What the layers of this call share.
            sets: Which weights each of the T tokens uses; None where there is one set.
        """
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = by_set(self.in_projs, x, sets).view(B, T, -1, G, self.head_width)
        if step.turns is not None:
            qkv = rotate(qkv, step.turns, halves=step.halves)  # (B, T, H / G + 2, G, D)
        q, kv = qkv.flatten(2, 3).transpose(1, 2).split_with_sizes([H, 2 * G], dim=1)
        if step.placement is not None:
            kv = cast("Ring", self.state()).extend(kv, step.placement)
            q = q.to(kv.dtype)  # autocast
        k, v = kv.chunk(2, dim=1)  # (B, G, L, D)
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
            if f"{start}s.0.{rest}" in state_dict or not state_dict[key].dim():
                continue  # given twice, or no stack: unknown
            for index, part in enumerate(state_dict.pop(key).chunk(count)):
                state_dict[f"{start}s.{index}.{rest}"] = part
