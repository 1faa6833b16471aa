"""The Moshi language model: one transformer over frames, and one over the codebooks of a frame.

A frame is a column of tokens, text first, then the audio codebooks of whoever is predicted, then
those of whoever is listened to. The temporal transformer reads columns; for each, the depth
transformer predicts text's and audio's tokens one after the other (Défossez et al. 2024). Streams
are delayed against one another, so that within a column semantic tokens come before acoustic ones.
Parameter names are those of Kyutai's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import DataError
from moshi_fl.models.speech.layers import make_norm
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mixer import with_ttt
from moshi_fl.models.speech.product import Linear
from moshi_fl.models.speech.streaming import StreamingModule
from moshi_fl.models.speech.transformer import StreamingTransformer

ZERO_TOKEN = -1
"""A token that adds nothing to a column and that no loss counts."""


class LMOutput(NamedTuple):
    """What the model predicts; position t of each tensor is about frame t of the codes.

    Attributes:
        logits: Of audio, (B, dep_q, T, card).
        mask: Where they are valid and the codes are there, (B, dep_q, T) bool.
        text_logits: (B, 1, T, text_card).
        text_mask: (B, 1, T) bool.
    """

    logits: Tensor
    mask: Tensor
    text_logits: Tensor
    text_mask: Tensor


class TokenEmbedding(nn.Module):
    """A vector for each token, and exactly zero for the zero token."""

    def __init__(
        self, rows: int, width: int, *, rank: int | None = None, norm: bool = False
    ) -> None:
        super().__init__()
        columns = rank or width
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.norm = make_norm("layer_norm", columns) if norm else None
        self.low_rank = nn.Linear(columns, width, bias=False) if rank else None
        _truncated_normal(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: (...); their vectors, (..., C)."""
        return self.vectors(tokens.clamp_min(0), (tokens != ZERO_TOKEN)[..., None])

    def vectors(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Of ``tokens`` (...) where ``known`` (..., 1) holds, and zero elsewhere: (..., C)."""
        x = F.embedding(tokens, self.weight)
        x = x if self.norm is None else self.norm(x)
        x = torch.where(known, x, 0)
        return x if self.low_rank is None else cast("Tensor", self.low_rank(x))


class LMModel(StreamingModule):
    """Logits of text and audio tokens for frames of codes.

    Attributes:
        transformer: Over frames; it streams with the model.
        depformer: Over the codebooks of one frame; a stream of frames passes it by.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.depformer_dim
        audio, text, norm = c.card + 1, c.text_card + 1, c.norm_emb
        self.emb = nn.ModuleList(TokenEmbedding(audio, c.dim, norm=norm) for _ in range(c.n_q))
        self.text_emb = TokenEmbedding(text, c.dim, norm=norm)
        self.transformer = with_ttt(StreamingTransformer(c.temporal), c)
        self.out_norm = make_norm(c.norm, c.dim)
        self.text_linear = Linear(c.dim, c.text_card, bias=c.bias_proj)
        self.extra_heads = nn.ModuleList(
            nn.Linear(c.dim, c.extra_heads_dim, bias=False) for _ in range(c.extra_heads_num_heads)
        )
        inputs = max(c.weight_of_step) + 1 if c.depformer_multi_linear else 1
        self.depformer_in = nn.ModuleList(Linear(c.dim, width, bias=False) for _ in range(inputs))
        rank = c.depformer_low_rank_embeddings
        self.depformer_emb = nn.ModuleList(
            TokenEmbedding(audio, width, rank=rank, norm=norm) for _ in range(c.dep_q - 1)
        )
        self.depformer_text_emb = TokenEmbedding(text, width, rank=rank, norm=norm)
        self.depformer = StreamingTransformer(c.depth)
        self.depformer.detached = True
        self.depformer_norms = nn.ModuleList(
            nn.Identity() if c.depformer_norm is None else make_norm(c.depformer_norm, width)
            for _ in range(c.dep_q)
        )
        self.linears = nn.ModuleList(
            Linear(width, c.card, bias=c.bias_proj) for _ in range(c.dep_q)
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Truncated normal, biases 0; the depth transformer keeps PyTorch's default."""
        for part in (self.transformer, self.text_linear, self.linears):
            for name, module in part.named_modules():
                if isinstance(module, nn.Linear) and ".ttt." not in name:
                    _truncated_normal(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    @property
    def num_codebooks(self) -> int:
        """Tokens of a column."""
        return self.config.n_q + 1

    @property
    def audio_offset(self) -> int:
        """Where audio begins in a column."""
        return 1

    def forward(self, codes: Tensor, sum_condition: Tensor | None = None) -> LMOutput:
        """Predict each frame of ``codes`` (B, n_q + 1, T) from those before it.

        Args:
            codes: Tokens of each stream, -1 where there are none.
            sum_condition: Added to each column, (B, 1 or T, C).

        Raises:
            DataError: Codes of another shape, none, or out of range.
        """
        self.check_codes(codes)
        late = self.delayed(codes)
        columns = torch.cat([self._initial(codes), late[:, :, :-1]], dim=2)
        hidden = self.read(columns, sum_condition)
        text, *audio = self.config.delays[: self.config.dep_q + 1]
        text_logits = _undelayed([self.text_linear(hidden[:, text:])], hidden)
        logits = self.forward_depth(hidden, late[:, : self.config.dep_q], audio)
        known = codes != ZERO_TOKEN
        return LMOutput(
            logits,
            known[:, 1 : 1 + len(audio)] & _there(audio, codes),
            text_logits,
            known[:, :1] & _there([text], codes),
        )

    def forward_text(
        self, columns: Tensor, sum_condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read columns (B, n_q + 1, T); hidden states (B, T, C) and text logits (B, 1, T, V)."""
        hidden = self.read(columns, sum_condition)
        return hidden, self.text_linear(hidden)[:, None]

    def read(self, columns: Tensor, sum_condition: Tensor | None = None) -> Tensor:
        """Read columns (B, n_q + 1, T); hidden states (B, T, C). All that a prompt needs."""
        x = self.embedded(columns)
        if sum_condition is not None:
            x = x + sum_condition.to(x.dtype)
        return cast("Tensor", self.out_norm(self.transformer(x)))

    def embedded(self, columns: Tensor) -> Tensor:
        """The sum of the vectors of each column's tokens, audio first: (B, T, C)."""
        tokens = columns.clamp_min(0).unbind(1)
        known = (columns != ZERO_TOKEN)[..., None].unbind(1)
        tables = [*cast("Iterable[TokenEmbedding]", self.emb), self.text_emb]
        first, *rest = zip(tables, (*tokens[1:], tokens[0]), (*known[1:], known[0]), strict=True)
        x = first[0].vectors(first[1], first[2])
        for table, token, there in rest:
            x = x + table.vectors(token, there)
        return x

    def forward_depth(
        self, hidden: Tensor, tokens: Tensor, delays: Sequence[int] | None = None
    ) -> Tensor:
        """Logits (B, dep_q, T, card) of each frame's audio, all codebooks at once.

        Args:
            hidden: Of the temporal transformer, (B, T, C).
            tokens: What each codebook is told: text, then audio but the last, (B, dep_q, T).
            delays: Frames by which each codebook is moved up, its last ones 0; None: not at all.
        """
        B, T, _ = hidden.shape
        count = self.config.dep_q
        steps = [self.depth_input(c, hidden, tokens[:, c]) for c in range(count)]
        x = torch.stack(steps, dim=2).flatten(0, 1)  # (B T, dep_q, D)
        y = self.depformer(x).view(B, T, count, -1).unbind(2)
        rows = zip(y, delays or [0] * count, strict=True)
        heads = [self.depth_head(c, row[:, delay:]) for c, (row, delay) in enumerate(rows)]
        return _undelayed(heads, hidden)

    def depth_input(self, step: int, hidden: Tensor, token: Tensor) -> Tensor:
        """What the depth transformer is given, (..., D): ``hidden`` (..., C), ``token`` (...)."""
        weights = self.config.weight_of_step[step] if self.config.depformer_multi_linear else 0
        embedding = self.depformer_emb[step - 1] if step else self.depformer_text_emb
        return cast("Tensor", self.depformer_in[weights](hidden) + embedding(token))

    def depth_head(self, step: int, y: Tensor) -> Tensor:
        """Logits (..., card) of codebook ``step`` from ``y`` (..., D)."""
        return cast("Tensor", self.linears[step](self.depformer_norms[step](y)))

    def delayed(self, codes: Tensor) -> Tensor:
        """``codes`` (B, K, T) with each stream as many frames later as its delay says."""
        first = self._initial(codes)
        rows = []
        for stream, delay in enumerate(self.config.delays):
            row = codes[:, stream]
            waiting = first[:, stream].expand(-1, min(delay, row.shape[1]))
            rows.append(torch.cat([waiting, row[:, : max(0, row.shape[1] - delay)]], dim=1))
        return torch.stack(rows, dim=1)

    def _initial(self, codes: Tensor) -> Tensor:
        tokens = torch.tensor(self.config.initial_tokens, device=codes.device)
        return tokens[:, None].expand(len(codes), -1, 1)

    def check_codes(self, codes: Tensor) -> None:
        """Codes must be (B, n_q + 1, T) whole numbers from -1 to what each head can predict.

        Raises:
            DataError: They are not; says which.
        """
        check_codes(codes, [initial - 1 for initial in self.config.initial_tokens])


def check_codes(codes: Tensor, most: list[int]) -> None:
    """Codes must be (B, streams, T) whole numbers from -1 to each stream's ``most``.

    Raises:
        DataError: They are not; says which.
    """
    if codes.dim() != 3 or codes.shape[1] != len(most) or not codes.numel():
        raise DataError(
            f"codes of shape {list(codes.shape)}; they must be (batch, {len(most)}, frames).",
        )
    if codes.dtype not in {torch.int64, torch.int32}:
        raise DataError(f"codes are {codes.dtype}; they must be whole numbers (int64).")
    highest = torch.tensor(most, device=codes.device)[:, None]
    wrong = (codes < ZERO_TOKEN) | (codes > highest)
    if wrong.any():
        item, stream, frame = wrong.nonzero()[0].tolist()
        raise DataError(
            f"code {int(codes[item, stream, frame])} of stream {stream} at frame {frame} is out "
            f"of range: it must be from 0 to {most[stream]}, or -1 for none.",
        )


def _undelayed(streams: list[Tensor], like: Tensor) -> Tensor:
    """Logits (B, K, T, V) from those of each stream, (B, T or fewer, V), with zeros at the end.

    ``like``: anything (B, T, ...).
    """
    B, T = like.shape[:2]
    parts: list[Tensor] = []
    for logits in streams:
        parts.append(logits)
        if missing := T - logits.shape[1]:
            parts.append(logits.new_zeros(B, missing, logits.shape[2]))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return whole.view(B, len(streams), T, -1)


def _there(delays: Sequence[int], codes: Tensor) -> Tensor:
    """Which frames of ``codes`` (B, streams, T) late streams have predicted, (K, T) bool."""
    times = torch.arange(codes.shape[2], device=codes.device)
    return torch.stack([times < len(times) - delay for delay in delays])


def _truncated_normal(weight: Tensor) -> None:
    std = weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
