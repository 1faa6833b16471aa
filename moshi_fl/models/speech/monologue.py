"""What a speech model says to somebody who is silent: its text stream, for a look at it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.generate import Sampling, until_stop
from moshi_fl.models.family import SpeechParts
from moshi_fl.models.speech.generate import LMGen
from moshi_fl.models.speech.sampling import Sampling as Choice


def monologue(parts: SpeechParts, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Text, piece by piece; ``max_tokens`` frames of it, most of which hold none.

    Raises:
        ConfigError: A prompt, or a setting that has no meaning here.
    """
    if prompt.strip():
        raise ConfigError(
            "this hub's model listens and speaks; it does not continue a text.",
            hint='moshi-fl generate ""   (what it says to somebody who is silent)',
        )
    _refuse(sampling)
    return until_stop(_pieces(parts, sampling), sampling.stop)


def _refuse(sampling: Sampling) -> None:
    settings = {
        "--min-p": sampling.min_p is not None,
        "--repetition-penalty": sampling.repetition_penalty != 1.0,
        "--int8": sampling.int8,
    }
    for option, given in settings.items():
        if given:
            raise ConfigError(
                f"{option} has no meaning when a speech model says what comes to its mind.",
                hint="leave it out" if option != "--int8" else "leave it out; speak has it",
            )


@torch.inference_mode()
def _pieces(parts: SpeechParts, sampling: Sampling) -> Iterator[str]:
    lm, device = parts.lm, next(parts.lm.parameters()).device
    generator = torch.Generator(device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    choice = Choice(
        temp_text=sampling.temperature,
        use_sampling=sampling.temperature > 0,
        top_k_text=sampling.top_k or Choice.top_k_text,
        top_p=sampling.top_p or 0.0,
    )
    gen = LMGen(lm, choice, generator=generator)
    with gen.streaming(1):
        for heard in _silence(parts, sampling.max_tokens):
            said = gen.step(heard)
            if said is not None and (piece := parts.text.pieces([int(said[0, 0, 0])])):
                yield piece


def _silence(parts: SpeechParts, frames: int) -> Iterator[Tensor]:
    """Codes (1, q, 1) of silence, frame by frame."""
    mimi = parts.mimi
    like = next(mimi.parameters())
    sound = torch.zeros(1, mimi.channels, mimi.frame_size, dtype=like.dtype, device=like.device)
    with mimi.streaming(1):
        for _ in range(frames):
            yield mimi.encode(sound)
