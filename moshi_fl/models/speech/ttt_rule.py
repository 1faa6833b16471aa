"""The arithmetic of test-time training: a small network per head that learns while it reads.

The state of a sequence is the weights of a linear map, or of a perceptron with one hidden layer
(Sun et al. 2024). Each token takes one gradient step on reconstructing its value from its key; the
gradients of a mini-batch of K tokens are all taken at the weights that it began with. So the
output for a token is what the initial weights say, less what the gradients up to its own would
take away from that; attention to gradients, with no copy of the weights per token:

    query (W - tau_i sum_j eta_j x_j^T g_j) = query W - tau_i sum_j eta_j (query . x_j) g_j

Training and prefill apply this to whole mini-batches (the dual form), a stream to one token and
the up to K that wait for their mini-batch to end (the buffered form): the same functions.

Shapes: N sequences times heads, T tokens that ask, L tokens that were read, D columns of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


class FastLayer(NamedTuple):
    """One layer that learns: ``weight`` (N, in, out), ``bias`` (N, 1, out)."""

    weight: Tensor
    bias: Tensor


class Step(NamedTuple):
    """What tokens would change in a layer: ``inputs`` (N, L, in), ``grads`` (N, L, out)."""

    inputs: Tensor
    grads: Tensor


class HeadNorm(NamedTuple):
    """A LayerNorm per head: ``gain`` and ``shift``, each (N, 1, D)."""

    gain: Tensor
    shift: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """``z``: (N, T, D), the same back; the variance is the population's."""
        return torch.addcmul(self.shift, self.gain, F.layer_norm(z, z.shape[-1:], eps=EPSILON))


def gelu(x: Tensor) -> Tensor:
    """The tanh form, as in the reference."""
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of ``gelu``."""
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - t * t) * (0.79788456 + 0.1070322243 * x * x) + 0.5 * (1 + t)


def surprise(z: Tensor, target: Tensor, norm: HeadNorm) -> Tensor:
    """The gradient by ``z`` of ``||norm(z) - target||^2 / 2``; all are (N, T, D)."""
    normal, mean, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPSILON)
    u = norm.gain * torch.addcmul(norm.shift - target, norm.gain, normal)
    wanted = [True, False, False]  # the gradient by z alone; it can be derived once more
    backward = torch.ops.aten.native_layer_norm_backward
    g: Tensor = backward(u, z, z.shape[-1:], mean, inverse, None, None, wanted)[0]
    return g


def steps_of(fast: list[FastLayer], k: Tensor, target: Tensor, norm: HeadNorm) -> list[Step]:
    """One step for each layer, at the weights ``fast``; ``k`` and ``target``: (N, T, D)."""
    first, *rest = fast
    z = torch.baddbmm(first.bias, k, first.weight)
    if not rest:
        return [Step(k, surprise(z, target, norm))]
    hidden, (second,) = gelu(z), rest
    back = surprise(torch.baddbmm(second.bias, hidden, second.weight), target, norm)
    front = (back @ second.weight.mT) * gelu_slope(z)
    return [Step(k, front), Step(hidden, back)]


def answer(
    fast: list[FastLayer], q: Tensor, steps: list[Step], rates: Tensor, norm: HeadNorm
) -> Tensor:
    """What the updated layers make of ``q`` (N, T, D), normalised and added to it.

    ``rates`` (N, T, L): how much each query's weights moved along each step, 0 for later ones.
    """
    x = q
    for depth, (layer, step) in enumerate(zip(fast, steps, strict=True)):
        x = gelu(x) if depth else x
        attention = torch.addcmul(
            rates, torch.bmm(x, step.inputs.mT), rates
        )  # the bias's input is 1
        x = torch.baddbmm(layer.bias, x, layer.weight)
        x = torch.baddbmm(x, attention, step.grads, alpha=-1)
    return q + norm(x)


def learnt(fast: list[FastLayer], steps: list[Step], rates: Tensor) -> list[FastLayer]:
    """The layers after a mini-batch; ``rates`` (N, L) are those of its last token."""
    updated = []
    for layer, step in zip(fast, steps, strict=True):
        scaled = step.grads * rates[..., None]
        weight = torch.baddbmm(layer.weight, step.inputs.mT, scaled, alpha=-1)
        updated.append(FastLayer(weight, layer.bias - scaled.sum(1, keepdim=True)))
    return updated


def drawn_back(fast: list[FastLayer], first: list[FastLayer], share: float) -> list[FastLayer]:
    """The layers, moved by ``share`` of the way back to those that a stream begins with."""
    if not share:
        return fast
    return [
        FastLayer(a.weight.lerp(b.weight, share), a.bias.lerp(b.bias, share))
        for a, b in zip(fast, first, strict=True)
    ]
