"""The character transformer: decoder-only, sinusoidal positions, untied head with bias.

Post-norm blocks are ``x = LN(x + Attention(x)); x = LN(x + FFN(x))`` (Vaswani et al. 2017) with
GELU; pre-norm blocks ``x = x + Attention(LN(x)); x = x + FFN(LN(x))`` bear higher learning rates.
Linear layers and embeddings keep PyTorch's default initialisation, which learns much faster on
small budgets than GPT-2's 0.02. Parameter names are those of ``nn.MultiheadAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import ConfigError
from moshi_fl.models.attention import Dropout, causal_attention
from moshi_fl.models.common import require_counts, require_fractions, settings_from


@dataclass(frozen=True)
class CharConfig:
    """Size of the model; the ``[model]`` table of a hub.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    n_layer: int = 6
    n_head: int = 8
    d_model: int = 384
    d_ff: int = 1024
    context: int = 384  # tokens
    dropout: float = 0.0
    fill_in_middle: float = 0.0  # share of the training windows that are rearranged
    norm: Literal["post", "pre"] = "post"  # where a block normalises
    final_norm: bool = False  # a LayerNorm before the head; "pre" has one in any case

    def __post_init__(self) -> None:
        counts = ("n_layer", "n_head", "d_model", "d_ff", "context")
        require_counts(self, counts, name="[model]")
        require_fractions(self, ("dropout", "fill_in_middle"), name="[model]")
        if self.d_model % 2:
            raise ConfigError(f"[model]: d_model = {self.d_model} must be even.")
        if self.d_model % self.n_head:
            raise ConfigError(
                f"[model]: n_head = {self.n_head} must divide d_model = {self.d_model}."
            )
        if self.context < 16:
            raise ConfigError(f"[model]: context = {self.context} must be at least 16.")
        if self.norm not in {"post", "pre"}:
            raise ConfigError(f'[model]: norm = {self.norm!r} must be "post" or "pre".')
        if type(self.final_norm) is not bool:
            raise ConfigError(f"[model]: final_norm = {self.final_norm!r} must be true or false.")

    @property
    def normalises_output(self) -> bool:
        """Whether the model has a LayerNorm before the head."""
        return self.final_norm or self.norm == "pre"

    @classmethod
    def from_reference(cls, table: Mapping[str, Any]) -> CharConfig:
        """Settings under the names of the reference implementation; ``vocab_size`` is passed over.

        Its weights load under their own names: ``load_weights`` ignores its position table.

        Raises:
            ConfigError: An unknown key or a value out of range.
        """
        names = {"n_layers": "n_layer", "n_heads": "n_head", "max_len": "context"}
        renamed = {names.get(key, key): table[key] for key in table if key != "vocab_size"}
        return settings_from(cls, renamed, name="reference configuration")


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it."""

    def __init__(self, config: CharConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.d_model, config.d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.d_model))
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back."""
        return self.attend(F.linear(x, self.in_proj_weight, self.in_proj_bias))

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values in one, (B, T, 3 C), to the answer (B, T, C)."""
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D)
        y = causal_attention(q, k, v, dropout=self.dropout, training=self.training)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class _LayeredAttention(nn.Module):
    """An attention whose first product is a layer of its own, with the same parameters."""

    def __init__(self, attention: CausalAttention) -> None:
        super().__init__()
        rows, width = attention.in_proj_weight.shape
        self.in_proj = nn.Linear(width, rows, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self._attend = attention.attend

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back."""
        return self._attend(self.in_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each added to its input, normalised before or afterwards."""

    def __init__(self, config: CharConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attn = CausalAttention(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.ff = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff),
            nn.GELU(),
            nn.Linear(config.d_ff, config.d_model),
            Dropout(config.dropout),
        )
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back."""
        if self.pre_norm:
            x = x + self.attn(self.norm1(x))
            return x + self.ff(self.norm2(x))  # type: ignore[no-any-return]
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.ff(x))  # type: ignore[no-any-return]


class CharTransformer(nn.Module):
    """Next-token logits for up to ``context`` tokens."""

    # Older checkpoints store the position table; here it is computed, not learnt, so not a weight.
    computed_tensors: ClassVar[frozenset[str]] = frozenset({"pos_encoding.pe"})
    positions: Tensor

    def __init__(self, config: CharConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model) if config.normalises_output else None
        self.fc_out = nn.Linear(config.d_model, vocabulary_size)
        table = sinusoids(config.context, config.d_model)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) for tokens (B, T), where T is at most ``context``."""
        x = self.embedding(tokens)  # (B, T, C)
        x = x + self.positions[: tokens.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        if self.ln_f is not None:
            x = self.ln_f(x)
        return self.fc_out(x)  # type: ignore[no-any-return]

    @contextmanager
    def separated(self) -> Iterator[None]:
        """No window sees another; the attention's parameters get layers of their own."""
        attentions = {block: cast("CausalAttention", block.attn) for block in self.blocks}
        try:
            for block, attention in attentions.items():
                block.attn = _LayeredAttention(attention)
            yield
        finally:
            for block, attention in attentions.items():
                block.attn = attention


def sinusoids(length: int, width: int) -> Tensor:
    """Position table (length, width): sine in even columns, cosine in odd (Vaswani et al. 2017).

    Computed in float64, so that every machine rounds to the same float32.
    """
    rates = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return torch.from_numpy(table.reshape(length, width).astype(np.float32))
