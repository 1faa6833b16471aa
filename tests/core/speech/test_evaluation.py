"""A small model on spoken dialogues: figures that training moves, and a chart of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_fl.errors import DataError
from moshi_fl.models.speech.audio import write_audio
from moshi_fl.models.speech.data import Codes, encode_dialogue, segments
from moshi_fl.models.speech.dialogues import Dialogue, find_dialogues
from moshi_fl.models.speech.evaluation import codebook_chart, fidelity, summarize
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.metrics import si_snr, spectral_distance
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.models.speech.tiny import TEXT_CARD, tiny_text
from tests.support.espeak import write_dialogues
from tests.support.mimis import small_mimi
from tests.support.speeches import lm_of, tiny


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dialogue, ...]:
    folder = tmp_path_factory.mktemp("spoken")
    write_dialogues(folder, client=0, count=2)
    return find_dialogues([folder], seed=0).dialogues


@pytest.fixture(scope="module")
def windows(spoken: tuple[Dialogue, ...]) -> list[Codes]:
    mimi, text = small_mimi(), TextStream(tiny_text())
    mimi.set_num_codebooks(2)
    return [w for d in spoken for w in segments(encode_dialogue(d, mimi, text), 25)]


def model() -> LMModel:
    config = tiny(n_q=4, dep_q=2, delays=(0, 0, 1, 0, 1), card=64, text_card=TEXT_CARD, context=50)
    return lm_of(config)


def test_training_lowers_every_figure(windows: list[Codes]) -> None:
    lm = model()
    before = summarize(lm, windows)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    codes = torch.from_numpy(np.stack(windows)).long()
    for _ in range(20):
        optimizer.zero_grad()
        losses(lm(codes), codes, lm.config).total.backward()
        optimizer.step()
    after = summarize(lm, windows)
    assert after.text_perplexity < 0.5 * before.text_perplexity
    assert after.word_perplexity < 0.5 * before.word_perplexity
    assert all(new < old - 0.3 for new, old in zip(after.audio, before.audio, strict=True))
    one_by_one = summarize(lm, windows, batch_size=1)
    assert one_by_one.audio == pytest.approx(after.audio, rel=1e-5)
    svg = codebook_chart({"before": before, "after": after}).svg()
    for name, summary in (("before", before), ("after", after)):
        for number, nats in enumerate(summary.audio, 1):
            assert f"{name}, codebook {number}: {nats:.4f}" in svg
    assert f"before from {before.audio[0]:.3g} to {before.audio[1]:.3g}" in svg


def test_fidelity_is_the_mean_over_pieces_with_sound(tmp_path: Path) -> None:
    rate, random = 24000, np.random.default_rng(0)
    sound = np.zeros((2, 5 * rate + 100), np.float32)
    sound[0, : 4 * rate] = 0.1 * random.standard_normal(4 * rate)
    sound[1, 4 * rate : 5 * rate] = 0.1 * random.standard_normal(rate)
    write_audio(tmp_path / "x.wav", sound)
    dialogue = Dialogue(tmp_path / "x.wav", sound.shape[1] / rate, ())
    mimi = small_mimi()
    found = fidelity(mimi, [dialogue])
    assert found.pieces == 2
    pieces = [sound[0, : 4 * rate], sound[1, 4 * rate :]]
    figures = []
    with torch.no_grad():
        for piece in pieces:
            rounded = torch.from_numpy(np.round(piece * 32767) / 32768)[None, None]
            back = mimi.decode(mimi.encode(rounded))[..., : len(piece)]
            figures.append((float(si_snr(back, rounded)), float(spectral_distance(back, rounded))))
    assert (found.si_snr, found.distance) == pytest.approx(np.mean(figures, axis=0), rel=1e-3)


def test_a_codec_is_not_measured_on_silence(tmp_path: Path) -> None:
    write_audio(tmp_path / "x.wav", np.zeros((2, 24000), np.float32))
    with pytest.raises(DataError, match="no sound to measure a codec on"):
        fidelity(small_mimi(), [Dialogue(tmp_path / "x.wav", 1.0, ())])
