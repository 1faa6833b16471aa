"""Which dialogues are found under a user's paths, and why others are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moshi_fl import data as texts
from moshi_fl import screening
from moshi_fl.errors import DataError
from moshi_fl.models.speech import audio, dialogues
from moshi_fl.models.speech.audio import SoundError, read_audio, write_audio
from moshi_fl.models.speech.dialogues import Found, find_dialogues, open_dialogue
from tests.support.espeak import SENTENCES, Turn, write_dialogue, write_dialogues

WORDS = {"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]]}


def record(path: Path, *, seconds: float = 1, seed: int = 0, words: object = WORDS) -> Path:
    """A file of noise on both channels, and words beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.random.default_rng(seed).standard_normal((2, round(seconds * 24000)))
    write_audio(path, (0.05 * sound).astype(np.float32))
    if words is not None:
        path.with_suffix(".json").write_text(json.dumps(words))
    return path


def rewrite(path: Path, **channels: float) -> None:
    """Scale the left or the right channel of a file."""
    sound = read_audio(path)
    for row, name in enumerate(("left", "right")):
        sound[row] *= channels.get(name, 1)
    write_audio(path, sound)


def names(found: Found) -> list[str]:
    return [dialogue.path.stem for dialogue in found.dialogues]


def find(*paths: Path | str, seed: int = 0, max_bytes: int | None = None) -> Found:
    return find_dialogues([Path(path) for path in paths], seed=seed, max_bytes=max_bytes)


def test_spoken_dialogues_have_words_where_there_is_sound(tmp_path: Path) -> None:
    turns = [Turn(0, SENTENCES[0]), Turn(1, SENTENCES[1]), Turn(0, SENTENCES[2])]
    path = write_dialogue(tmp_path / "x.wav", turns, voices=("f1", "m1"))
    left, right = read_audio(path)
    dialogue = open_dialogue(path)
    assert dialogue.duration == len(left) / 24000
    said = ["Good", "morning", "to", "you", "It", "runs", "down", "to", "the", "sea"]
    assert [word.text for word in dialogue.words] == said
    for word in dialogue.words:
        span = slice(int(word.start * 24000), int(word.end * 24000))
        assert np.square(left[span]).mean() > 1e-4
        assert np.abs(right[span]).max() == 0
    quiet = slice(int(dialogue.words[3].end * 24000), int(dialogue.words[4].start * 24000))
    assert np.abs(left[quiet]).max() < 1e-3
    assert np.square(right[quiet]).mean() > 1e-4


def test_spoken_dialogues_are_the_same_again_and_other_clients_speak_otherwise(
    tmp_path: Path,
) -> None:
    first, again = (write_dialogues(tmp_path / name, client=3, count=1)[0] for name in "ab")
    assert first.read_bytes() == again.read_bytes()
    assert first.with_suffix(".json").read_bytes() == again.with_suffix(".json").read_bytes()
    (other,) = write_dialogues(tmp_path / "c", client=4, count=1)
    assert other.read_bytes() != first.read_bytes()


def test_folders_are_searched_in_order_of_name(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["b.wav", "a/z.flac", "a/c.WAV", "d/.git/x.wav", ".ssh/y.wav", "build/d.wav"]
    ):
        record(tmp_path / name, seed=number)
    (tmp_path / "notes.txt").write_text("not sound, not counted")
    (tmp_path / "link.wav").symlink_to(tmp_path / "b.wav")
    found = find(tmp_path)
    assert names(found) == ["c", "z", "b", "d"]
    assert found.skipped == {texts.LINK: 1, screening.SECRET_NAME: 1}
    assert found.bytes == sum(d.path.stat().st_size for d in found.dialogues)
    dialogue = found.dialogues[0]
    assert (dialogue.duration, dialogue.weight) == (1.0, 1.0)
    assert [word.text for word in dialogue.words] == ["hello"]


def unusable(folder: Path) -> dict[str, Path]:
    """One file of each kind that cannot be used, by what is wrong with it."""
    made = {
        dialogues.SILENT: record(folder / "silent.wav"),
        dialogues.SILENT_MOSHI: record(folder / "swapped.wav"),
        dialogues.CLIPPED: record(folder / "clipped.wav"),
        dialogues.NO_WORDS: record(folder / "wordless.wav", words=None),
        dialogues.BAD_WORDS: record(
            folder / "badly.wav", words={"alignments": [["x", [9, 9], "S"]]}
        ),
        audio.MONO: record(folder / "mono.wav"),
        audio.EMPTY: record(folder / "empty.wav"),
        audio.UNREADABLE: record(folder / "text.wav"),
    }
    rewrite(made[dialogues.SILENT], left=1e-3, right=1e-3)
    rewrite(made[dialogues.SILENT_MOSHI], left=0)
    rewrite(made[dialogues.CLIPPED], right=15)
    write_audio(made[audio.MONO], read_audio(made[audio.MONO])[0])
    made[audio.EMPTY].write_bytes(made[audio.EMPTY].read_bytes()[:40] + bytes(4))
    made[audio.UNREADABLE].write_text("no sound")
    return made


def test_what_cannot_be_used_is_counted_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    made = unusable(tmp_path)
    with pytest.raises(DataError, match="No usable dialogue") as caught:
        find(tmp_path)
    assert "1 silence (silent.wav)" in caught.value.hint
    record(tmp_path / "good.wav")
    found = find(tmp_path)
    assert names(found) == ["good"]
    assert found.skipped == dict.fromkeys(made, 1)
    assert found.left_out == {reason: (path.name,) for reason, path in made.items()}


