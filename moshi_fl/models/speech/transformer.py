"""The streaming transformer of the speech models: pre-norm layers over ring attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.common import given, require_counts, require_numbers
from moshi_fl.models.speech.attention import (
    SPARE,
    Block,
    Placement,
    Step,
    StreamingAttention,
    floating,
    offline_blocks,
    slot_positions,
    visible,
)
from moshi_fl.models.speech.layers import (
    Gating,
    LayerScale,
    NormName,
    PositionName,
    make_norm,
    rotation,
    rotation_rates,
    sinusoids,
)
from moshi_fl.models.speech.product import Linear
from moshi_fl.models.speech.streaming import State, StreamingModule


@dataclass(frozen=True)
class TransformerConfig:
    """Size and kind of a streaming transformer.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    d_model: int
    num_heads: int
    num_layers: int
    dim_feedforward: int
    context: int | None = None  # positions that a query sees, its own among them; None: all
    max_period: float = 10000
    positional_embedding: PositionName = "sin"
    positional_scale: float = 1.0  # of "sin"
    norm: NormName = "layer_norm"
    gating: Literal["none", "silu"] = "none"  # "none" is GELU without a gate
    layer_scale: float | None = None  # initial value
    kv_repeat: int = 1  # query heads for each head of keys
    weights_per_step: int = 0  # steps of a depth transformer, each with weights of its own
    weights_per_step_schedule: tuple[int, ...] | None = None  # set of weights of each step

    def __post_init__(self) -> None:
        counts = ("d_model", "num_heads", "num_layers", "dim_feedforward", "kv_repeat")
        require_counts(self, counts, name="transformer")
        require_counts(self, given(self, "context"), name="transformer")
        require_numbers(self, given(self, "positional_scale", "layer_scale"), name="transformer")
        require_numbers(self, ("max_period",), name="transformer", above_zero=True)
        if self.d_model % self.num_heads or self.d_model // self.num_heads % 2:
            raise ConfigError(
                f"transformer: d_model = {self.d_model} over num_heads = {self.num_heads} "
                "must give an even number."
            )
        if self.num_heads % self.kv_repeat:
            raise ConfigError(
                f"transformer: kv_repeat = {self.kv_repeat} must divide "
                f"num_heads = {self.num_heads}."
            )
        if self.positional_embedding not in get_args(PositionName):
            raise ConfigError(
                f"transformer: positional_embedding = {self.positional_embedding!r} "
                f"must be one of {', '.join(get_args(PositionName))}."
            )
        if self.gating not in ("none", "silu"):
            raise ConfigError(f'transformer: gating = {self.gating!r} must be "none" or "silu".')
        if self.weights_per_step and self.gating == "none":
            raise ConfigError('transformer: weights_per_step needs gating = "silu".')
        schedule = self.weights_per_step_schedule
        if schedule is not None and len(schedule) != self.weights_per_step:
            raise ConfigError(
                f"transformer: weights_per_step_schedule has {len(schedule)} entries "
                f"for {self.weights_per_step} steps."
            )

    @property
    def sets(self) -> tuple[int, ...]:
        """Set of weights of each step of a depth transformer; empty for a plain one."""
        return self.weights_per_step_schedule or tuple(range(self.weights_per_step))

    @property
    def set_count(self) -> int:
        """Number of different sets of weights."""
        return max(self.sets, default=0) + 1

    @property
    def capacity(self) -> int:
        """Tokens that a ring holds; 0 where the context has no bound."""
        return self.weights_per_step if self.context is None else self.context + SPARE


