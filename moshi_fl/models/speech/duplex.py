"""A conversation in sound: 80 ms of the user in, 80 ms of the model and its text out, both at once.

``DuplexSession`` joins the codec and the language model, for one user or for several at once. What
it knows of a conversation is of one size however long that lasts, and can be saved and gone back
to. There is no microphone here: whoever has sound pushes it, a frame at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.family import SpokenText
from moshi_fl.models.speech.eight_bits import in_eight_bits
from moshi_fl.models.speech.generate import UNGENERATED, LMGen
from moshi_fl.models.speech.latency import Latency
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.sampling import Sampling


@dataclass(frozen=True)
class Reply:
    """What the model says in one frame.

    Attributes:
        sound: Of each stream, (B, samples of a frame) float32; zeros where nothing is said yet.
        text: What each stream's text grows by; mostly empty, for frames outnumber words.
    """

    sound: Tensor
    text: tuple[str, ...]


class DuplexSession:
    """One conversation, or several side by side; a context manager.

    The model begins before the first frame is pushed, so that it hears that frame too, and frame n
    of the reply is what it says while it hears frame n - ``delay``: the first ``delay`` frames are
    silence without text. (Moshi's is 0. A model whose streams are not late at all has said a frame
    before it could hear any; that one is dropped.)

    Inside, ``mimi`` and ``lm`` are this session's alone.

    Args:
        mimi: The codec.
        lm: The language model.
        text: What spells the model's text tokens.
        batch: Streams.
        sampling: How tokens are chosen; one source of chance serves all streams.
        seed: Makes the choices repeatable.
        int8: Weights of the language model in eight bits: faster, a little less exact.

    Raises:
        ConfigError: The two do not fit together, or the model does not both speak and listen.
    """

    def __init__(
        self,
        mimi: Mimi,
        lm: LMModel,
        text: SpokenText,
        *,
        batch: int = 1,
        sampling: Sampling | None = None,
        seed: int | None = None,
        int8: bool = False,
    ) -> None:
        _require_that_they_fit(mimi, lm)
        self.mimi, self.batch, self.latency = mimi, batch, Latency(1 / mimi.frame_rate)
        self._text, c = text, lm.config
        self._heard = c.n_q - c.dep_q  # streams of codes
        self.device = next(lm.parameters()).device
        self.delay = max(0, c.max_delay - 1)
        self._chance = torch.Generator(self.device)
        if seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(seed)
        self._lm = LMGen(
            in_eight_bits(lm) if int8 else lm,
            sampling,
            out_of_sync=True,
            generator=self._chance,
        )

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.enter_context(self.mimi.streaming(self.batch))
            opened.enter_context(self._lm.streaming(self.batch))
            opened.callback(self.mimi.set_num_codebooks, self.mimi.num_codebooks)
            self.mimi.set_num_codebooks(self._heard)
            self._begin(torch.ones(self.batch, dtype=torch.bool))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        return self.mimi.frame_size

    @torch.no_grad()
    def push(self, sound: Tensor) -> Reply:
        """Hear one frame and say one.

        Args:
            sound: Of each stream, (B, ``frame_size``) floating point from -1 to 1; (samples,) will
                do for one stream. Who has pieces of other sizes collects them first: a frame that
                is not whole has no reply.

        Raises:
            DataError: Not one whole frame, another number of streams, or samples that are not
                finite; the session is as it was.
        """
        start = time.perf_counter()
        sound = self._checked(sound)
        codes = self.mimi.encode(sound[:, None].to(next(self.mimi.parameters())))
        tokens = self._lm.step(codes)
        assert tokens is not None  # out of sync: there is always an answer, if only of placeholders
        there = tokens[:, 0, 0] != UNGENERATED  # (B,)
        reply = Reply(self._decoded(tokens[:, 1:], there), self._told(tokens[:, 0, 0]))
        self.latency.add(time.perf_counter() - start)
        return reply

    def reset(self, mask: Tensor | None = None) -> None:
        """Begin anew for the streams of ``mask`` (B,) bool, or for all; the others go on.

        Raises:
            DataError: The mask is of another shape or kind.
        """
        self.mimi.reset_streaming(mask)
        self._lm.reset_streaming(mask)
        self._begin(torch.ones(self.batch, dtype=torch.bool) if mask is None else mask)

    def save(self) -> dict[str, Any]:
        """All that the conversations depend on, as copies; ``restore`` goes back to it."""
        return {
            "mimi": self.mimi.get_streaming_state(),
            "lm": self._lm.get_streaming_state(),
            "chance": self._chance.get_state(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from where ``save`` was called, here or in another session of the same models.

        Raises:
            DataError: It is of other models, or of another number of streams.
        """
        if set(saved) != {"mimi", "lm", "chance"}:
            raise DataError(f"a saved session holds {sorted(saved)}, not chance, lm and mimi.")
        before = self.mimi.get_streaming_state()
        self.mimi.set_streaming_state(saved["mimi"])
        try:
            self._lm.set_streaming_state(saved["lm"])
        except DataError:
            self.mimi.set_streaming_state(before)
            raise
        self._chance.set_state(saved["chance"])

    def _begin(self, mask: Tensor) -> None:
        """The step of these streams that hears nothing, whatever it is given."""
        whole = torch.ones(self.batch, dtype=torch.bool)
        self._lm.set_exec_mask(mask)
        self._lm.step(torch.zeros(self.batch, self._heard, 1, dtype=torch.long, device=self.device))
        self._lm.set_exec_mask(whole)

    def _decoded(self, codes: Tensor, there: Tensor) -> Tensor:
        """Sound (B, samples) of codes (B, levels, 1), and silence of streams that have none."""
        if bool(there.all()):
            return self.mimi.decode(codes)[:, 0].float().cpu()
        silence = torch.zeros(self.batch, self.frame_size)
        if not bool(there.any()):
            return silence
        self.mimi.set_exec_mask(there)  # for the others, decoding has not begun
        sound = self.mimi.decode(codes.clamp_min(0))[:, 0].float().cpu()
        self.mimi.set_exec_mask(torch.ones_like(there))
        return torch.where(there.cpu()[:, None], sound, silence)

    def _told(self, tokens: Tensor) -> tuple[str, ...]:
        """The text of tokens (B,)."""
        return tuple("" if t == UNGENERATED else self._text.pieces([t]) for t in tokens.tolist())

    def _checked(self, sound: Tensor) -> Tensor:
        if not self.mimi.is_streaming:
            raise DataError("the session is not open.", hint="with DuplexSession(...) as session:")
        if sound.dim() == 1:
            sound = sound[None]
        if sound.shape != (self.batch, self.frame_size):
            raise DataError(
                f"a session of {self.batch} streams was pushed sound of shape "
                f"{list(sound.shape)}; it takes one whole frame: "
                f"[{self.batch}, {self.frame_size}].",
                hint="collect samples until a frame is whole; fill the last one up with zeros",
            )
        if not sound.is_floating_point():
            raise DataError(f"sound in {sound.dtype}; it must be floating point from -1 to 1.")
        finite = sound.isfinite().all(1)
        if not bool(finite.all()):
            stream = int((~finite).nonzero()[0])
            raise DataError(f"sound of stream {stream} with samples that are not finite.")
        return sound


def _require_that_they_fit(mimi: Mimi, lm: LMModel) -> None:
    c = lm.config
    if not 0 < c.dep_q < c.n_q:
        raise ConfigError(
            f"a model that reads {c.n_q} streams of audio and says {c.dep_q} of them cannot hold "
            "a conversation: it must say some and hear others."
        )
    most = max(c.dep_q, c.n_q - c.dep_q)
    if most > mimi.total_codebooks or c.card != mimi.cardinality or mimi.channels != 1:
        raise ConfigError(
            f"the model speaks in {most} codebooks of {c.card} codes; Mimi has "
            f"{mimi.total_codebooks} of {mimi.cardinality} and {mimi.channels} channels of sound.",
            hint="give the codec with which the model was trained",
        )
