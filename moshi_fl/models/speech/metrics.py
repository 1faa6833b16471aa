"""How good a speech model is: its cross-entropy by codebook, and how near a codec's sound comes.

All figures are means over what was really there: padding with -1 counts nowhere. Perplexity is the
exponential of a mean in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_fl.errors import DataError
from moshi_fl.models.speech.lm import LMOutput
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.loss import cross_entropy

SCALES = (64, 128, 256, 512, 1024, 2048)  # samples of a window
FLOOR = 1e-4  # of a magnitude, before its logarithm: 80 dB below a sine at full scale


@dataclass(frozen=True)
class Summary:
    """Cross-entropy in nats per token; nan where there was no token.

    Attributes:
        text: Over all text tokens, padding among them.
        words: Over those that are part of a word.
        audio: Of each codebook that is predicted, the semantic one first.
    """

    text: float
    words: float
    audio: tuple[float, ...]

    @property
    def text_perplexity(self) -> float:
        """``exp`` of the nats of a text token."""
        return perplexity(self.text)

    @property
    def word_perplexity(self) -> float:
        """``exp`` of the nats of a token of a word."""
        return perplexity(self.words)

    @property
    def audio_mean(self) -> float:
        """Of all codebooks alike."""
        return sum(self.audio) / len(self.audio)


def perplexity(nats: float) -> float:
    """``exp`` of a mean in nats; infinite where that is too large for a number."""
    return math.inf if nats > 700 else math.exp(nats)


class Tally:
    """Cross-entropy of many batches; sums are kept, so their sizes may differ."""

    def __init__(self, config: LMConfig) -> None:
        self._config = config
        self._nats = torch.zeros(2 + config.dep_q, dtype=torch.float64)  # text, words, codebooks
        self._tokens = torch.zeros(2 + config.dep_q, dtype=torch.float64)

    @torch.no_grad()
    def add(self, output: LMOutput, codes: Tensor) -> None:
        """Count ``output`` for the ``codes`` (B, n_q + 1, T) that it was made from."""
        config = self._config
        text, audio = codes[:, :1], codes[:, 1 : 1 + config.dep_q]
        padding = [config.existing_text_padding_id, config.existing_text_end_padding_id]
        is_padding = torch.isin(text, torch.tensor(padding, device=text.device))
        nats = cross_entropy(output.text_logits, text)
        self._count(slice(0, 1), nats, output.text_mask)
        self._count(slice(1, 2), nats, output.text_mask & ~is_padding)
        self._count(slice(2, None), cross_entropy(output.logits, audio), output.mask)

    def summary(self) -> Summary:
        """Means over all that was counted."""
        text, words, *audio = (self._nats / self._tokens).tolist()  # 0 / 0 is nan
        return Summary(text, words, tuple(audio))

    def _count(self, rows: slice, nats: Tensor, mask: Tensor) -> None:
        """Add up (B, K, T) where ``mask`` holds, for each of the K codebooks."""
        found = torch.where(mask, nats, 0).double().sum(dim=(0, 2))
        self._nats[rows] += found.cpu()
        self._tokens[rows] += mask.sum(dim=(0, 2)).cpu()


def si_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio in dB of sound (..., T), (...); more is better.

    ``10 log10(|s|^2 / |e - s|^2)``, where e and the target have no mean, and s is the part of e
    along the target (Le Roux et al. 2019). It is -inf where either is silent.

    Raises:
        DataError: The two differ in shape.
    """
    _check(estimate, target)
    e = estimate.double() - estimate.double().mean(-1, keepdim=True)
    t = target.double() - target.double().mean(-1, keepdim=True)
    power = t.square().sum(-1, keepdim=True)
    s = torch.where(power > 0, (e * t).sum(-1, keepdim=True) / power, 0) * t
    signal, noise = s.square().sum(-1), (e - s).square().sum(-1)
    return 10 * torch.log10(torch.where(signal > 0, signal / noise, 0))


def spectral_distance(
    estimate: Tensor, target: Tensor, *, scales: Sequence[int] = SCALES
) -> Tensor:
    """How far the spectrograms of two sounds (..., T) are apart, a scalar; 0 where they are equal.

    The mean over ``scales`` of ``|X - Y|_F / |Y|_F + mean |log X - log Y|``, where X and Y are
    magnitudes under Hann windows of so many samples, a quarter apart (Yamamoto et al. 2020,
    "Parallel WaveGAN", equations 4 to 6). That of a sine at full scale is 1, and the least is
    1e-4, so that what nobody hears counts for nothing. Norms are over all sounds together. Has
    gradients: a codec can be trained with it.

    Raises:
        DataError: The two differ in shape, or are shorter than the longest window.
    """
    _check(estimate, target)
    if target.shape[-1] < max(scales):
        raise DataError(
            f"sound of {target.shape[-1]} samples; {max(scales)} at least are compared."
        )
    terms = []
    for scale in scales:
        x, y = _magnitudes(estimate, scale), _magnitudes(target, scale)
        convergence = (x - y).norm() / y.norm()
        terms.append(convergence + (x.log() - y.log()).abs().mean())
    return torch.stack(terms).mean()


def _magnitudes(sound: Tensor, scale: int) -> Tensor:
    """(B, frequencies, windows), at least ``FLOOR``."""
    window = torch.hann_window(scale, dtype=sound.dtype, device=sound.device)
    hop = scale // 4
    rows = sound.reshape(-1, sound.shape[-1])
    spectrum = torch.stft(rows, scale, hop, window=window, center=False, return_complex=True)
    power = (spectrum.real.square() + spectrum.imag.square()) * (2 / window.sum()) ** 2
    return power.clamp_min(FLOOR**2).sqrt()


def _check(estimate: Tensor, target: Tensor) -> None:
    if estimate.shape != target.shape:
        raise DataError(
            f"sound of shape {list(estimate.shape)} is compared with {list(target.shape)}."
        )