def test_of_many_that_are_left_out_for_one_reason_the_first_are_named(tmp_path: Path) -> None:
    record(tmp_path / "good.wav")
    for number in range(5):
        record(tmp_path / f"mute-{number}.wav", words=None)
        (tmp_path / f"call-{number}.mp3").write_bytes(b"ID3")
    found = find(tmp_path)
    assert found.skipped == {dialogues.NO_WORDS: 5, dialogues.OTHER_FORMAT: 5}
    assert found.left_out[dialogues.NO_WORDS] == ("mute-0.wav", "mute-1.wav", "mute-2.wav")
    assert texts.told_left_out(found.skipped, found.left_out) == (
        "5 no alignments beside them (mute-0.wav, mute-1.wav, mute-2.wav, …); "
        "5 sound that is neither WAV nor FLAC (call-0.mp3, call-1.mp3, call-2.mp3, …)"
    )


def test_what_is_named_and_cannot_be_used_is_an_error_of_its_own(tmp_path: Path) -> None:
    for reason, path in unusable(tmp_path).items():
        with pytest.raises(DataError) as caught:
            find(path)
        assert path.stem in str(caught.value)
        if isinstance(caught.value, SoundError):
            assert caught.value.reason == reason
    with pytest.raises(DataError, match="does not exist"):
        find(tmp_path / "none")


def test_who_only_listens_may_be_silent(tmp_path: Path) -> None:
    silent_user = record(tmp_path / "a.wav")
    rewrite(silent_user, right=0)
    silent_moshi = record(tmp_path / "b.wav", words={"alignments": []})
    rewrite(silent_moshi, left=0)
    assert len(find(silent_user, silent_moshi).dialogues) == 2


def test_lists_name_files_from_their_own_folder(tmp_path: Path) -> None:
    for number in range(4):
        record(tmp_path / f"sound/{number}.wav", seconds=1 + number / 2, seed=number)
    lines = [
        {"path": "sound/2.wav", "duration": 2.0},
        {"path": str(tmp_path / "sound/0.wav"), "duration": 1.05, "speaker": "me"},
        {"path": "sound/1.wav"},
        {"path": "sound/3.wav", "duration": 7.5},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = find(path)
    assert names(found) == ["2", "0", "1"]
    assert found.skipped == {dialogues.OTHER_LENGTH: 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of .* names no sound"),
        ('{"duration": 1}', "line 2 of .* names no sound"),
        ('{"path": "", "duration": 1}', "line 2 of .* names no sound"),
        ('{"path": "x.wav", "duration": -1}', "line 2 of .* names no sound"),
        ('{"path": "x.wav", "duration": NaN}', "line 2 of .* names no sound"),
        ("[" * 100_000, "line 2 of .* names no sound"),
        ('{"path": "none.wav"}', "line 2 of .*none.wav does not exist"),
    ],
)
def test_a_list_that_is_wrong_is_an_error_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    record(tmp_path / "x.wav")
    path = tmp_path / "data.jsonl"
    path.write_text('{"path": "x.wav"}\n' + line)
    with pytest.raises(DataError, match=said):
        find(path)


def test_paths_may_have_weights(tmp_path: Path) -> None:
    record(tmp_path / "calls/a.wav", seed=1)
    record(tmp_path / "studio/b.wav", seed=2)
    record(tmp_path / "odd:2/c.wav", seed=3)
    found = find(f"{tmp_path}/calls:2,{tmp_path}/studio:0.5", tmp_path / "odd:2")
    assert [dialogue.weight for dialogue in found.dialogues] == [2.0, 0.5, 1.0]
    for weight in ("0", "-1", "nan", "inf", "heavy"):
        with pytest.raises(DataError, match=f"{weight!r} is no weight"):
            find(f"{tmp_path}/calls:{weight}")


def test_equal_sound_counts_once(tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    record(tmp_path / "copy.wav")
    found = find(tmp_path, tmp_path / "a.wav")
    assert names(found) == ["a"]
    assert found.skipped == {texts.DUPLICATE: 1}


def test_a_limit_keeps_files_by_the_seed(tmp_path: Path) -> None:
    for number in range(12):
        record(tmp_path / f"{number:02}.wav", seed=number)
    each = (tmp_path / "00.wav").stat().st_size
    kept = {seed: names(find(tmp_path, seed=seed, max_bytes=5 * each)) for seed in range(4)}
    assert all(len(chosen) == 5 and chosen == sorted(chosen) for chosen in kept.values())
    assert len(set(map(tuple, kept.values()))) > 1
    again = find(tmp_path, seed=2, max_bytes=5 * each + 1)
    assert names(again) == kept[2]
    assert again.skipped == {texts.OVER_BUDGET: 7}


def test_the_fingerprint_is_of_what_was_taken(tmp_path: Path) -> None:
    def fingerprint(*paths: Path | str) -> str:
        return find(*paths).fingerprint

    record(tmp_path / "a/x.wav", seed=1)
    record(tmp_path / "a/y.wav", seed=2)
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    others = {
        fingerprint(f"{tmp_path}/a:2"),
        fingerprint(tmp_path / "a/y.wav", tmp_path / "a/x.wav"),
        fingerprint(tmp_path / "a/x.wav"),
    }
    words = {"alignments": [["hello", [0.1, 0.5], "SPEAKER_MAIN"]]}
    (tmp_path / "b/x.json").write_text(json.dumps(words))
    others.add(fingerprint(tmp_path / "b"))
    rewrite(tmp_path / "a/x.wav", left=0.9)
    others.add(fingerprint(tmp_path / "a"))
    assert len(others | {first}) == 6
