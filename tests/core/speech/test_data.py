"""Dialogues as tokens: rows in their order, long sound as a stream, codes kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_fl.errors import DataError
from moshi_fl.models.speech.audio import SoundError, read_audio, write_audio
from moshi_fl.models.speech.data import CodeCache, encode_dialogue, encode_file, segments
from moshi_fl.models.speech.dialogues import Dialogue, open_dialogue
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.mimi import PIECE, Mimi
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.models.speech.tiny import tiny_text
from tests.support.espeak import write_dialogues
from tests.support.mimis import small_mimi
from tests.support.speeches import lm_of, tiny


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return small_mimi()


@pytest.fixture(scope="module")
def text() -> TextStream:
    return TextStream(tiny_text())


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Dialogue:
    (path,) = write_dialogues(tmp_path_factory.mktemp("spoken"), client=0, count=1)
    return open_dialogue(path)


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(tmp_path / "codes")


def noise(path: Path, seconds: float, rate: int = 24000) -> Dialogue:
    """A dialogue without words."""
    sound = 0.2 * np.random.default_rng(0).standard_normal((2, round(seconds * rate)))
    write_audio(path, sound.astype(np.float32), rate)
    return Dialogue(path, sound.shape[1] / rate, ())


def test_rows_are_text_then_moshi_then_the_user(
    spoken: Dialogue, mimi: Mimi, text: TextStream
) -> None:
    codes = encode_dialogue(spoken, mimi, text)
    frames = int(np.ceil(spoken.duration * 12.5))
    assert (codes.shape, codes.dtype) == ((17, frames), np.int16)
    assert np.array_equal(codes[0], text.row(spoken.words, spoken.duration))
    assert text.decode(codes[0].tolist()).split() == [word.text for word in spoken.words]
    for channel, sound in enumerate(read_audio(spoken.path)):
        alone = mimi.encode(torch.from_numpy(sound)[None, None])[0]
        assert np.array_equal(codes[1 + 8 * channel : 9 + 8 * channel], alone.numpy())


def test_fewer_codebooks_are_fewer_rows(spoken: Dialogue, text: TextStream) -> None:
    mimi = small_mimi()
    whole = encode_dialogue(spoken, mimi, text)
    mimi.set_num_codebooks(3)
    codes = encode_dialogue(spoken, mimi, text)
    assert np.array_equal(codes, whole[[0, 1, 2, 3, 9, 10, 11]])


@pytest.mark.parametrize("rate", [24000, 16000, 44100])
def test_long_sound_is_encoded_as_a_stream_and_gives_the_same(
    tmp_path: Path, mimi: Mimi, rate: int
) -> None:
    dialogue = noise(tmp_path / "x.wav", (PIECE + 30.3) / 12.5, rate)
    codes = encode_file(dialogue.path, mimi)
    assert codes.shape == (16, PIECE + 31)
    whole = mimi.encode(torch.from_numpy(read_audio(dialogue.path))[:, None])
    assert np.array_equal(codes, whole.flatten(0, 1).numpy())


def test_text_and_codes_must_have_one_frame_rate(spoken: Dialogue, mimi: Mimi) -> None:
    with pytest.raises(DataError, match=r"text at 25 frames a second, codes at 12\.5"):
        encode_dialogue(spoken, mimi, TextStream(tiny_text(), frame_rate=25.0))


def test_a_file_that_has_changed_since_is_an_error_not_codes(
    tmp_path: Path, mimi: Mimi, text: TextStream, cache: CodeCache
) -> None:
    dialogue = noise(tmp_path / "x.wav", 1)
    encode_dialogue(dialogue, mimi, text, cache)
    write_audio(dialogue.path, read_audio(dialogue.path)[0])
    with pytest.raises(SoundError, match="is mono"):
        encode_dialogue(dialogue, mimi, text, cache)


def test_kept_codes_are_not_made_again(
    spoken: Dialogue, text: TextStream, cache: CodeCache
) -> None:
    mimi = small_mimi()
    codes = encode_dialogue(spoken, mimi, text, cache)
    with mimi.streaming(1):  # in which it could not encode
        assert np.array_equal(encode_dialogue(spoken, mimi, text, cache), codes)
        with pytest.raises(RuntimeError, match="streaming already"):
            encode_dialogue(spoken, mimi, text)
    assert np.array_equal(encode_dialogue(spoken, mimi, text), codes)


def test_other_sound_another_codec_or_fewer_codebooks_have_other_codes(
    tmp_path: Path, spoken: Dialogue, cache: CodeCache
) -> None:
    mimi = small_mimi()
    keys = [cache.key(spoken, mimi), cache.key(spoken, small_mimi())]
    assert keys[0] == keys[1]
    keys.append(cache.key(noise(tmp_path / "x.wav", 1), mimi))
    mimi.set_num_codebooks(4)
    keys.append(cache.key(spoken, mimi))
    with torch.no_grad():
        next(mimi.parameters()).add_(1e-3)
    keys.append(cache.key(spoken, mimi))
    assert len(set(keys)) == 4
    copy = tmp_path / "copy.wav"
    copy.write_bytes(spoken.path.read_bytes())
    moved = Dialogue(copy, spoken.duration, ())
    assert cache.key(moved, mimi) == keys[-1]


def test_a_codec_that_was_loaded_for_inference_alone_has_the_same_codes(
    spoken: Dialogue, cache: CodeCache
) -> None:
    with torch.inference_mode():
        loaded = small_mimi()
        assert any(tensor.is_inference() for tensor in loaded.state_dict().values())
        key = cache.key(spoken, loaded)
        next(loaded.parameters()).add_(1)
        assert cache.key(spoken, loaded) != key
    assert cache.key(spoken, small_mimi()) == key


def flip(data: bytes) -> bytes:
    """One bit of the codes is wrong."""
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-7], lambda _: b"", lambda _: b"junk" * 99, flip],
    ids=["cut off", "emptied", "overwritten", "flipped"],
)
def test_damaged_entries_are_made_anew(
    tmp_path: Path,
    mimi: Mimi,
    text: TextStream,
    cache: CodeCache,
    damage: Callable[[bytes], bytes],
) -> None:
    dialogue = noise(tmp_path / "x.wav", 1)
    codes = encode_dialogue(dialogue, mimi, text, cache)
    (entry,) = (tmp_path / "codes").iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert cache.get(cache.key(dialogue, mimi), 8) is None
    assert np.array_equal(encode_dialogue(dialogue, mimi, text, cache), codes)
    assert entry.read_bytes() == good


def test_the_longest_unused_codes_go_when_there_is_no_room(tmp_path: Path) -> None:
    codes = np.zeros((16, 1000), np.int16)
    cache = CodeCache(tmp_path / "codes", max_bytes=100_000)
    for key in ("a", "b", "c"):
        cache.put(key, codes)
    assert cache.get("a", 8) is not None
    cache.put("d", codes)  # four do not fit; b was not used for the longest time
    assert [cache.get(key, 8) is not None for key in "abcd"] == [True, False, True, True]
    assert {path.suffix for path in (tmp_path / "codes").iterdir()} == {".safetensors"}


def test_segments_follow_one_another_and_the_last_is_filled_up() -> None:
    codes = np.arange(3 * 25, dtype=np.int16).reshape(3, 25)
    first, second, third = segments(codes, 10)
    assert np.array_equal(np.concatenate([first, second, third[:, :5]], axis=1), codes)
    assert (third[:, 5:] == -1).all()
    assert third.dtype == np.int16
    assert len(segments(codes, 25)) == 1
    assert segments(codes, 100)[0].shape == (3, 100)


def test_segments_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="25 frames cannot be cut into segments of 0"):
        segments(np.zeros((3, 25), np.int16), 0)
    with pytest.raises(DataError, match="0 frames cannot be cut"):
        segments(np.zeros((3, 0), np.int16), 5)


def test_what_fills_up_a_segment_is_not_trained_on() -> None:
    """The reference means to, but leaves padding tokens in the text's tail and learns them."""
    config = tiny()
    codes = np.random.default_rng(0).integers(4, 20, (4, 12)).astype(np.int16)
    (short,), (exact,) = segments(codes, 30), segments(codes, 12)
    model = lm_of(config).eval()
    found = []
    with torch.no_grad():
        for segment in (short, exact):
            batch = torch.from_numpy(segment).long()[None]
            output = model(batch)
            found.append(losses(output, batch, config))
            assert int(output.text_mask.sum()) == 12
    torch.testing.assert_close(found[0].text, found[1].text)


def test_codes_that_the_model_does_not_have_are_refused() -> None:
    """The number after the last is the initial token: it can be read, but not predicted."""
    for row, code in ((0, tiny().text_card), (1, tiny().card), (3, 999), (2, -2)):
        codes = np.zeros((4, 12), np.int16)
        codes[row, 5] = code
        (segment,) = segments(codes, 12)
        with pytest.raises(DataError, match=f"code {code} of stream {row} at frame 5 is out of r"):
            lm_of(tiny())(torch.from_numpy(segment).long()[None])
