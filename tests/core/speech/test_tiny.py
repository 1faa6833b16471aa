"""The small codec that comes along: what it gives back is nearer to speech than chance is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moshi_fl.models.speech import tiny
from moshi_fl.models.speech.audio import read_audio
from moshi_fl.models.speech.metrics import si_snr, spectral_distance
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.tiny import TINY_MIMI, tiny_codec
from tests.support.espeak import write_dialogues

FOLDER = Path(tiny.__file__).parent


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Seconds of speech (N, 1, 24000), at a speed and a pitch that it was not trained on."""
    (path,) = write_dialogues(tmp_path_factory.mktemp("spoken"), client=13, count=1, length=8)
    left = torch.from_numpy(read_audio(path)[0])
    rows = left[: len(left) // 24000 * 24000].view(-1, 1, 24000)
    return rows[rows.square().mean((1, 2)).sqrt() > 0.02]


def test_speech_comes_back_nearer_than_from_other_codes_or_an_untrained_codec(
    speech: Tensor,
) -> None:
    codec = tiny_codec()
    torch.manual_seed(0)
    with torch.no_grad():
        codes = codec.encode(speech)
        found = codec.decode(codes)[..., :24000]
        others = codec.decode(codes.roll(1, 0))[..., :24000]
        untrained = Mimi(TINY_MIMI)
        noise = untrained.decode(untrained.encode(speech))[..., :24000]
    distance = float(spectral_distance(found, speech))
    assert distance < 0.8 * float(spectral_distance(others, speech))
    assert distance < 0.5 * float(spectral_distance(noise, speech))
    assert float(si_snr(found, speech).mean()) > float(si_snr(others, speech).mean()) + 10


def test_the_codes_are_many_and_fewer_codebooks_will_do(speech: Tensor) -> None:
    codec = tiny_codec()
    codes = codec.encode(speech)
    assert codes.shape[1:] == (4, 13)
    for level in codes.unbind(1):
        assert len(level.unique()) > 30
    with torch.no_grad():
        two, four = (codec.decode(codes[:, :count])[..., :24000] for count in (2, 4))
    assert spectral_distance(four, speech) < spectral_distance(two, speech) < 3


def test_what_comes_along_is_small() -> None:
    assert (FOLDER / "tiny_codec.safetensors").stat().st_size < 400_000
    assert (FOLDER / "tiny_text.model").stat().st_size < 10_000
