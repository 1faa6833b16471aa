"""First weights: of a model from scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import extract_weights
from moshi_fl.models.speech.family_config import SpeechConfig
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.model import SpeechModel
from moshi_fl.models.speech.tiny import TINY_MIMI, tiny_codec
from moshi_fl.weights import Weights

MOST_PARAMETERS = 1_000_000_000  # of a model from scratch
SECONDS = 40  # of sound that a fresh codec's codebooks are laid over


def first_weights(config: SpeechConfig, seed: int) -> Weights:
    """Weights of round 0, float32; equal seeds give equal weights on one machine.

    Raises:
        ConfigError: So large a model starts from a checkpoint.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in SpeechModel(config).parameters())
    if size > MOST_PARAMETERS:
        raise ConfigError(
            f"a model of {size / 1e9:.1f} billion parameters is not made from random numbers.",
            hint="moshi-fl import-checkpoint DIR --out FOLDER, then: "
            "moshi-hub init HUB --weights FOLDER",
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = SpeechModel(config)
        if config.mimi == TINY_MIMI:
            model.mimi.load_state_dict(tiny_codec().state_dict())
        else:
            lay_codebooks(model.mimi)
        return extract_weights(model)


@torch.no_grad()
def lay_codebooks(mimi: Mimi) -> None:
    """Put the centroids of a fresh codec where sound lies, so that its codes tell sounds apart.

    It encodes to some purpose from then on; what it decodes is noise until somebody trains it.
    """
    latent = mimi.encode_to_latent(_sounds(mimi), quantize=False).transpose(1, 2)
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        left = torch.nn.functional.linear(latent, part.input_proj.weight[:, :, 0]).flatten(0, 1)
        for codebook in part.codebooks:
            codebook.initialize(left)
            left = left - codebook.decode(codebook.nearest(left))


def _sounds(mimi: Mimi) -> Tensor:
    """Something like speech, (1, channels, samples): syllables of a gliding, buzzing tone."""
    rate = mimi.sample_rate
    t = torch.arange(SECONDS * rate) / rate
    pitch = 110 + 90 * torch.rand(SECONDS * 4).repeat_interleave(rate // 4)
    phase = torch.cumsum(pitch / rate, 0) * 2 * torch.pi
    weights = torch.rand(8, SECONDS * 4).repeat_interleave(rate // 4, 1)
    voice = sum((phase * (n + 1)).sin() * weights[n] / (n + 1) for n in range(8))
    breath = 0.05 * torch.randn(len(t)) * torch.rand(SECONDS * 8).repeat_interleave(rate // 8)
    loud = (2 * torch.pi * 2 * t).sin().clamp_min(0)
    sound: Tensor = 0.2 * loud * voice + breath
    return sound.expand(1, mimi.channels, -1)
