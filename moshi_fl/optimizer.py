"""AdamW and its schedules, as functions of the step number.

Uses PyTorch's fused kernel directly: constructing a ``torch.optim`` object imports the compiler
stack first, which costs more than a second of a short run, and its state hides behind indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moshi_fl.models.family import ParameterGroup

BETA2 = 0.999
EPSILON = 1e-8
FLOOR = 0.01  # of the peak; where the cosine schedule ends
_ONE_GROUP: Mapping[str, ParameterGroup] = {}


def one_cycle(step: int, steps: int, *, peak: float, warmup_fraction: float) -> tuple[float, float]:
    """Learning rate and Adam's beta1 of a step (from 0), as ``OneCycleLR`` has them (Smith 2018).

    The rate climbs on a cosine from peak/25 to the peak and falls to peak/250,000; beta1 moves the
    other way between 0.95 and 0.85.
    """
    top = max(warmup_fraction * steps - 1, 0.0)
    if step < top:
        return _cosine(peak / 25, peak, step / top), _cosine(0.95, 0.85, step / top)
    progress = (step - top) / (steps - 1 - top) if step > top else 0.0
    return _cosine(peak, peak / 25e4, progress), _cosine(0.85, 0.95, progress)


def warmup_cosine(step: int, steps: int, *, peak: float, warmup_steps: int) -> float:
    """Learning rate of a step (from 0): a straight climb, then a cosine to 0.01 times the peak.

    The step numbered ``warmup_steps`` from 1 has the peak, the one numbered ``steps`` and all
    after it have the floor.
    """
    number = step + 1
    if number < warmup_steps:
        return peak * number / warmup_steps
    if number >= steps:
        return FLOOR * peak
    return _cosine(peak, FLOOR * peak, (number - warmup_steps) / (steps - warmup_steps))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass
class _Members:
    """Tensors of the parameters that are treated alike."""

    group: ParameterGroup
    index: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    square: list[Tensor] = field(default_factory=list)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Moments start at zero and carry the parameters' names, so that a checkpoint is plain tensors.

    Args:
        parameters: Tensors by name, updated in place.
        weight_decay: Of those parameters whose group decays.
        beta2: Decay of the squared gradients' mean.
        groups: Group by name; a parameter that is not in it has the rate as it is, and decays.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        weight_decay: float,
        beta2: float = BETA2,
        groups: Mapping[str, ParameterGroup] = _ONE_GROUP,
    ) -> None:
        self._weight_decay, self._beta2 = weight_decay, beta2
        self.mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._members: dict[ParameterGroup, _Members] = {}
        for index, (name, parameter) in enumerate(parameters.items()):
            group = groups.get(name, ParameterGroup())
            members = self._members.setdefault(group, _Members(group))
            members.index.append(index)
            members.parameters.append(parameter)
            members.mean.append(self.mean[name])
            members.square.append(self.square[name])
        device = next(iter(parameters.values())).device
        self._number = torch.zeros((), device=device)  # of the step, from 1

    def step(
        self,
        gradients: list[Tensor],
        step: int,
        *,
        learning_rate: float,
        beta1: float,
        skip: Tensor | None = None,
    ) -> None:
        """Update the parameters in place.

        Args:
            gradients: In the order of the parameters.
            step: Counts from 0.
            learning_rate: Before each group's scale.
            beta1: Decay of the gradients' mean.
            skip: One element on the device; 1 leaves everything as it is, without a host's asking.
        """
        self._number.fill_(step + 1)
        for members in self._members.values():
            group = members.group
            torch._fused_adamw_(
                members.parameters,
                [gradients[i] for i in members.index],
                members.mean,
                members.square,
                [],
                [self._number] * len(members.index),
                lr=learning_rate * group.learning_rate_scale,
                beta1=beta1,
                beta2=self._beta2,
                weight_decay=self._weight_decay if group.decays else 0.0,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )


def clip_(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``limit``; the norm before.

    Nothing of it makes the host wait for a CUDA device.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # noqa: SLF001
    if norm.is_cuda:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    elif norm > limit:
        torch._foreach_mul_(gradients, limit / (float(norm) + 1e-6))
    return norm
