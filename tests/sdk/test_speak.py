"""``moshi-fl speak``: a file is heard, a reply is written, and nothing is left half done."""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_fl.errors import DataError
from moshi_fl.models.speech.audio import audio_writer, read_audio, write_audio
from moshi_fl.models.speech.duplex import DuplexSession
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.sampling import Sampling
from moshi_fl.text import clean
from moshi_hub.cli import main as hub_main
from moshi_hub.samples import sampler
from moshi_sdk.cli import main as fl_main
from moshi_sdk.speak import converse, require_files
from moshi_sdk.sync import SyncManager
from tests.support.espeak import write_dialogues
from tests.support.mimis import small_mimi
from tests.support.releases import write_release
from tests.support.simulator import HubSimulator
from tests.support.speeches import Spelling, lm_of, tiny

FRAME, RATE = 1920, 24_000


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # frames are small: a second thread is waited for, not used


@pytest.fixture(scope="module")
def model() -> LMModel:
    return lm_of(tiny(card=64))


@pytest.fixture
def session(model: LMModel) -> Iterator[DuplexSession]:
    greedy = Sampling(use_sampling=False)
    with DuplexSession(small_mimi(), model, Spelling(), sampling=greedy) as opened:
        yield opened


def voice(seconds: float, rate: int = RATE) -> np.ndarray:
    """A chord that swells: nothing is above 1 kHz."""
    time = np.arange(round(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in (220, 330, 880))
    return (chord * time / seconds / 6).astype(np.float32)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_reply_is_what_a_session_says_to_the_same_frames(
    session: DuplexSession, tmp_path: Path
) -> None:
    source, out = tmp_path / "user.wav", tmp_path / "reply.flac"
    write_audio(source, voice(1.0))
    text = list(converse(session, source, out, seconds=0.2))
    found = read_audio(out)
    frames = [
        torch.from_numpy(part)
        for part in np.split(read_audio(source)[0], range(FRAME, RATE, FRAME))
    ]
    frames[-1] = torch.nn.functional.pad(frames[-1], (0, FRAME - len(frames[-1])))
    frames += [torch.zeros(FRAME)] * 3  # 0.2 s begin three frames
    session.reset()
    replies = [session.push(frame) for frame in frames]
    wanted = torch.cat([reply.sound for reply in replies], dim=1).numpy()
    assert found.shape == (1, 16 * FRAME)
    np.testing.assert_allclose(found, wanted.clip(-1, 1), atol=2 / 32768)
    assert text == [reply.text[0] for reply in replies if reply.text[0]]
    assert text


def test_a_voice_at_another_rate_is_resampled_and_both_are_written(
    session: DuplexSession, tmp_path: Path
) -> None:
    source, out = tmp_path / "user.wav", tmp_path / "both.wav"
    write_audio(source, voice(0.8, rate=16_000), sample_rate=16_000)
    list(converse(session, source, out, stereo=True))
    left, right = read_audio(out, channels=2)
    assert left.std() > 0
    inner = slice(FRAME, 9 * FRAME)
    np.testing.assert_allclose(right[inner], voice(0.8)[inner], atol=1e-3)
    assert len(right) == 10 * FRAME


def test_of_two_channels_the_mean_is_heard(session: DuplexSession, tmp_path: Path) -> None:
    source, out = tmp_path / "user.wav", tmp_path / "both.wav"
    write_audio(source, np.stack([voice(0.4), np.zeros_like(voice(0.4))]))
    list(converse(session, source, out, stereo=True))
    np.testing.assert_allclose(read_audio(out)[1], voice(0.4) / 2, atol=1e-3)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("no more")])
def test_an_interrupted_conversation_leaves_no_half_file(
    session: DuplexSession, tmp_path: Path, error: BaseException
) -> None:
    source, out = tmp_path / "user.wav", tmp_path / "reply.wav"
    write_audio(source, voice(2.0))
    talking = converse(session, source, out)
    next(talking)
    assert len(files_in(tmp_path)) == 2  # something is being written
    with pytest.raises(type(error)):
        talking.throw(error)  # type: ignore[attr-defined]
    assert files_in(tmp_path) == ["user.wav"]


def test_ten_hours_are_read_as_they_are_needed(session: DuplexSession, tmp_path: Path) -> None:
    source = tmp_path / "long.wav"
    with wave.open(str(source), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes([128, 140, 116]) * 8000)
    seconds = 36_000
    with source.open("r+b") as raw:  # a hole in the file: silence's own byte does not matter
        header = bytearray(raw.read(44))
        header[4:8] = (36 + seconds * 8000).to_bytes(4, "little")
        header[40:44] = (seconds * 8000).to_bytes(4, "little")
        raw.seek(0)
        raw.write(header)
        raw.truncate(44 + seconds * 8000)
    require_files(source, tmp_path / "reply.wav")
    talking = converse(session, source, tmp_path / "reply.wav")
    list(itertools.islice(talking, 5))
    tracemalloc.start()
    list(itertools.islice(talking, 40))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    talking.close()  # type: ignore[attr-defined]
    assert most < 4e6  # ten hours of samples are 3.5 GB


def test_pieces_make_the_same_file_as_the_whole(tmp_path: Path) -> None:
    sound = np.stack([voice(0.5), -voice(0.5)])
    write_audio(tmp_path / "whole.wav", sound)
    with audio_writer(tmp_path / "pieces.wav", channels=2) as write:
        for piece in np.split(sound, range(700, sound.shape[1], 700), axis=1):
            write(piece)
    assert (tmp_path / "whole.wav").read_bytes() == (tmp_path / "pieces.wav").read_bytes()


