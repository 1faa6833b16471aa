"""SEANet, the convolutional encoder and decoder of Mimi (Tagliasacchi et al. 2020).

Everything inside is time-major, (B, T, C). Indices in ``model`` are those of Kyutai's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import require_counts
from moshi_fl.models.speech.conv import CausalConv, CausalTransposedConv


@dataclass(frozen=True)
class SeanetConfig:
    """Size of the encoder and of the decoder.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    channels: int = 1  # of the sound
    dimension: int = 512  # of the latent
    n_filters: int = 64  # channels beside the sound; they double with each stride
    n_residual_layers: int = 1  # before each stride
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # strides of the decoder; the encoder's are reversed
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2  # of a residual block's width

    def __post_init__(self) -> None:
        counts = [name for name in vars(self) if name != "ratios"]
        require_counts(self, counts, name="seanet")
        listed = isinstance(self.ratios, tuple) and self.ratios
        if not listed or any(type(r) is not int or r < 1 for r in self.ratios):
            raise ConfigError(f"seanet: ratios = {self.ratios!r} must be whole numbers above zero.")
        require_counts(self, ("hop",), name="seanet")
        if self.compress > self.n_filters:
            raise ConfigError(
                f"seanet: compress = {self.compress} must be at most n_filters = {self.n_filters}."
            )

    @property
    def hop(self) -> int:
        """Samples of one latent."""
        return math.prod(self.ratios)


class ResidualBlock(nn.Module):
    """``x + conv(ELU(conv(ELU(x))))`` at half the width."""

    def __init__(self, config: SeanetConfig, width: int, index: int) -> None:
        super().__init__()
        hidden = width // config.compress
        dilation = config.dilation_base**index
        self.block = nn.Sequential(
            nn.ELU(),
            CausalConv(width, hidden, config.residual_kernel_size, dilation=dilation),
            nn.ELU(inplace=True),
            CausalConv(hidden, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back."""
        return x + self.block(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Sound (B, T, channels) to latents (B, T / hop, dimension)."""

    def __init__(self, config: SeanetConfig) -> None:
        super().__init__()
        self.model = nn.Sequential(*_encoder(config))

    def forward(self, x: Tensor) -> Tensor:
        """T must be a multiple of the hop."""
        return self.model(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents (B, T, dimension) to sound (B, T hop, channels)."""

    def __init__(self, config: SeanetConfig) -> None:
        super().__init__()
        self.model = nn.Sequential(*_decoder(config))

    def forward(self, x: Tensor) -> Tensor:
        """Any T."""
        return self.model(x)  # type: ignore[no-any-return]


def _encoder(config: SeanetConfig) -> Iterator[nn.Module]:
    width = config.n_filters
    yield CausalConv(config.channels, width, config.kernel_size)
    for ratio in reversed(config.ratios):
        for index in range(config.n_residual_layers):
            yield ResidualBlock(config, width, index)
        yield nn.ELU(inplace=True)
        yield CausalConv(width, 2 * width, 2 * ratio, stride=ratio)
        width *= 2
    yield nn.ELU(inplace=True)
    yield CausalConv(width, config.dimension, config.last_kernel_size)


def _decoder(config: SeanetConfig) -> Iterator[nn.Module]:
    width = config.n_filters << len(config.ratios)
    yield CausalConv(config.dimension, width, config.kernel_size)
    for ratio in config.ratios:
        yield nn.ELU(inplace=True)
        yield CausalTransposedConv(width, width // 2, ratio)
        width //= 2
        for index in range(config.n_residual_layers):
            yield ResidualBlock(config, width, index)
    yield nn.ELU(inplace=True)
    yield CausalConv(width, config.channels, config.last_kernel_size)
