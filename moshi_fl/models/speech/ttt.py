"""TTT layers: a mixer of tokens whose memory is a small network that learns as it reads.

TTT-Linear and TTT-MLP of Sun et al. 2024 under the names of their released weights. A stream's
memory is of one size however long it lasts; each stream of a batch has its own place in its
mini-batch. Fast weights stay float32 whatever the module's dtype is: in bfloat16 they drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_fl.models.speech.streaming import State, StreamingModule, per_item
from moshi_fl.models.speech.ttt_config import TttConfig
from moshi_fl.models.speech.ttt_rule import (
    FastLayer,
    HeadNorm,
    Step,
    answer,
    drawn_back,
    gelu,
    learnt,
    steps_of,
    wide,
)

TAPS = 4  # of the convolutions that tell queries from keys where they share a projection


class Projected(NamedTuple):
    """Queries, keys and targets (B, H, T, D), and learning rates (B, H, T)."""

    q: Tensor
    k: Tensor
    target: Tensor
    eta: Tensor

    def part(self, start: int, stop: int) -> Projected:
        """The tokens from ``start`` to ``stop``."""
        return Projected(*(tensor[:, :, start:stop] for tensor in self))


class TttState(State):
    """Of each stream: its fast weights, and what the tokens of its unfinished mini-batch say.

    Attributes:
        count: Tokens in the unfinished mini-batch, (B,).
        rates: Their learning rates, (B, H, K).
        recent: The last inputs of the convolutions, (B, TAPS - 1, C).
    """

    __slots__ = ("layer",)  # not a part of what is saved

    def __init__(self, layer: Ttt, batch: int) -> None:
        like = layer.q_proj.weight
        super().__init__(batch, like.device)
        self.layer = layer
        c = layer.config
        self.count = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.recent = like.new_zeros(batch, TAPS - 1, c.d_model if c.share_qk else 0)
        for number, fast in enumerate(layer.first_weights(batch), start=1):
            setattr(self, f"W{number}", fast.weight.clone())
            setattr(self, f"b{number}", fast.bias.clone())
            for part, axis in (("inputs", 2), ("grads", 3)):
                shape = (batch, c.n_heads, c.mini_batch, fast.weight.shape[axis])
                setattr(self, f"{part}{number}", fast.weight.new_zeros(shape))
        self.rates = fast.weight.new_zeros(batch, c.n_heads, c.mini_batch)

    @property
    def fast(self) -> list[FastLayer]:
        """The weights that the unfinished mini-batch began with."""
        numbers = range(1, self.layer.depth + 1)
        return [FastLayer(getattr(self, f"W{n}"), getattr(self, f"b{n}")) for n in numbers]

    @property
    def steps(self) -> list[Step]:
        """Of the unfinished mini-batch's tokens; what lies beyond ``count`` has no meaning."""
        numbers = range(1, self.layer.depth + 1)
        return [Step(getattr(self, f"inputs{n}"), getattr(self, f"grads{n}")) for n in numbers]

    def write(self, steps: list[Step], eta: Tensor, position: Tensor) -> None:
        """Keep new tokens' steps (B, H, n, ...) and rates (B, H, n) at ``position`` (B, n)."""
        spot = position[:, None, :, None]
        for kept, new in zip(self.steps, steps, strict=True):
            for buffer, rows in zip(kept, new, strict=True):
                buffer.scatter_(2, spot.expand_as(rows), rows)
        self.rates.scatter_(2, spot[..., 0].expand_as(eta), eta)

    def replace(self, new: list[FastLayer], mask: Tensor) -> None:
        """Give the items of ``mask`` (B,) other weights and an empty mini-batch."""
        for kept, fresh in zip(self.fast, new, strict=True):
            for old, values in zip(kept, fresh, strict=True):
                old.copy_(torch.where(per_item(mask, old), values, old))
        self.count.masked_fill_(mask, 0)

    def reset(self, mask: Tensor) -> None:
        """Back to the weights that the layer has learnt to begin with."""
        super().reset(mask)
        self.replace(self.layer.first_weights(self.batch), mask)
        self.clear(self.recent, mask)


