"""Inputs of the speech family that come from strangers: sound, word times, released settings."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import soundfile

from moshi_fl.models.speech.alignments import parse_alignments
from moshi_fl.models.speech.audio import measure_levels, read_audio
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.mimi_config import MimiConfig
from tests.fuzz import mutate
from tests.support.mimis import small_spec
from tests.support.releases import release_config

KINDS = (("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_16"))
WORDS = {
    "alignments": [
        ["hello", [0.1, 0.4], "SPEAKER_MAIN"],
        ["there", [0.5, 0.6], "SPEAKER_MAIN"],
        ["yes", [1.0, 1.2], "SPEAKER_01"],
    ]
}
Sound = tuple[str, bytes]  # format, file


@cache
def _sound(kind: str, encoding: str) -> bytes:
    """A fifth of a second of noise, in stereo."""
    file = io.BytesIO()
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (4800, 2)).astype(np.float32)
    soundfile.write(file, noise, 24000, subtype=encoding, format=kind)
    return file.getvalue()


def make_sound(random: Random) -> Sound:
    """A sound file, mutated in its header more often than elsewhere."""
    kind, encoding = random.choice(KINDS)
    data = _sound(kind, encoding)
    length = random.choice((64, 128, len(data)))
    return kind, mutate.mutate_bytes(random, data[:length]) + data[length:]


def read_sound(made: Sound, folder: Path) -> None:
    """Its samples at another rate, and how loud they are."""
    path = folder / f"sound.{made[0]}"
    path.write_bytes(made[1])
    samples = read_audio(path, sample_rate=16000)
    assert np.isfinite(samples).all(), "samples that are no numbers"
    measure_levels(path)


def make_words(random: Random) -> bytes:
    """Mutated word times."""
    return mutate.spelled(random, mutate.mutate_tree(random, WORDS))


def read_words(made: bytes) -> None:
    """They must be in order, and within the recording."""
    words = parse_alignments(made, 10.0, name="words")
    assert all(0 <= word.start <= word.end <= 10 for word in words), "a word outside"


def make_settings(random: Random) -> tuple[str, Any]:
    """The mutated configuration of a release: of its language model, or of its codec."""
    kind = random.choice(("lm", "mimi"))
    tree = release_config() if kind == "lm" else small_spec()["cfg"]
    mutated = mutate.mutate_tree(random, msgspec.json.decode(msgspec.json.encode(tree)))
    return kind, mutated if isinstance(mutated, dict) else {}


def read_settings(made: tuple[str, Any]) -> None:
    """As ``import-checkpoint`` reads them once they are a table."""
    kind, table = made
    if kind == "lm":
        LMConfig.from_kyutai(table)
    else:
        MimiConfig.from_reference(table)
