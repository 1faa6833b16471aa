"""Mimi, the codec of Moshi: 24 kHz sound to 12.5 frames a second of 8 to 32 codes, and back.

SEANet makes 25 latents a second of the sound, a transformer looks over 10 s of them, a learnt
stride of two halves their rate, and a split residual quantiser names each by codes (Défossez et
al. 2024). Decoding is the same the other way. All parts are causal, so that a stream of frames
gives what the whole would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.conv import CausalConv, CausalTransposedConv
from moshi_fl.models.speech.mimi_config import MimiConfig
from moshi_fl.models.speech.quantizer import SplitQuantizer
from moshi_fl.models.speech.seanet import Decoder, Encoder
from moshi_fl.models.speech.streaming import StreamingModule
from moshi_fl.models.speech.transformer import StreamingTransformer, TransformerConfig

PIECE = 125  # frames of long sound that are worked on at once


@dataclass(frozen=True)
class Reconstruction:
    """What a training step sees.

    Attributes:
        sound: (B, channels, T frame_size).
        codes: (B, levels, T).
        latent: Before quantisation, (B, C, T).
        penalty: Of the quantiser.
    """

    sound: Tensor
    codes: Tensor
    latent: Tensor
    penalty: Tensor


class _Resample(nn.Module):
    """A convolution one name deeper, as in Kyutai's checkpoints."""

    def __init__(self, name: str, conv: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)  # type: ignore[no-any-return]