class Ttt(StreamingModule):
    """``x`` (B, T, C) to the same: each token asks the network that those before it have taught."""

    turns: Tensor

    def __init__(self, config: TttConfig) -> None:
        super().__init__()
        self.config = config
        C, H, D = config.d_model, config.n_heads, config.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        if config.share_qk:
            self.conv_q = nn.Conv1d(C, C, TAPS, groups=C)
            self.conv_k = nn.Conv1d(C, C, TAPS, groups=C)
        else:
            self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        if config.use_gate:
            self.g_proj = nn.Linear(C, C, bias=False)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(H, 1, C))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(H, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(config.mini_batch))
        self.ttt_norm_weight = nn.Parameter(torch.ones(H, D))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(H, D))
        self.post_norm = nn.LayerNorm(C, eps=1e-6)
        widths = [D, D] if config.kind == "linear" else [D, 4 * D, D]
        for layer, (rows, columns) in enumerate(itertools.pairwise(widths), start=1):
            self.register_parameter(f"W{layer}", nn.Parameter(torch.empty(H, rows, columns)))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.zeros(H, 1, columns)))
        if config.alpha is not None:
            self.alpha = nn.Parameter(torch.full((C,), config.alpha))
        self.depth = len(widths) - 1
        self.register_buffer("turns", self._turns(), persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight") or name in {"W1", "W2", "learnable_ttt_lr_weight"}:
                nn.init.normal_(parameter, std=0.02)

    def _turns(self) -> Tensor:
        """Cosines and signed sines of the places in a mini-batch, (2, K, D)."""
        D = self.config.head_dim
        rates = self.config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.arange(self.config.mini_batch, dtype=torch.float64)[:, None] * rates
        sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(1)
        table = torch.stack([angles.cos().repeat_interleave(2, 1), sines])
        like = self.q_proj.weight
        return table.to(like.device, wide(like.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ttt:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.turns = self._turns()
        return self

    def initial_state(self, batch: int) -> TttState:
        """Of ``batch`` streams that begin."""
        return TttState(self, batch)

    def state(self) -> TttState:
        """The state of the streams."""
        state = super().state()
        assert isinstance(state, TttState)
        return state

    def first_weights(self, batch: int) -> list[FastLayer]:
        """What every stream begins with, learnt in training; views of the parameters."""
        layers = []
        for number in range(1, self.depth + 1):
            pair = [getattr(self, f"{kind}{number}") for kind in ("W", "b")]
            layers.append(FastLayer(*(p.to(wide(p.dtype)).expand(batch, -1, -1, -1) for p in pair)))
        return layers

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back; while streaming it follows what came before."""
        self.check_batch(x)
        norm = HeadNorm(
            *(w.to(wide(w.dtype))[:, None] for w in (self.ttt_norm_weight, self.ttt_norm_bias))
        )
        y = self._whole(x, norm) if self._state is None else self._piece(x, norm)
        y = self.post_norm(y.transpose(1, 2).reshape(x.shape).to(x.dtype))
        if self.config.use_gate:
            y = gelu(self.g_proj(x)) * y
        y = cast("Tensor", self.o_proj(y))
        return y * self.alpha.tanh() if self.config.alpha is not None else y

    def _project(self, x: Tensor, position: Tensor, recent: Tensor | None) -> Projected:
        """Of tokens ``x`` (B, T, C) at ``position`` (B or 1, T) of their mini-batches."""
        heads, width = (*x.shape[:2], self.config.n_heads, -1), wide(x.dtype)
        q = self.q_proj(x)
        q, k = self._told_apart(q, recent) if self.config.share_qk else (q, self.k_proj(x))
        cosine, sine = self.turns[:, position].unsqueeze(3)  # (B or 1, T, 1, D)
        qk = torch.stack([q, k]).to(width).view(2, *heads)  # (2, B, T, H, D)
        swapped = qk.view(*qk.shape[:-1], -1, 2).flip(-1).flatten(-2)
        q, k = torch.addcmul(qk * cosine, swapped, sine).transpose(2, 3)  # (B, H, T, D)
        v = self.v_proj(x).to(width).view(heads).transpose(1, 2)
        rate = F.linear(x, self.learnable_ttt_lr_weight[:, 0], self.learnable_ttt_lr_bias[:, 0])
        scale = self.config.learning_rate / self.config.head_dim
        eta = torch.sigmoid(rate.to(width)).mT * scale  # (B, H, T)
        return Projected(q, k, v - k, eta)

    def _told_apart(self, shared: Tensor, recent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, C) of a shared projection, by a short convolution each."""
        past = shared.new_zeros(len(shared), TAPS - 1, shared.shape[-1])
        rows = torch.cat([past if recent is None else recent, shared], dim=1)  # (B, 3 + T, C)
        if recent is not None:
            self.state().keep(recent, rows[:, 1 - TAPS :])
        rows = rows.mT
        return self.conv_q(rows).mT, self.conv_k(rows).mT

    def _tau(self) -> Tensor:
        """What a gradient counts for each place in a mini-batch, (K,): 1 / (i + 1), corrected."""
        learnt = self.learnable_token_idx.to(wide(self.learnable_token_idx.dtype))
        places = torch.arange(1, len(learnt) + 1, device=learnt.device, dtype=learnt.dtype)
        return (learnt + 1 / places).clamp_min(0)

    def _whole(self, x: Tensor, norm: HeadNorm) -> Tensor:
        """The dual form from a stream's start: (B, H, T, D)."""
        K, T = self.config.mini_batch, x.shape[1]
        given = self._project(x, torch.arange(T, device=x.device)[None] % K, None)
        first = fast = self.first_weights(len(x))
        group = K * self.config.checkpoint_every
        if not group or not (self.training and torch.is_grad_enabled()):
            return self._scan(fast, first, norm, given)[0]
        answers = []
        for start in range(0, T, group):
            part = given.part(start, start + group)
            y, fast = checkpoint(self._scan, fast, first, norm, part, use_reentrant=False)
            answers.append(y)
        return torch.cat(answers, dim=2)

    def _scan(
        self, fast: list[FastLayer], first: list[FastLayer], norm: HeadNorm, given: Projected
    ) -> tuple[Tensor, list[FastLayer]]:
        """The dual form from the start of a mini-batch: answers (B, H, T, D), and weights."""
        K, answers, tau = self.config.mini_batch, [], self._tau()
        for start in range(0, given.q.shape[2], K):
            q, k, target, eta = given.part(start, start + K)
            n = q.shape[2]
            steps = steps_of(fast, k, target, norm)
            rates = (tau[:n, None] * eta[:, :, None]).tril()  # (B, H, n, n)
            answers.append(answer(fast, q, steps, rates, norm))
            if n == K:
                fast = drawn_back(learnt(fast, steps, rates[:, :, -1]), first, self.config.forget)
        return torch.cat(answers, dim=2), fast

    def _piece(self, x: Tensor, norm: HeadNorm) -> Tensor:
        """The buffered form: (B, H, T, D) of the next tokens of each stream."""
        state, K, T = self.state(), self.config.mini_batch, x.shape[1]
        position = (state.count[:, None] + torch.arange(T, device=x.device)) % K
        recent = state.recent if self.config.share_qk else None
        given = self._project(x, position, recent)
        answers, start = [], 0
        while start < T:  # up to where the first stream's mini-batch ends
            room = 1 if T == 1 else K - int(state.count.max())
            answers.append(self._continue(given.part(start, start + room), norm))
            start += room
        return torch.cat(answers, dim=2)

    def _continue(self, given: Projected, norm: HeadNorm) -> Tensor:
        """Answers (B, H, n, D) to tokens that end no mini-batch but with their last."""
        q, k, target, eta = given
        state, K, tau, n = self.state(), self.config.mini_batch, self._tau(), q.shape[2]
        position = state.count[:, None] + torch.arange(n, device=q.device)  # (B, n)
        state.write(steps_of(state.fast, k, target, norm), eta, position)
        seen = torch.arange(K, device=q.device) <= position[..., None]  # (B, n, K)
        rates = (tau[position][..., None] * seen)[:, None] * state.rates[:, :, None]
        y = answer(state.fast, q, state.steps, rates, norm)
        state.count.add_(state.active, alpha=n)
        full = state.count == K
        if full.is_cuda or full.any():  # a GPU is not asked: it would have to be waited for
            new = learnt(state.fast, state.steps, tau[-1] * state.rates)
            first = self.first_weights(len(q))
            state.replace(drawn_back(new, first, self.config.forget), full)
        return y
