"""One training step, and what it changes: float32 weights and the optimizer's moments.

A step depends on the weights, the recipe, its batches and its number alone (dropout is seeded by
it), so that a run which goes on from a checkpoint is the uninterrupted run, bit for bit on a CPU
with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moshi_fl.errors import TrainingError
from moshi_fl.models.family import Grouped, ParameterGroup
from moshi_fl.optimizer import AdamW, clip_
from moshi_fl.train.memory import kept_memory
from moshi_fl.train.recipe import Recipe
from moshi_fl.train.world import Alone, World

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""Mean loss of a batch (scalar tensor, nats per token) and how many tokens it covers."""

_STREAMS = 1_000_003


@dataclass(frozen=True)
class Report:
    """What a step did."""

    step: int  # from 0
    loss: float  # before the step, nats per token
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int


@dataclass(frozen=True)
class _Unread:
    """A report whose figures may still be under way on a device."""

    step: int
    figures: Tensor  # (2,): loss and gradient's norm
    learning_rate: float
    tokens: int


class Engine:
    """Trains a module step by step.

    The loss of a step is the mean over all its tokens: a batch counts by its tokens. With batches
    of equal size that is the mean of the batches' losses.

    Args:
        module: Model with float32 weights, on the recipe's device.
        loss: Of a batch.
        recipe: How to train, settled.
        world: The processes that share each step's batches.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, recipe: Recipe, world: World | None = None
    ) -> None:
        self.module, self.recipe, self.world = module, recipe, world or Alone()
        self._loss = loss
        self._half = recipe.precision == "bf16"
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        self.weights = {
            name: parameter.data.clone() if self._half else parameter.data
            for name, parameter in self.parameters.items()
        }
        groups = _groups(module, [*self.parameters, *self._frozen])
        self._exact = {name for name, group in groups.items() if group.stays_float32}
        self.optimizer = AdamW(
            self.weights, weight_decay=recipe.weight_decay, beta2=recipe.beta2, groups=groups
        )
        self.reads_at_once = "cuda" not in recipe.device  # elsewhere reading makes nobody wait
        self._unread: list[_Unread] = []

    def state(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name."""
        groups = {
            "weight": self.weights,
            "mean": self.optimizer.mean,
            "square": self.optimizer.square,
        }
        return {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Training mode; with bf16, the module holds rounded copies of the weights inside."""
        frozen = {name: parameter.data for name, parameter in self._frozen.items()}
        devices = [torch.device(self.recipe.device)] if "cuda" in self.recipe.device else []
        self.module.train()
        if self._half:
            for name, parameter in self.parameters.items():
                weight = self.weights[name]
                parameter.data = weight if name in self._exact else weight.bfloat16()
            for name in self._frozen.keys() - self._exact:
                self._frozen[name].data = frozen[name].bfloat16()
        if self.recipe.compile:
            self.module.compile()  # in place: the parameters keep their names
        with torch.random.fork_rng(devices), kept_memory(self.recipe.device):
            try:
                yield
            finally:
                self._release(frozen)

    def _release(self, frozen: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, parameter.grad = self.weights[name], None
        for name, parameter in self._frozen.items():
            parameter.data = frozen[name]
        if self.recipe.compile:
            self.module._compiled_call_impl = None  # noqa: SLF001 - there is no other way back
        self.module.eval()

    def step(self, step: int, batches: Iterable[Any]) -> None:
        """One update, from this process's batches of the step.

        Raises:
            TrainingError: The loss or a gradient is not finite; the weights are as before.
        """
        recipe, world = self.recipe, self.world
        rate, beta1 = recipe.pace(step)
        with world.together():
            torch.manual_seed(self._seed(step))
            loss, gradients, unit, tokens = self._differentiate(batches)
        tokens = world.total(tokens)
        self._average(loss, gradients, unit / max(tokens, 1))
        norm = clip_(gradients, recipe.gradient_clip)
        self._unread.append(_Unread(step, torch.stack([loss, norm]), rate, tokens))
        if self.reads_at_once:
            self._require_finite(self._unread[-1])
        skip = None if self.reads_at_once else (~torch.isfinite(loss + norm)).float()
        self.optimizer.step(gradients, step, learning_rate=rate, beta1=beta1, skip=skip)
        self._publish()

    def settle(self) -> list[Report]:
        """Reports of the steps since the last call; waits for the device.

        Raises:
            TrainingError: The loss or a gradient of one was not finite.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        figures = torch.stack([step.figures for step in unread]).tolist()  # one transfer for all
        reports = []
        for step, (loss, norm) in zip(unread, figures, strict=True):
            self._require_finite(step)
            reports.append(Report(step.step, loss, norm, step.learning_rate, step.tokens))
        return reports

    def _seed(self, step: int) -> int:
        """Of what is random in a step, such as dropout."""
        return (self.recipe.seed * _STREAMS + step + (self.world.rank << 40)) % (1 << 63)

    def _differentiate(self, batches: Iterable[Any]) -> tuple[Tensor, list[Tensor], int, int]:
        """Sum of losses, and of their gradients, each batch counting tokens/unit; unit, tokens."""
        total, sums = torch.zeros((), device=self.recipe.device), None
        unit = tokens = 0
        for batch in batches:
            loss, count = self._loss(self.module, batch)
            unit = unit or max(count, 1)
            share = count / unit
            if share != 1:
                loss = loss * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tokens += count
            if self._half:  # bfloat16 would lose what small batches add
                sums = self._add_up(sums)
        return total, self._gradients() if sums is None else sums, unit, tokens

    def _add_up(self, sums: list[Tensor] | None) -> list[Tensor]:
        gradients = self._gradients()
        if sums is None:
            return gradients
        torch._foreach_add_(sums, gradients)
        return sums

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self.parameters.values():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            gradients.append(gradient.float())
            parameter.grad = None
        return gradients

    def _average(self, loss: Tensor, gradients: list[Tensor], factor: float) -> None:
        if factor != 1:
            torch._foreach_mul_([loss, *gradients], factor)
        self.world.add_up_([loss, *gradients])

    def _publish(self) -> None:
        if self._half:
            copies = [parameter.data for parameter in self.parameters.values()]
            torch._foreach_copy_(copies, list(self.weights.values()))

    def _require_finite(self, unread: _Unread) -> None:
        for value, what in zip(unread.figures.tolist(), ("loss", "gradient's norm"), strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what} is {value} at step {unread.step + 1} of {self.recipe.steps}, "
                    f"learning rate {unread.learning_rate:.3g}.",
                    hint="Try again with a lower learning rate; the last good checkpoint is kept.",
                )


def _groups(module: nn.Module, names: Iterable[str]) -> dict[str, ParameterGroup]:
    if not isinstance(module, Grouped):
        return {}
    return {name: module.parameter_group(name) for name in names}
