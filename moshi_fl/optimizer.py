"""AdamW with the one-cycle schedule, as functions of the step number.

Uses PyTorch's fused kernel directly: constructing a ``torch.optim`` object imports the compiler
stack first, which costs more than a second of a short run, and its state hides behind indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BETA2 = 0.999
EPSILON = 1e-8


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


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


class AdamW:
    """Adam with decoupled weight decay on all parameters (Loshchilov and Hutter 2019).

    Moments start at zero and carry the parameters' names, so that a checkpoint is plain tensors.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, weight_decay: float) -> None:
        self._parameters = list(parameters.values())
        self._weight_decay = weight_decay
        self.mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._steps = [torch.zeros((), device=p.device) for p in self._parameters]

    def step(
        self, gradients: list[Tensor], step: int, *, learning_rate: float, beta1: float
    ) -> None:
        """Update the parameters in place; ``step`` counts from 0."""
        for counter in self._steps:
            counter.fill_(step + 1)
        torch._fused_adamw_(
            self._parameters,
            gradients,
            list(self.mean.values()),
            list(self.square.values()),
            [],
            self._steps,
            lr=learning_rate,
            beta1=beta1,
            beta2=BETA2,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )


def clip_(gradients: list[Tensor], limit: float) -> float:
    """Scale gradients in place so that their joint norm is at most ``limit``; the norm before."""
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))  # noqa: SLF001
    if norm > limit:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
    return norm