def test_files_that_cannot_be_used_are_named_before_any_work(tmp_path: Path) -> None:
    mono = tmp_path / "mono.wav"
    write_audio(mono, voice(0.1))
    text = tmp_path / "notes.wav"
    text.write_text("no sound at all")
    for source, out, message in (
        (text, tmp_path / "a.wav", "not sound that can be read"),
        (mono, tmp_path / "a.mp3", "end in .wav or .flac"),
        (mono, mono, "is there already"),
    ):
        with pytest.raises(DataError, match=message):
            require_files(source, out)


def test_a_place_where_no_file_can_be_is_one_error(session: DuplexSession, tmp_path: Path) -> None:
    source = tmp_path / "user.wav"
    write_audio(source, voice(0.1))
    with pytest.raises(DataError, match="cannot be made"):
        list(converse(session, source, source / "reply.wav"))


@pytest.fixture(scope="module")
def speaking_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub of the preset ``tiny``, at round 0: it babbles."""
    folder = tmp_path_factory.mktemp("speaking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSHI_FL_HOME", str(folder / "home"))
        words = ["init", str(folder / "hub.git"), "--family", "speech", "--preset", "tiny"]
        assert hub_main(words) == 0
    return folder / "hub.git"


def test_a_hubs_model_answers_on_a_machine_that_never_saw_it(
    speaking_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "user.wav", tmp_path / "reply.wav"
    (dialogue,) = write_dialogues(tmp_path / "spoken", client=1, count=1, length=2)
    said = read_audio(dialogue, sample_rate=16_000)[1]  # what the right one says
    write_audio(source, said, sample_rate=16_000)
    heard = -(-len(said) * 3 // 2 // FRAME)  # whole frames of it
    words = ["speak", "--hub", str(speaking_hub), "--in", str(source), "--seed", "3"]
    assert fl_main([*words, "--out", str(out), "--seconds", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["round"] == 0
    assert facts["text"].strip()
    assert facts["frames"] == heard + 13  # those of a second begin
    assert 0 < facts["median_ms"] <= facts["p95_ms"] <= facts["worst_ms"]
    assert facts["real_time_factor"] > 0
    assert facts["keeps_up"] == (facts["real_time_factor"] <= 1)
    assert facts["frame_ms"] == 80
    reply = read_audio(out, channels=1)
    assert reply.shape == (1, (heard + 13) * FRAME)
    assert reply.std() > 0
    again = tmp_path / "again.wav"
    assert fl_main([*words, "--out", str(again), "--seconds", "1", "--offline"]) == 0
    captured = capsys.readouterr()
    assert again.read_bytes() == out.read_bytes()
    assert captured.out.startswith(clean(facts["text"], keep="\n\t"))
    assert "real time factor" in captured.out
    assert not re.search(r"\d\.\d{3}", captured.out)  # no digits that say nothing
    other = tmp_path / "eight.flac"
    assert fl_main([*words, "--out", str(other), "--int8", "--stereo", "--top-k", "0"]) == 0
    assert read_audio(other, channels=2).shape == (2, heard * FRAME)


def test_a_rounds_samples_are_what_it_says_by_itself(speaking_hub: Path, tmp_path: Path) -> None:
    snapshot = SyncManager(str(speaking_hub), home=tmp_path / "home").pull()
    model = snapshot.load(), snapshot.state.tokenizer
    found = sampler()(snapshot.state.config, model, model)
    assert not found.note
    assert [sample.prompt for sample in found.entries] == [""]
    assert found.entries[0].before == found.entries[0].after


def test_differential_privacy_is_refused_before_anything_is_read(
    speaking_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["contribute", "--hub", str(speaking_hub), "--data", str(tmp_path / "none"), "--dp"]
    assert fl_main(words) != 0
    assert "speech cannot be trained with differential privacy" in capsys.readouterr().err


def test_an_imported_release_speaks_without_a_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, folder = write_release(tmp_path / "release"), tmp_path / "imported"
    assert fl_main(["import-checkpoint", str(release), "--out", str(folder)]) == 0
    source, out = tmp_path / "user.wav", tmp_path / "reply.wav"
    write_audio(source, voice(0.5))
    capsys.readouterr()
    words = ["speak", "--weights", str(folder), "--in", str(source), "--out", str(out)]
    assert fl_main([*words, "--temperature", "0", "--text-temperature", "0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["round"] is None
    assert read_audio(out).shape == (1, facts["frames"] * FRAME)
    assert fl_main([*words, "--hub", "somewhere"]) == 2
    assert fl_main(words) == 1
    assert "is there already" in capsys.readouterr().err


def test_the_guides_programs_converse_with_an_imported_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, one after the other; what was fused is told of there, too."""
    release = write_release(tmp_path / "release")
    assert fl_main(["import-checkpoint", str(release), "--out", str(tmp_path / "moshiko")]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    guide = (Path(__file__).parents[2] / "sdk" / "README.md").read_text(encoding="utf-8")
    section = guide.partition("### speak\n")[2].partition("\n### ")[0]
    programs = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    for program in programs:
        exec(compile(program, "sdk/README.md", "exec"), names)
    assert len(programs) == 2
    assert names["reply"].sound.shape == (2, FRAME)
    assert all(float(figure) > 0 for figure in capsys.readouterr().out.split())
    left = [name for name, _ in names["module"].named_parameters() if "lora" in name]
    assert left == []
    assert any("lora" in name for name in names["weights"])


def test_a_model_that_only_writes_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = HubSimulator(tmp_path / "writing")
    source, out = tmp_path / "user.wav", tmp_path / "reply.wav"
    write_audio(source, voice(0.2))
    assert fl_main(["speak", "--hub", hub.url, "--in", str(source), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "neither hears nor speaks" in said
    assert "moshi-fl generate" in said
    assert not out.exists()