class _Projected(nn.Module):
    """A transformer between projections where widths differ."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.transformer = StreamingTransformer(config)
        if config.d_model == width:
            self.input_proj: nn.Module = nn.Identity()
            self.output_projs = nn.ModuleList([nn.Identity()])
        else:
            self.input_proj = nn.Linear(width, config.d_model, bias=False)
            self.output_projs = nn.ModuleList([nn.Linear(config.d_model, width, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.output_projs[0](self.transformer(self.input_proj(x)))  # type: ignore[no-any-return]


class Mimi(StreamingModule):
    """The codec. Sound is (B, channels, samples), codes are (B, levels, frames)."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config = config
        width, stride = config.seanet.dimension, config.stride
        self.encoder = Encoder(config.seanet)
        self.encoder_transformer = _Projected(config.transformer, width)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        if stride > 1:
            down = CausalConv(width, width, 2 * stride, stride=stride, bias=False, replicate=True)
            up = CausalTransposedConv(width, width, stride, bias=False, depthwise=True)
            self.downsample = _Resample("conv", down)
            self.upsample = _Resample("convtr", up)
        self.quantizer = SplitQuantizer(config.quantizer, width)
        self.decoder_transformer = _Projected(config.transformer, width)
        self.decoder = Decoder(config.seanet)
        self.num_codebooks = config.quantizer.n_q

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.config.frame_rate

    @property
    def frame_size(self) -> int:
        """Samples in a frame."""
        return self.config.frame_size

    @property
    def channels(self) -> int:
        """Channels of the sound."""
        return self.config.seanet.channels

    @property
    def total_codebooks(self) -> int:
        """Levels that there are; ``num_codebooks`` of them are in use."""
        return self.config.quantizer.n_q

    @property
    def cardinality(self) -> int:
        """Codes of a level."""
        return self.config.quantizer.bins

    def set_num_codebooks(self, count: int) -> None:
        """How many levels ``encode`` gives; Moshi uses 8.

        Raises:
            ConfigError: There are not that many.
        """
        if not 1 <= count <= self.total_codebooks:
            raise ConfigError(f"{count} codebooks asked of Mimi; it has {self.total_codebooks}.")
        self.num_codebooks = count

    @torch.no_grad()
    def encode(self, sound: Tensor, sample_rate: int | None = None) -> Tensor:
        """Codes (B, num_codebooks, frames) of sound (B, channels, samples).

        Outside a stream, zeros fill the last frame up, and long sound goes through a stream of its
        own, so that memory does not grow with it.

        Args:
            sound: Samples from -1 to 1.
            sample_rate: Of the sound, to be checked; in Hz.

        Raises:
            DataError: Another rate or number of channels, no samples, samples that are not finite,
                or, in a stream, not a whole number of frames.
        """
        if self._in_pieces and sound.shape[-1] > PIECE * self.frame_size:
            sound = self._whole_frames(sound, sample_rate)
            with self.streaming(len(sound)):
                pieces = torch.split(sound, PIECE * self.frame_size, dim=-1)
                return torch.cat([self.encode(piece) for piece in pieces], dim=-1)
        latent = self._latents(sound, sample_rate)
        return self.quantizer.encode(latent, self.num_codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """Sound (B, channels, frames frame_size) of codes (B, levels, frames).

        Outside a stream and without gradients, long codes go through a stream of their own.

        Raises:
            DataError: Codes out of range, none, or more levels than there are.
        """
        self._check_codes(codes)
        if self._in_pieces and not torch.is_grad_enabled() and codes.shape[-1] > PIECE:
            with self.streaming(len(codes)):
                pieces = torch.split(codes, PIECE, dim=-1)
                return torch.cat([self.decode(piece) for piece in pieces], dim=-1)
        return self._sound(self.quantizer.decode(codes))

    def encode_to_latent(self, sound: Tensor, *, quantize: bool = True) -> Tensor:
        """Latents (B, C, frames) of sound, as the quantiser gives them back or before it."""
        latent = self._latents(sound, None)
        if quantize:
            latent = self.quantizer.decode(self.quantizer.encode(latent, self.num_codebooks))
        return latent.transpose(1, 2)

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Latents (B, C, frames) of codes (B, levels, frames)."""
        self._check_codes(codes)
        return self.quantizer.decode(codes).transpose(1, 2)

    def decode_from_latent(self, latent: Tensor) -> Tensor:
        """Sound (B, channels, frames frame_size) of latents (B, C, frames)."""
        return self._sound(latent.transpose(1, 2))

    def forward(self, sound: Tensor) -> Reconstruction:
        """Sound there and back, for training; codebooks learn, gradients pass the quantiser."""
        latent = self._latents(sound, None)
        quantized = self.quantizer(latent, self.num_codebooks)
        return Reconstruction(
            self._sound(quantized.latent),
            quantized.codes,
            latent.transpose(1, 2),
            quantized.penalty,
        )

    @property
    def _in_pieces(self) -> bool:
        """Whether what is long goes through a stream: not if that would have to keep all of it."""
        ends = (self.encoder_transformer.transformer, self.decoder_transformer.transformer)
        return not self.is_streaming and all(end.context is not None for end in ends)

    def _latents(self, sound: Tensor, sample_rate: int | None) -> Tensor:
        """(B, frames, C), before quantisation."""
        x = self._whole_frames(sound, sample_rate).transpose(1, 2)  # (B, samples, channels)
        return self.downsample(self.encoder_transformer(self.encoder(x)))  # type: ignore[no-any-return]

    def _whole_frames(self, sound: Tensor, sample_rate: int | None) -> Tensor:
        """The sound, checked; outside a stream, zeros fill the last frame up."""
        self._check_sound(sound, sample_rate)
        missing = -sound.shape[-1] % self.frame_size
        if missing and self.is_streaming:
            raise DataError(
                f"a stream of Mimi was fed {sound.shape[-1]} samples; "
                f"it takes whole frames of {self.frame_size}."
            )
        return F.pad(sound, (0, missing)) if missing else sound

    def _sound(self, latent: Tensor) -> Tensor:
        """Sound of latents (B, frames, C)."""
        self.check_batch(latent)
        x = self.decoder(self.decoder_transformer(self.upsample(latent)))
        return x.transpose(1, 2)  # type: ignore[no-any-return]

    def _check_sound(self, sound: Tensor, sample_rate: int | None) -> None:
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise DataError(
                f"sound at {sample_rate} Hz; Mimi takes {self.sample_rate} Hz.",
                hint="resample it first",
            )
        if sound.dim() != 3 or sound.shape[1] != self.channels:
            raise DataError(
                f"sound of shape {list(sound.shape)}; Mimi takes [batch, {self.channels}, samples]."
            )
        if not sound.numel():
            raise DataError("sound without samples.")
        if not sound.is_floating_point():
            raise DataError(f"sound in {sound.dtype}; Mimi takes floating point from -1 to 1.")
        self.check_batch(sound)
        partly = self._state is not None and not self._state.all_active
        if not partly and not _capturing(sound) and not bool(sound.isfinite().all()):
            raise DataError("sound with samples that are not finite.")

    def _check_codes(self, codes: Tensor) -> None:
        whole = codes.dtype in {torch.int64, torch.int32}
        if codes.dim() != 3 or not whole or not codes.numel():
            raise DataError(
                f"codes of shape {list(codes.shape)} in {codes.dtype}; "
                "Mimi takes whole numbers (int64) [batch, levels, frames]."
            )
        if codes.shape[1] > self.total_codebooks:
            raise DataError(f"codes of {codes.shape[1]} levels; Mimi has {self.total_codebooks}.")
        self.check_batch(codes)
        if _capturing(codes):
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= self.cardinality:
            wrong = low if low < 0 else high
            raise DataError(f"code {wrong} is out of range: Mimi has 0 to {self.cardinality - 1}.")


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which values cannot be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
