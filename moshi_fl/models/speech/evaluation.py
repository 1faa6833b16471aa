"""A speech model on dialogues that it has not seen: all figures at once, and charts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moshi_fl.errors import DataError
from moshi_fl.models.common import device_of
from moshi_fl.models.speech.audio import audio_blocks
from moshi_fl.models.speech.data import Codes
from moshi_fl.models.speech.dialogues import Dialogue
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.metrics import SCALES, Summary, Tally, si_snr, spectral_distance
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.plot import Chart, Line

PIECE_SECONDS = 4  # of sound that are compared at once
SILENT = 1e-3  # root mean square; what is softer has no signal to compare with noise


@dataclass(frozen=True)
class Fidelity:
    """How near a codec's sound comes, on average over pieces of up to four seconds with sound.

    Attributes:
        si_snr: In dB; more is better.
        distance: Spectral; less is better.
        pieces: How many were compared.
    """

    si_snr: float
    distance: float
    pieces: int


@torch.no_grad()
def fidelity(mimi: Mimi, dialogues: Sequence[Dialogue]) -> Fidelity:
    """Each channel through the codec and back, in pieces that stand alone.

    Raises:
        DataError: There is nothing but silence.
    """
    found = [_fidelity(mimi, piece) for dialogue in dialogues for piece in _loud(mimi, dialogue)]
    if not found:
        raise DataError("there is no sound to measure a codec on: it is silent, or too short.")
    ratio, distance = np.mean(found, axis=0)
    return Fidelity(float(ratio), float(distance), len(found))


@torch.no_grad()
def summarize(lm: LMModel, windows: Sequence[Codes], *, batch_size: int = 8) -> Summary:
    """Cross-entropy of a language model on segments (rows, frames) of one length.

    Raises:
        DataError: Codes that the model does not have.
    """
    tally, device = Tally(lm.config), device_of(lm)
    for start in range(0, len(windows), batch_size):
        codes = torch.from_numpy(np.stack(windows[start : start + batch_size]))
        codes = codes.to(device, torch.int64)
        tally.add(lm(codes), codes)
    return tally.summary()


def codebook_chart(summaries: Mapping[str, Summary]) -> Chart:
    """Cross-entropy by codebook of one model or two, such as before and after training."""
    lines = [
        Line(name, list(enumerate(summary.audio, start=1))) for name, summary in summaries.items()
    ]
    told = ", ".join(
        f"{name}: text perplexity {summary.text_perplexity:.3g}"
        for name, summary in summaries.items()
    )
    said = " and ".join(
        f"{name} from {summary.audio[0]:.3g} to {summary.audio[-1]:.3g}"
        for name, summary in summaries.items()
    )
    return Chart(
        title="Cross-entropy by codebook, in nats",
        subtitle=told,
        description=f"Nats per token from the first codebook to the last: {said}.",
        x="codebook",
        y="",
        lines=lines,
    )


def _loud(mimi: Mimi, dialogue: Dialogue) -> Iterator[Tensor]:
    """Pieces of single channels, (1, 1, T), that are not silent."""
    size = PIECE_SECONDS * mimi.sample_rate
    for block in audio_blocks(dialogue.path, sample_rate=mimi.sample_rate, channels=2, block=size):
        for channel in block if block.shape[1] >= max(SCALES) else ():
            if np.sqrt(np.square(channel, dtype=np.float64).mean()) > SILENT:
                yield torch.from_numpy(channel)[None, None]


def _fidelity(mimi: Mimi, sound: Tensor) -> tuple[float, float]:
    sound = sound.to(device_of(mimi))
    back = mimi.decode(mimi.encode(sound))[..., : sound.shape[-1]]
    return float(si_snr(back, sound)), float(spectral_distance(back, sound))
