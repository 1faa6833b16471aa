"""TTT layers: a mixer of tokens whose memory is a small network that learns as it reads.

TTT-Linear and TTT-MLP of Sun et al. 2024 under the names of their released weights. A stream's
memory is of one size however long it lasts; each stream of a batch has its own place in its
mini-batch. Fast weights stay float32 whatever the module's dtype is: in bfloat16 they drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_fl.models.speech.attention import floating
from moshi_fl.models.speech.streaming import StreamingModule
from moshi_fl.models.speech.ttt_config import TttConfig
from moshi_fl.models.speech.ttt_rule import (
    FastLayer,
    HeadNorm,
    answer,
    drawn_back,
    gelu,
    learnt,
    steps_of,
    wide,
)
from moshi_fl.models.speech.ttt_state import TAPS, Projected, TttState


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
            self.alpha = nn.Parameter(torch.full((C,), float(config.alpha)))
        self.depth = len(widths) - 1
        self.register_buffer("turns", self._turns(), persistent=False)
        self.register_load_state_dict_post_hook(_made_on_meta)  # type: ignore[no-untyped-call]
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight") or name in {"W1", "W2", "learnable_ttt_lr_weight"}:
                nn.init.normal_(parameter, std=0.02)

    def _turns(self) -> Tensor:
        """Cosine and sine of each pair of columns at the places of a mini-batch, (K, D / 2, 2)."""
        D, like = self.config.head_dim, floating(self.q_proj)
        rates = self.config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.arange(self.config.mini_batch, dtype=torch.float64)[:, None] * rates
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
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
        """What every stream begins with, learnt in training."""
        return [
            FastLayer(
                *(self._tiled(getattr(self, f"{kind}{number}"), batch) for kind in ("W", "b"))
            )
            for number in range(1, self.depth + 1)
        ]

    def head_norm(self, batch: int) -> HeadNorm:
        """The norm of each head, for ``batch`` items."""
        gain, shift = self.ttt_norm_weight[:, None], self.ttt_norm_bias[:, None]
        return HeadNorm(self._tiled(gain, batch), self._tiled(shift, batch))

    def causal(self) -> Tensor:
        """What token j's gradient counts for token i, (K, K): 1 / (i + 1), with a learnt change."""
        learnt = self.learnable_token_idx.to(wide(self.learnable_token_idx.dtype))
        places = torch.arange(1, len(learnt) + 1, device=learnt.device, dtype=learnt.dtype)
        tau = (learnt + 1 / places).clamp_min(0)
        return tau[:, None].expand(-1, len(learnt)).tril()

    @staticmethod
    def _tiled(parameter: Tensor, batch: int) -> Tensor:
        """``parameter`` (H, ...) for each item: (N, ...), in float32 at least."""
        wider = parameter.to(wide(parameter.dtype))
        return wider.expand(batch, *wider.shape).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back."""
        self.check_batch(x)
        B, T, C = x.shape
        y = self._whole(x) if self._state is None else self._piece(x)  # (N, T, D)
        if T > 1:
            y = y.view(B, -1, T, y.shape[2]).transpose(1, 2)
        y = self.post_norm(y.reshape(B * T, C).to(x.dtype))
        if self.config.use_gate:
            y = gelu(self.g_proj(x.reshape(B * T, C))) * y
        y = cast("Tensor", self.o_proj(y)).view(x.shape)
        return y * self.alpha.tanh() if self.config.alpha is not None else y

    def project(self, x: Tensor, position: Tensor, recent: Tensor | None = None) -> Projected:
        """Of tokens ``x`` (B, T, C) at ``position`` (B or 1, T) of their mini-batches.

        ``recent``: what the convolutions of the stream's state have seen, (B, TAPS - 1, C).
        """
        (B, T, _), H, width = x.shape, self.config.n_heads, wide(x.dtype)
        table = torch.view_as_complex(self.turns)  # (K, D / 2)
        q = self.q_proj(x)
        q, k = self._told_apart(q, recent) if self.config.share_qk else (q, self.k_proj(x))
        pairs = torch.stack([q, k]).to(width).view(2, B, T, H, -1, 2)
        turns = table.index_select(0, position.flatten()).view(*position.shape, 1, -1)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        q, k = turned.flatten(-2).transpose(2, 3).reshape(2, B * H, T, -1)
        v = self.v_proj(x).to(width).view(B, T, H, -1).transpose(1, 2).reshape(k.shape)
        rate = F.linear(x, self.learnable_ttt_lr_weight[:, 0], self.learnable_ttt_lr_bias[:, 0])
        scale = self.config.learning_rate / self.config.head_dim
        eta = torch.sigmoid(rate.to(width)).mT.reshape(B * H, T) * scale
        return Projected(q, k, v - k, eta)

    def _told_apart(self, shared: Tensor, recent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, C) of a shared projection, by a short convolution each."""
        past = shared.new_zeros(len(shared), TAPS - 1, shared.shape[-1])
        rows = torch.cat([past if recent is None else recent, shared], dim=1)  # (B, 3 + T, C)
        if recent is not None:
            self.state().keep(recent, rows[:, 1 - TAPS :])
        rows = rows.mT
        return self.conv_q(rows).mT, self.conv_k(rows).mT

    def _whole(self, x: Tensor) -> Tensor:
        """The dual form from a stream's start: (N, T, D)."""
        K, T, B = self.config.mini_batch, x.shape[1], len(x)
        given = self.project(x, torch.arange(T, device=x.device)[None] % K)
        first, norm, causal = self.first_weights(B), self.head_norm(B), self.causal()
        group = K * self.config.checkpoint_every
        if not group or not (self.training and torch.is_grad_enabled()):
            return self._scan(first, first, norm, causal, given)[0]
        answers, fast = [], first
        for start in range(0, T, group):
            part = given.part(start, start + group)
            y, fast = checkpoint(self._scan, fast, first, norm, causal, part, use_reentrant=False)
            answers.append(y)
        return torch.cat(answers, dim=1)

    def _scan(
        self,
        fast: list[FastLayer],
        first: list[FastLayer],
        norm: HeadNorm,
        causal: Tensor,
        given: Projected,
    ) -> tuple[Tensor, list[FastLayer]]:
        """The dual form from the start of a mini-batch: answers (N, T, D), and weights."""
        K, answers = self.config.mini_batch, []
        for start in range(0, given.q.shape[1], K):
            q, k, target, eta = given.part(start, start + K)
            n = q.shape[1]
            steps = steps_of(fast, k, target, norm)
            rates = causal[:n, :n] * eta[:, None]  # (N, n, n)
            answers.append(answer(fast, q, steps, rates, norm))
            if n == K:
                fast = drawn_back(learnt(fast, steps, rates[:, -1]), first, self.config.forget)
        return torch.cat(answers, dim=1), fast

    def _piece(self, x: Tensor) -> Tensor:
        """The buffered form: (N, T, D) of the next tokens of each stream."""
        state, K, T = self.state(), self.config.mini_batch, x.shape[1]
        position = state.count[:, None]  # (B, T)
        if T > 1:
            position = (position + torch.arange(T, device=x.device)) % K
        if T == 1 and state.reader and not torch.is_grad_enabled():
            return self._continue(state.reader.read(x[:, 0], state.count))
        given = self.project(x, position, state.recent if self.config.share_qk else None)
        if T == 1:
            return self._continue(given)
        answers, start = [], 0
        while start < T:  # up to where the first stream's mini-batch ends
            room = K - int(state.count.max())
            answers.append(self._continue(given.part(start, start + room)))
            start += room
        return torch.cat(answers, dim=1)

    def _continue(self, given: Projected) -> Tensor:
        """Answers (N, n, D) to tokens that end no mini-batch but with their last."""
        q, k, target, eta = given
        state, H, n, K = self.state(), self.config.n_heads, q.shape[1], self.config.mini_batch
        position = state.count[:, None]  # (B, n)
        if n > 1:
            position = position + torch.arange(n, device=q.device)
        state.write(steps_of(state.fast, k, target, state.norm), eta, position)
        causal = state.causal.index_select(0, position.flatten()).view(-1, 1, n, K)
        rates = (causal * state.rates[:, :, None]).view(-1, n, K)  # of (B, H, n, K)
        y = answer(state.fast, q, state.steps, rates, state.norm)
        state.advance(n)
        full = state.count == K
        if full.is_cuda or full.any():  # a GPU is not asked: it would have to be waited for
            rates = state.causal[-1] * state.rates.view(len(q), -1)
            new = learnt(state.fast, state.steps, rates)
            if self.config.forget:
                new = drawn_back(new, self.first_weights(len(q) // H), self.config.forget)
            state.replace(new, full)
        return y


def _made_on_meta(layer: Ttt, _: object) -> None:
    """Weights that are assigned to a layer on the meta device bring no table along."""
    layer.turns = layer._turns()  # noqa: SLF001
