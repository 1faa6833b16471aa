"""Spoken dialogues with exact word times, made by eSpeak NG: two voices, one on each channel.

The engine is under the GPL and serves the tests alone. What it says depends on what it has said
before, so each dialogue is spoken by a process of its own: then equal arguments give equal sound.
Run as a program, it is that process, and needs nothing but ctypes.
"""

from __future__ import annotations

import base64
import ctypes
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: the callback gets the sound
UTF8 = 1
WORD, END = 1, 5  # espeak_EVENT_TYPE
SPEED, PITCH = 1, 3  # espeak_PARAMETER
PAUSE = 0.3  # s between turns

# Those with "breath" in them draw noise, and never say the same twice.
VOICES = ["f1", "m1", "belinda", "m3", "Annie", "m5", "alicia", "Andy", "m4", "m6", "m7", "john"]
SENTENCES = [
    "Good morning to you.",
    "Where does the river go?",
    "It runs down to the sea.",
    "The sun is warm today.",
    "We saw seven white birds.",
    "Please open the green door.",
    "My brother sings very well.",
    "What time does the train leave?",
    "Nobody knows the old road.",
    "Bring some bread and water.",
    "Snow fell during the night.",
    "How many apples are left?",
    "Three boats crossed the lake.",
    "The little dog ran home.",
    "Listen, somebody plays music.",
    "Tell me about your garden.",
]


@dataclass(frozen=True)
class Turn:
    """What one of the two says: the one on the left channel (0) or on the right (1)."""

    channel: int
    text: str


def turns(seed: int, count: int) -> list[Turn]:
    """Sentences in an order of their own, left and right in turn."""
    chosen = random.Random(f"turns {seed}").choices(SENTENCES, k=count)
    return [Turn(number % 2, text) for number, text in enumerate(chosen)]


def write_dialogue(
    path: Path, said: Sequence[Turn], *, voices: tuple[str, str], speed: int = 175, pitch: int = 50
) -> Path:
    """Write ``path`` (stereo, 24 kHz) and the words of both speakers beside it."""
    import numpy as np

    from moshi_fl.models.speech.audio import SAMPLE_RATE, write_audio
    from moshi_fl.models.speech.resample import resample

    spoken = _speak(said, voices, speed, pitch)
    pieces, words, start = [], [], 0
    for turn, part in zip(said, spoken["turns"], strict=True):
        sound = np.frombuffer(base64.b64decode(part["sound"]), np.int16).astype(np.float32) / 32768
        sound = resample(sound[None], spoken["rate"], SAMPLE_RATE)
        piece = np.zeros((2, sound.shape[1] + round(PAUSE * SAMPLE_RATE)), np.float32)
        piece[turn.channel, : sound.shape[1]] = sound[0]
        speaker = ("SPEAKER_MAIN", "SPEAKER_USER")[turn.channel]
        offset = start / SAMPLE_RATE
        words += [
            [word, [round(offset + begin, 4), round(offset + end, 4)], speaker]
            for word, begin, end in part["words"]
        ]
        pieces.append(piece)
        start += piece.shape[1]
    write_audio(path, np.concatenate(pieces, axis=1))
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return path


def write_dialogues(folder: Path, *, client: int, count: int = 2, length: int = 4) -> list[Path]:
    """``count`` dialogues of ``length`` turns; each client has voices and sentences of its own."""
    chosen = random.Random(client)
    left, right = (VOICES[(2 * client + side) % len(VOICES)] for side in range(2))
    speed, pitch = chosen.randint(150, 200), chosen.randint(35, 65)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_dialogue(
            folder / f"dialogue-{number}.wav",
            turns(1000 * client + number, length),
            voices=(left, right),
            speed=speed,
            pitch=pitch,
        )
        for number in range(count)
    ]


def _speak(said: Sequence[Turn], voices: tuple[str, str], speed: int, pitch: int) -> dict[str, Any]:
    request = {
        "turns": [[voices[turn.channel], turn.text] for turn in said],
        "speed": speed,
        "pitch": pitch,
    }
    command, asked = [sys.executable, __file__], json.dumps(request).encode()
    done = subprocess.run(command, input=asked, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of ``speak_lib.h``."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Engine:
    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, data, 0)
        assert self.rate > 0
        self.sound = bytearray()
        self.events: list[tuple[int, int, int]] = []  # type, character, sample
        self.callback = _Callback(self._take)
        self.library.espeak_SetSynthCallback(self.callback)

    def set(self, parameter: int, value: int) -> None:
        assert self.library.espeak_SetParameter(parameter, value, 0) == 0

    def say(self, voice: str, text: str) -> dict[str, Any]:
        assert self.library.espeak_SetVoiceByName(f"en-us+{voice}".encode()) == 0, voice
        self.sound.clear()
        self.events.clear()
        data = text.encode()
        assert self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, UTF8, None, None) == 0
        return {
            "sound": base64.b64encode(self.sound).decode(),
            "words": list(self._words(text)),
        }

    def _take(self, wave: Any, samples: int, events: Any) -> int:
        if wave and samples:
            self.sound += ctypes.string_at(wave, 2 * samples)
        number = 0
        while events[number].type:
            event = events[number]
            if event.type in {WORD, END}:
                self.events.append((event.type, event.text_position, event.sample))
            number += 1
        return 0

    def _words(self, text: str) -> Any:
        """Words and their times; a word that runs into the one before it is said with it."""
        ends = [*self.events[1:], (END, len(text) + 1, len(self.sound) // 2)]
        starts = [position for kind, position, _ in self.events if kind == WORD]
        stops = dict(zip(starts, [*starts[1:], len(text) + 1], strict=True))
        for (kind, position, sample), (_, _, until) in zip(self.events, ends, strict=True):
            if kind == WORD:
                said = text[position - 1 : stops[position] - 1].strip(" ,.?!")
                yield said, sample / self.rate, until / self.rate


def main() -> None:
    request = json.load(sys.stdin)
    engine = _Engine()
    engine.set(SPEED, request["speed"])
    engine.set(PITCH, request["pitch"])
    said = [engine.say(voice, text) for voice, text in request["turns"]]
    json.dump({"rate": engine.rate, "turns": said}, sys.stdout)


if __name__ == "__main__":
    main()
