"""Split residual vector quantisation: one semantic level and many acoustic ones.

Both parts see the same latent, each through a projection of its own. Inside a part, each level
quantises what those before it left over. Codebooks learn by moving averages, not by gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import require_counts

DECAY = 0.99  # of the moving averages
LEAST_USAGE = 1e-5  # a centroid is a sum over a usage; of a code never used, over this
CHECK_EVERY = 5  # training calls between replacements of codes that are hardly used
RARE = 0.1  # of the mean usage; less is hardly used
KMEANS_STEPS = 50
OLD_NAMES = {
    "inited": "_initialized",
    "cluster_size": "cluster_usage",
    "embed_avg": "embedding_sum",
    "embed_sum": "embedding_sum",
}


@dataclass(frozen=True)
class QuantizerConfig:
    """Size of the quantiser.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    dimension: int = 256  # of a centroid
    n_q: int = 32  # levels: one semantic, the others acoustic
    bins: int = 2048  # codes of a level

    def __post_init__(self) -> None:
        require_counts(self, ("dimension", "n_q", "bins"), name="quantizer")
        if self.n_q < 2:
            raise ConfigError(f"quantizer: n_q = {self.n_q} must be at least 2.")


@dataclass(frozen=True)
class Quantized:
    """What quantisation gives.

    Attributes:
        latent: In place of the input, (B, T, C); its gradient goes straight to the input.
        codes: (B, levels, T).
        penalty: Mean over the levels of the mean squared distance to the chosen centroid.
    """

    latent: Tensor
    codes: Tensor
    penalty: Tensor


