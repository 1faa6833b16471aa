"""Speaking and listening at once: one frame of the user's tokens in, one of the model's out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_fl.errors import DataError
from moshi_fl.models.speech.depth_decode import DepthDecoder
from moshi_fl.models.speech.lm import LMModel, check_codes
from moshi_fl.models.speech.sampling import Sampling
from moshi_fl.models.speech.streaming import State, StreamingModule

UNGENERATED = -2
"""In place of a token that there is not: before the first frame, and for an item held still."""


@dataclass(frozen=True)
class Hooks:
    """Called in every step with what was just found, before it is used.

    Attributes:
        on_text_logits: With logits (B, 1, 1, text_card).
        on_text: With text tokens (B,).
        on_audio: With audio tokens (B, dep_q).
    """

    on_text_logits: Callable[[Tensor], None] | None = None
    on_text: Callable[[Tensor], None] | None = None
    on_audio: Callable[[Tensor], None] | None = None


class Columns(State):
    """The last columns of each item, as a ring.

    Attributes:
        tokens: (B, n_q + 1, max_delay + 2); the column of position p lies at p mod its length.
        offsets: Steps so far, (B,).
        steps: Since the start or the last reset of all, of whichever item.
    """

    def __init__(self, batch: int, streams: int, length: int, device: torch.device) -> None:
        super().__init__(batch, device)
        shape = (batch, streams, length)
        self.tokens = torch.full(shape, UNGENERATED, dtype=torch.long, device=device)
        self.offsets = torch.zeros(batch, dtype=torch.long, device=device)
        self.steps = 0

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.tokens, mask, UNGENERATED)
        self.clear(self.offsets, mask)
        if bool(mask.all()):
            self.steps = 0

    def read(self, position: Tensor) -> Tensor:
        """Tokens (B, K) of each of the first K streams at its ``position`` (B, K)."""
        index = (position % self.tokens.shape[2])[..., None]
        return self.tokens[:, : index.shape[1]].gather(2, index)[..., 0]

    def write(self, streams: slice, position: Tensor, tokens: Tensor) -> None:
        """Put tokens (B, K) of these streams at ``position`` (B, K), of items that take part."""
        index = (position % self.tokens.shape[2])[..., None]
        self.put(self.tokens[:, streams], index, tokens[..., None])


class LMGen(StreamingModule):
    """Steps through a conversation of a model with one user per item of the batch.

    A step gives what was said ``max_delay`` frames ago, for by then all codebooks of that frame are
    known. The model hears nothing of the very first frame that it is given.

    Attributes:
        out_of_sync: Give tokens from the first step on, ``UNGENERATED`` where there are none:
            for items that start, or are held, at different times.
    """

    def __init__(
        self,
        lm_model: LMModel,
        sampling: Sampling | None = None,
        *,
        out_of_sync: bool = False,
        hooks: Hooks | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.lm_model, self.out_of_sync, self.generator = lm_model, out_of_sync, generator
        self.sampling, self.hooks = sampling or Sampling(), hooks or Hooks()
        c = lm_model.config
        self._depth: DepthDecoder | None = None
        self.first_heard = 1 + c.dep_q  # of the streams, the user's first
        device = next(lm_model.parameters()).device
        self.register_buffer("delays", torch.tensor(c.delays, device=device), persistent=False)
        initial = torch.tensor(c.initial_tokens, device=device)
        self.register_buffer("initial", initial, persistent=False)

    delays: Tensor
    initial: Tensor

    def initial_state(self, batch: int) -> Columns:
        """Nothing said yet."""
        c = self.lm_model.config
        return Columns(batch, c.n_q + 1, c.max_delay + 2, self.delays.device)

    def streaming_forever(self, batch: int) -> None:
        """Start a conversation, and lay out the depth transformer, which begins anew each frame."""
        super().streaming_forever(batch)
        self._depth = DepthDecoder(self.lm_model, batch)

    def stop_streaming(self) -> None:
        """Forget the conversation."""
        super().stop_streaming()
        self._depth = None

    def state(self) -> Columns:
        """The state of the conversation."""
        state = super().state()
        assert isinstance(state, Columns)
        return state

    @torch.no_grad()
    def step(self, heard: Tensor, replace_audio: Tensor | None = None) -> Tensor | None:
        """One frame.

        Args:
            heard: The user's tokens, (B, n_q - dep_q or more, 1); more rows are not read.
            replace_audio: Audio tokens to go on with instead of the model's, (B, dep_q, 1).

        Returns:
            Text and audio tokens (B, dep_q + 1, 1) of ``max_delay`` frames ago, ``UNGENERATED`` for
            items that have none; None while there are none at all.

        Raises:
            DataError: Tokens of another shape or out of range.
        """
        return self.step_with_hidden(heard, replace_audio)[0]

    @torch.no_grad()
    def step_with_extra_heads(self, heard: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Like ``step``, and the probabilities (B, 1, D) of each extra head."""
        tokens, hidden = self.step_with_hidden(heard)
        return tokens, [head(hidden).float().softmax(-1) for head in self.lm_model.extra_heads]

    @torch.no_grad()
    def step_with_hidden(
        self, heard: Tensor, replace_audio: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Like ``step``, and the hidden state (B, 1, C) of the temporal transformer."""
        state, lm = self.state(), self.lm_model
        c = lm.config
        heard = self._checked(heard, c.n_q - c.dep_q)
        if replace_audio is not None:
            replace_audio = self._checked(replace_audio, c.dep_q)
        now = state.offsets[:, None]  # (B, 1)
        state.write(
            slice(self.first_heard, None), now + self.delays[self.first_heard :], heard[..., 0]
        )
        waiting = now <= self.delays
        if not state.all_active:
            waiting |= ~state.active[:, None]
        column = torch.where(waiting, self.initial, state.read(now.expand_as(waiting)))
        hidden, text_logits = lm.forward_text(column[..., None])
        spoken = self._speak(hidden, text_logits, replace_audio)
        state.offsets.add_(state.active)
        state.steps += 1
        state.write(slice(self.first_heard), now.expand_as(spoken), spoken)
        return self._ready(state), hidden

    def _speak(self, hidden: Tensor, text_logits: Tensor, replace_audio: Tensor | None) -> Tensor:
        """The text and audio tokens (B, dep_q + 1) of the column to come."""
        hooks, generator = self.hooks, self.generator
        assert self._depth is not None
        if hooks.on_text_logits:
            hooks.on_text_logits(text_logits)
        text = self.sampling.text(text_logits[:, 0, 0].float(), generator)
        if hooks.on_text:
            hooks.on_text(text)
        if replace_audio is None:
            audio = self._depth.frame(
                hidden[:, 0], text, lambda logits: self.sampling.audio(logits.float(), generator)
            )
        else:
            audio = replace_audio[..., 0]
        if hooks.on_audio:
            hooks.on_audio(audio)
        return torch.cat([text[:, None], audio], dim=1)

    def _ready(self, state: Columns) -> Tensor | None:
        """The tokens (B, dep_q + 1, 1) whose frame is now whole."""
        late = self.lm_model.config.max_delay
        if state.steps <= late and not self.out_of_sync:
            return None
        now = state.offsets[:, None]
        out = state.read(now - late + self.delays[: self.first_heard])
        return torch.where((now > late) & state.active[:, None], out, UNGENERATED)[..., None]

    def _checked(self, tokens: Tensor, wanted: int) -> Tensor:
        """The rows that are read, (B, wanted, 1); looked at on a CPU only: a GPU would wait.

        Raises:
            DataError: Too few rows, more than one frame, another batch, or codes out of range.
        """
        self.check_batch(tokens)
        if tokens.dim() != 3 or tokens.shape[1] < wanted or tokens.shape[2] != 1:
            raise DataError(
                f"a step was given tokens of shape {list(tokens.shape)}; "
                f"it takes (batch, {wanted}, 1): one frame at a time."
            )
        rows = tokens[:, :wanted]
        if wanted and not rows.is_cuda:
            held = ~self.state().active[:, None, None]
            check_codes(rows.masked_fill(held, 0), [self.lm_model.config.card] * wanted)
        return rows.long()
