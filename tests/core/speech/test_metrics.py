"""Measures by hand, and against the training loss that they must agree with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moshi_fl.errors import DataError
from moshi_fl.models.speech.lm import LMOutput
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.metrics import (
    FLOOR,
    Summary,
    Tally,
    perplexity,
    si_snr,
    spectral_distance,
)
from tests.support.speeches import codes_of, lm_of, tiny


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_si_snr_is_the_ratio_of_powers() -> None:
    t = torch.arange(24000) / 24000
    target = torch.sin(2 * torch.pi * 440 * t)
    other = torch.cos(2 * torch.pi * 440 * t)  # orthogonal, of equal power
    for ratio, wanted in ((0.1, 20.0), (1.0, 0.0), (10.0, -20.0)):
        for scale in (1.0, -0.3, 7.0):
            found = si_snr(scale * (target + ratio * other), target)
            assert float(found) == pytest.approx(wanted, abs=1e-3)


def test_si_snr_knows_no_loudness_and_no_offset() -> None:
    target, estimate = noise(3, 5000), noise(3, 5000) + 0.5 * noise(3, 5000, seed=1)
    plain = si_snr(estimate, target)
    assert plain.shape == (3,)
    torch.testing.assert_close(si_snr(5 * estimate + 0.7, target - 0.2), plain)


def test_si_snr_at_its_ends() -> None:
    sound = torch.tensor([1.0, -1.0, 2.0, -2.0])
    assert float(si_snr(2 * sound, sound)) == math.inf
    for silent in (torch.zeros(4), torch.full((4,), 0.5)):
        assert float(si_snr(sound, silent)) == -math.inf
        assert float(si_snr(silent, sound)) == -math.inf


def by_hand(x: np.ndarray, y: np.ndarray, scale: int) -> float:
    """The formula of the docstring for one scale."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(scale) / scale)

    def magnitudes(sound: np.ndarray) -> np.ndarray:
        starts = range(0, len(sound) - scale + 1, scale // 4)
        rows = np.stack([sound[s : s + scale] * window for s in starts])
        return np.maximum(np.abs(np.fft.rfft(rows)) * 2 / window.sum(), FLOOR)

    a, b = magnitudes(x), magnitudes(y)
    convergence = np.linalg.norm(a - b) / np.linalg.norm(b)
    return float(convergence + np.abs(np.log(a) - np.log(b)).mean())


def test_the_spectral_distance_is_that_of_the_formula() -> None:
    x, y = noise(4000).double(), noise(4000, seed=1).double()
    for scale in (64, 1024):
        found = spectral_distance(x, y, scales=[scale])
        assert float(found) == pytest.approx(by_hand(x.numpy(), y.numpy(), scale), rel=1e-9)
    both = spectral_distance(x, y, scales=[64, 1024])
    assert float(both) == pytest.approx(
        (by_hand(x.numpy(), y.numpy(), 64) + by_hand(x.numpy(), y.numpy(), 1024)) / 2, rel=1e-9
    )


def test_the_spectral_distance_grows_with_the_noise_and_is_zero_without() -> None:
    target = torch.sin(torch.arange(8000) * 0.1)[None, None]
    found = [
        float(spectral_distance(target + level * noise(1, 1, 8000), target))
        for level in (0.0, 1e-3, 1e-2, 1e-1)
    ]
    assert found[0] == 0
    assert found == sorted(found)
    assert float(spectral_distance(torch.zeros(1, 8000), torch.zeros(1, 8000))) == 0


def test_the_spectral_distance_leads_there() -> None:
    """Silence and a sound that is exactly right must not break the gradients."""
    target = torch.sin(torch.arange(8000) * 0.1)[None]
    for start in (torch.zeros(1, 8000), target.clone(), 0.1 * noise(1, 8000)):
        estimate = start.requires_grad_()
        spectral_distance(estimate, target).backward()
        assert estimate.grad is not None
        assert bool(estimate.grad.isfinite().all())
    step = estimate - 10 * estimate.grad
    assert spectral_distance(step, target) < spectral_distance(estimate, target)


def test_sounds_that_cannot_be_compared() -> None:
    for measure in (si_snr, spectral_distance):
        with pytest.raises(DataError, match=r"\[1, 5000\] is compared with \[1, 4000\]"):
            measure(noise(1, 5000), noise(1, 4000))
    with pytest.raises(DataError, match="1000 samples; 2048 at least"):
        spectral_distance(noise(1, 1000), noise(1, 1000))


def tallied(*batches: tuple[LMOutput, Tensor]) -> Summary:
    tally = Tally(tiny())
    for output, codes in batches:
        tally.add(output, codes)
    return tally.summary()


def test_the_summary_agrees_with_the_loss() -> None:
    model, codes = lm_of(tiny()), codes_of(tiny())
    codes[1, :, 20:] = -1
    with torch.no_grad():
        output = model(codes)
    found = tallied((output, codes))
    plain = losses(output, codes, tiny(), text_padding_weight=1.0)
    assert found.text == pytest.approx(float(plain.text), rel=1e-5)
    counts = output.mask.sum((0, 2)).tolist()
    mean = np.average(found.audio, weights=counts)
    assert mean == pytest.approx(float(plain.audio), rel=1e-5)
    words_only = losses(output, codes, tiny(), text_padding_weight=0.0)
    assert found.words == pytest.approx(float(words_only.text), rel=1e-5)
    assert found.text_perplexity == pytest.approx(math.exp(float(plain.text)), rel=1e-5)
    assert found.audio_mean == pytest.approx(sum(found.audio) / 2)


def test_batches_of_any_size_give_what_one_gives() -> None:
    model, codes = lm_of(tiny()), codes_of(tiny(), batch=5)
    whole = tallied((model(codes), codes))
    parts = tallied(*((model(part), part) for part in (codes[:1], codes[1:])))
    assert parts.text == pytest.approx(whole.text, rel=1e-6)
    assert parts.words == pytest.approx(whole.words, rel=1e-6)
    assert parts.audio == pytest.approx(whole.audio, rel=1e-6)


def test_who_knows_nothing_is_as_perplexed_as_there_are_tokens() -> None:
    """The reference's evaluation takes 2 to the power of nats; that is not a perplexity."""
    codes, config = codes_of(tiny()), tiny()
    model = lm_of(config)
    with torch.no_grad():
        for head in (model.text_linear, *model.linears):
            head.weight.zero_()
    found = tallied((model(codes), codes))
    assert found.text_perplexity == pytest.approx(config.text_card, rel=1e-5)
    assert found.word_perplexity == pytest.approx(config.text_card, rel=1e-5)
    assert [perplexity(nats) for nats in found.audio] == pytest.approx([config.card] * 2, rel=1e-5)


def test_what_was_never_there_has_no_figure() -> None:
    codes = codes_of(tiny())
    codes[:, 0] = 3  # padding alone
    found = tallied((lm_of(tiny())(codes), codes))
    assert math.isnan(found.words)
    assert math.isnan(found.word_perplexity)
    assert math.isfinite(found.text)
    assert perplexity(1e4) == math.inf