class StreamingTransformerLayer(nn.Module):
    """``x = x + Attention(norm(x)); x = x + FFN(norm(x))``, each update scaled if configured."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.dim_feedforward
        self.self_attn = StreamingAttention(
            width, config.num_heads, config.kv_repeat, config.capacity, config.set_count
        )
        self.norm1, self.norm2 = make_norm(config.norm, width), make_norm(config.norm, width)
        self.gated = config.gating != "none"
        if config.weights_per_step:
            self.gating: nn.Module = nn.ModuleList(
                Gating(width, hidden) for _ in range(config.set_count)
            )
        elif self.gated:
            self.gating = Gating(width, hidden)
        else:
            self.linear1 = Linear(width, hidden, bias=False)
            self.linear2 = Linear(hidden, width, bias=False)
        scale = config.layer_scale
        self.layer_scale_1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.layer_scale_2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, x: Tensor, step: Step, sets: list[int] | None = None) -> Tensor:
        """``x``: (B, T, C), the same back; ``sets``: the weights of each token, or None."""
        x = _add(x, self.self_attn(self.norm1(x), step, sets), self.layer_scale_1)
        return _add(x, self.feed_forward(self.norm2(x), sets), self.layer_scale_2)

    def feed_forward(self, x: Tensor, sets: list[int] | None) -> Tensor:
        """``x``: (B, T, C), the same back."""
        if not self.gated:
            return cast("Tensor", self.linear2(F.gelu(self.linear1(x))))
        if sets is None:
            return cast("Tensor", self.gating(x))
        gates = cast("nn.ModuleList", self.gating)
        if len(sets) == 1:
            return cast("Tensor", gates[sets[0]](x))
        rows = zip(sets, x.unbind(1), strict=True)
        return torch.stack([gates[i](row) for i, row in rows], dim=1)


def _add(x: Tensor, update: Tensor, scale: nn.Module) -> Tensor:
    """The sum in the dtype of the update, which a ``LayerScale`` multiplies first."""
    x = x.to(update.dtype)
    if isinstance(scale, LayerScale):
        return torch.addcmul(x, scale.scale, update)
    return x + update


class Progress(State):
    """How far each item has come.

    Attributes:
        offsets: Tokens so far, (B,).
        written: The same of the item that has most, or more; known without a look at the device.
        capacity: Tokens that the rings hold.
        rates: Of rotary positions, (D / 2,).
    """

    def __init__(self, batch: int, capacity: int, rates: Tensor) -> None:
        super().__init__(batch, rates.device)
        self.capacity = capacity
        self.offsets = torch.zeros(batch, dtype=torch.long, device=rates.device)
        self.written = 0
        self.rates = rates

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.offsets, mask)
        if bool(mask.all()):
            self.written = 0

    def advance(self, count: int) -> None:
        """``count`` tokens have passed."""
        self.offsets.add_(self.active, alpha=count)
        self.written += count


class StreamingTransformer(StreamingModule):
    """Layers under one another; no norm after the last.

    Attributes:
        context: Positions that a query sees; ``set_attention_context`` changes it.
        fixed_shapes: Attend to whole rings from the first step on, as CUDA graphs need it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.context, self.fixed_shapes = config, config.context, False
        self.layers = nn.ModuleList(
            StreamingTransformerLayer(config) for _ in range(config.num_layers)
        )

    @property
    def capacity(self) -> int:
        """Tokens that the rings of a new stream hold."""
        return self.config.weights_per_step if self.context is None else self.context + SPARE

    def initial_state(self, batch: int) -> Progress:
        """Nothing read yet.

        Raises:
            ConfigError: The context has no bound, so that no ring could hold it.
        """
        if not self.capacity:
            raise ConfigError(
                "a transformer whose context has no bound cannot stream.",
                hint="set a context: set_attention_context(model, frames)",
            )
        return Progress(batch, self.capacity, self._rates(floating(self).device))

    def rewind(self) -> None:
        """All items back to the first token, at no cost: what the rings hold is never seen."""
        progress = self.progress()
        progress.offsets.zero_()
        progress.written = 0

    def progress(self) -> Progress:
        """How far the stream has come."""
        return cast("Progress", self.state())

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, T, C), the same back.

        Raises:
            DataError: The batch is not the stream's, or a depth transformer got too many steps.
        """
        self.check_batch(x)
        T = x.shape[1]
        step = self.offline_step(x) if self._state is None else self.next_step(x)
        if self.config.positional_embedding.startswith("sin"):
            table = sinusoids(step.positions, x.shape[2], self.config.max_period)
            x = x + (self.config.positional_scale * table).to(x.dtype)
        sets = self._sets(step.start, T)
        for layer in self.layers:
            x = layer(x, step, sets)
        if self._state is not None:
            self.progress().advance(T)
        return x

    def offline_step(self, x: Tensor) -> Step:
        """The whole of an input (B, T, C) that stands alone."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        blocks = offline_blocks(x.shape[1], self.context, x)
        turns = self._turns(positions, self._rates(x.device))
        return Step(0, positions, turns, self._halves, blocks, None)

    def next_step(self, x: Tensor) -> Step:
        """The next tokens (B, T, C) of the stream."""
        now, T = self.progress(), x.shape[1]
        positions = now.offsets[:, None] + torch.arange(T, device=x.device)  # (B, T)
        # Written before they are attended to, unless that would overwrite a key still in sight.
        room = now.capacity - (self.context or 0) + 1
        before = now.written + T <= now.capacity or room >= T
        filled = min(now.capacity, now.written + T * before)
        placement = Placement(
            slots=(positions % now.capacity)[:, None, -now.capacity :, None],
            before=before,
            filled=now.capacity if self.fixed_shapes else filled,
        )
        last = positions[:, -1] if before else now.offsets - 1
        keys = slot_positions(last, now.capacity, placement.filled)
        if not before:
            keys = torch.cat([keys, positions], dim=1)
        mask = visible(positions, keys, self.context, x)
        turns = self._turns(positions, now.rates)
        block = Block(slice(None), slice(None), mask)
        return Step(now.written, positions, turns, self._halves, (block,), placement)

    def set_context(self, context: int | None) -> None:
        """How many positions a query sees from here on, its own among them; None: all.

        Raises:
            ConfigError: It is not above zero, or more than what the rings of a stream hold.
        """
        if context is not None and context < 1:
            raise ConfigError(f"context = {context} must be above zero.")
        if self._state is not None and (context or self.progress().capacity + 1) > (
            self.progress().capacity
        ):
            raise ConfigError(
                f"context = {context} is more than the {self.progress().capacity} positions "
                "that this stream keeps.",
                hint="set the context before streaming starts",
            )
        self.context = context
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, StreamingAttention):
                    module.capacity = self.capacity

    @property
    def _halves(self) -> bool:
        return self.config.positional_embedding == "rope_concat"

    def _rates(self, device: torch.device) -> Tensor:
        width = self.config.d_model // self.config.num_heads
        return rotation_rates(width, self.config.max_period, device)

    def _turns(self, positions: Tensor, rates: Tensor) -> Tensor | None:
        if self.config.positional_embedding in {"none", "sin"}:
            return None
        turns = rotation(positions, rates)[:, :, None]  # (B, T, 1, 1, D / 2)
        groups = [turns] * (self.config.kv_repeat + 1)
        return torch.cat([*groups, torch.ones_like(turns)], dim=2)

    def _sets(self, start: int, count: int) -> list[int] | None:
        sets = self.config.sets
        if not sets:
            return None
        if start + count > len(sets):
            raise DataError(f"step {start + count} of a depth transformer of {len(sets)} steps.")
        return list(sets[start : start + count])


def set_attention_context(model: nn.Module, context: int | None) -> None:
    """Change how many positions the queries of all transformers in ``model`` see.

    Depth transformers, which see the steps of one frame, are left alone.
    """
    for module in model.modules():
        if isinstance(module, StreamingTransformer) and not module.detached:
            module.set_context(context)
