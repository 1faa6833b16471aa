"""A conversation with a file of sound: what a user said goes in, what the model says comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.audio import (
    audio_blocks,
    audio_info,
    audio_writer,
    require_writable,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moshi_fl.models.family import SpeechParts, Task
    from moshi_fl.models.speech.duplex import DuplexSession


def require_files(source: Path, out: Path) -> None:
    """Check both ends of a conversation before any work is done.

    Raises:
        DataError: ``source`` is no sound, or ``out`` cannot be made.
    """
    audio_info(source)
    require_writable(out)
    if out.exists():
        raise DataError(f"{out} is there already.", hint="Give another --out, or remove it.")


def speech_parts(task: Task, module: nn.Module) -> SpeechParts:
    """What a conversation needs of a model.

    Raises:
        ConfigError: It is of a family that does not speak.
    """
    from moshi_fl.models.family import Speaks

    if not isinstance(task, Speaks):
        raise ConfigError(
            "this model neither hears nor speaks.",
            hint="Models of the family speech do; this one may write: moshi-fl generate",
        )
    return task.speech(module)


def converse(
    session: DuplexSession, source: Path, out: Path, *, seconds: float = 0, stereo: bool = False
) -> Iterator[str]:
    """Stream a file through a session of one stream; the text, as it comes.

    The reply has as many frames as are heard. It is written as they come and appears under its name
    once the last is there; memory does not grow with the length of the conversation.

    Args:
        session: Open, and at its beginning.
        source: Sound at any rate; of two channels the mean is heard.
        out: A .wav or .flac file.
        seconds: How long to go on, in silence, after the file has ended.
        stereo: Write the model left and the user right, instead of the model alone.

    Raises:
        DataError: A file that cannot be read, or not be written.
    """
    import numpy as np

    with audio_writer(out, 1 + stereo, session.mimi.sample_rate) as write:
        for heard in _frames(session, source, seconds):
            reply = session.push(heard)
            said = reply.sound[0].numpy()
            write(np.stack([said, heard.numpy()]) if stereo else said[None])
            if reply.text[0]:
                yield reply.text[0]


def _frames(session: DuplexSession, source: Path, seconds: float) -> Iterator[Tensor]:
    """Whole frames (samples,) of a file, the last filled up with silence, and of silence."""
    import torch
    import torch.nn.functional as F

    size, rate = session.frame_size, session.mimi.sample_rate
    for block in audio_blocks(source, sample_rate=rate, block=size):
        yield F.pad(torch.from_numpy(block.mean(axis=0)), (0, size - block.shape[1]))
    for _ in range(math.ceil(round(seconds * rate / size, 6))):
        yield torch.zeros(size)