class Codebook(nn.Module):
    """The centroids of one level, kept as sums and counts of the vectors that chose them."""

    _initialized: Tensor
    cluster_usage: Tensor  # (bins,)
    embedding_sum: Tensor  # (bins, D)

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.register_buffer("_initialized", torch.zeros(1))
        self.register_buffer("cluster_usage", torch.ones(config.bins))
        self.register_buffer("embedding_sum", torch.zeros(config.bins, config.dimension))
        self._calls = 0
        self._cache: tuple[object, Tensor, Tensor] | None = None
        self.register_load_state_dict_pre_hook(_rename_old)  # type: ignore[no-untyped-call]

    @property
    def initialized(self) -> bool:
        """Whether the centroids have been learnt or loaded."""
        return bool(self._initialized.item())

    def centroids(self) -> tuple[Tensor, Tensor]:
        """Centroids (bins, D) and half their squared lengths (bins,); computed when they change."""
        parts = (self.embedding_sum, self.cluster_usage)
        if any(part.is_inference() for part in parts):  # such tensors count no changes
            return self._computed()
        key = tuple((part.data_ptr(), part._version, part.dtype) for part in parts)  # noqa: SLF001
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._cache = (key, *self._computed())
        return self._cache[1], self._cache[2]

    def _computed(self) -> tuple[Tensor, Tensor]:
        found = self.embedding_sum / self.cluster_usage.clamp(min=LEAST_USAGE)[:, None]
        return found, found.square().sum(1) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """Codes (N,) of vectors (N, D): the first of the nearest centroids."""
        centroids, halves = self.centroids()
        return torch.addmm(halves, x, centroids.t(), alpha=-1).argmin(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Centroids (..., D) of codes (...)."""
        return F.embedding(codes, self.centroids()[0])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Put the centroids where vectors (N, D) lie."""
        centroids, usage = kmeans(x, len(self.cluster_usage))
        self.cluster_usage.copy_(usage)
        self.embedding_sum.copy_(centroids * usage[:, None])
        self._initialized.fill_(1)

    @torch.no_grad()
    def learn(self, x: Tensor, codes: Tensor) -> None:
        """Move the centroids towards the vectors (N, D) that chose them by ``codes`` (N,)."""
        if self.initialized:
            self._calls += 1
            if self._calls % CHECK_EVERY == 0:
                self._replace_rare(x)
        counts = torch.zeros_like(self.cluster_usage).index_add_(0, codes, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.embedding_sum).index_add_(0, codes, x)
        self.cluster_usage.lerp_(counts, 1 - DECAY)
        self.embedding_sum.lerp_(sums, 1 - DECAY)

    def _replace_rare(self, x: Tensor) -> None:
        """Give codes that are hardly used a random vector and the mean usage."""
        mean = self.cluster_usage.mean()
        rare = self.cluster_usage < RARE * mean
        vectors = _drawn(x, len(rare))
        self.embedding_sum.copy_(torch.where(rare[:, None], mean * vectors, self.embedding_sum))
        self.cluster_usage.copy_(torch.where(rare, mean, self.cluster_usage))


def kmeans(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` centroids (count, D) of vectors (N, D), and how many vectors each has (count,).

    A centroid without vectors becomes a random one.
    """
    centroids = _drawn(x, count)
    usage = torch.ones(count, dtype=x.dtype, device=x.device)
    for _ in range(KMEANS_STEPS):
        codes = torch.cdist(x, centroids).argmin(1)
        found = torch.bincount(codes, minlength=count)
        usage = found.clamp(min=1).to(x.dtype)
        means = torch.zeros_like(centroids).index_add_(0, codes, x) / usage[:, None]
        centroids = torch.where(found[:, None] == 0, _drawn(x, count), means)
    return centroids, usage


def _drawn(x: Tensor, count: int) -> Tensor:
    """``count`` of the vectors (N, D) at random, each at most once where there are enough."""
    if len(x) >= count:
        return x[torch.randperm(len(x), device=x.device)[:count]]
    return x[torch.randint(len(x), (count,), device=x.device)]


class _Level(nn.Module):
    """One level; a module of its own for the name in Kyutai's checkpoints."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self._codebook = Codebook(config)

    @property
    def codebook(self) -> Codebook:
        return self._codebook


class ResidualQuantizer(nn.Module):
    """Levels that each quantise what those before them left over, between two projections."""

    def __init__(self, config: QuantizerConfig, width: int, levels: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv1d(width, config.dimension, 1, bias=False)
        self.output_proj = nn.Conv1d(config.dimension, width, 1, bias=False)
        self.vq = nn.ModuleDict({"layers": nn.ModuleList(_Level(config) for _ in range(levels))})

    @property
    def codebooks(self) -> list[Codebook]:
        """Of the levels, in order."""
        layers = cast("nn.ModuleList", self.vq["layers"])
        return [cast("_Level", level).codebook for level in layers]

    def encode(self, x: Tensor, levels: int) -> Tensor:
        """Codes (B, levels, T) of latents (B, T, C)."""
        inner = F.linear(x, self.input_proj.weight[:, :, 0])  # (B, T, D)
        left, codes = inner.flatten(0, 1), []
        for codebook in self.codebooks[:levels]:
            codes.append(codebook.nearest(left))
            left = left - codebook.decode(codes[-1])
        return torch.stack(codes).view(levels, *x.shape[:2]).transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, T, C) of codes (B, levels, T); the first levels will do."""
        books = zip(self.codebooks, codes.unbind(1), strict=False)
        total = torch.stack([book.decode(level) for book, level in books]).sum(0)  # (B, T, D)
        return F.linear(total, self.output_proj.weight[:, :, 0])

    def forward(self, x: Tensor, levels: int) -> Quantized:
        """Latents (B, T, C) quantised; in training mode the codebooks learn."""
        inner = F.linear(x, self.input_proj.weight[:, :, 0]).flatten(0, 1)  # (B T, D)
        left, codes, penalties, may_initialize = inner, [], [], True
        for codebook in self.codebooks[:levels]:
            if self.training:
                ready = codebook.initialized
                if may_initialize and not ready:
                    codebook.initialize(left)
                may_initialize = ready  # one level in a call, from the first on
            codes.append(codebook.nearest(left))
            chosen = codebook.decode(codes[-1])
            if self.training:
                codebook.learn(left, codes[-1])
            penalties.append(F.mse_loss(left, chosen))
            left = left - chosen
        total = inner + (inner - left - inner).detach()
        latent = F.linear(total.view(*x.shape[:2], -1), self.output_proj.weight[:, :, 0])
        stacked = torch.stack(codes).view(levels, *x.shape[:2]).transpose(0, 1)
        return Quantized(latent, stacked, torch.stack(penalties).mean())


class SplitQuantizer(nn.Module):
    """The semantic level and the acoustic ones side by side; what they give is added."""

    def __init__(self, config: QuantizerConfig, width: int) -> None:
        super().__init__()
        self.levels = config.n_q
        self.rvq_first = ResidualQuantizer(config, width, 1)
        self.rvq_rest = ResidualQuantizer(config, width, config.n_q - 1)

    def encode(self, x: Tensor, levels: int) -> Tensor:
        """Codes (B, levels, T) of latents (B, T, C)."""
        codes = self.rvq_first.encode(x, 1)
        if levels == 1:
            return codes
        return torch.cat([codes, self.rvq_rest.encode(x, levels - 1)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, T, C) of codes (B, levels, T)."""
        latent = self.rvq_first.decode(codes[:, :1])
        return latent if codes.shape[1] == 1 else latent + self.rvq_rest.decode(codes[:, 1:])

    def forward(self, x: Tensor, levels: int) -> Quantized:
        """Latents (B, T, C) quantised with the first levels; the penalty weights each the same."""
        first = self.rvq_first(x, 1)
        if levels == 1:
            return first  # type: ignore[no-any-return]
        rest = self.rvq_rest(x, levels - 1)
        return Quantized(
            first.latent + rest.latent,
            torch.cat([first.codes, rest.codes], dim=1),
            (first.penalty + (levels - 1) * rest.penalty) / levels,
        )


def _rename_old(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for old, new in OLD_NAMES.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
