"""Causal convolutions that stream, in time-major layout (B, T, C), each as one matrix product.

A window of inputs is one row of a matrix, so that a few time steps cost no more than reading the
weights once. Weights have the shapes of PyTorch's convolutions but lie in memory as the product
reads them: no call rearranges them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from moshi_fl.errors import DataError
from moshi_fl.models.speech.attention import floating
from moshi_fl.models.speech.product import linear
from moshi_fl.models.speech.streaming import State, StreamingModule

ROWS = 8192  # of windows that are copied out at once


class Previous(State):
    """The last inputs of a convolution.

    Attributes:
        inputs: (B, P, C); zeros at the start of a stream.
        first: Items that have not had an input yet, (B,).
    """

    def __init__(self, batch: int, length: int, channels: int, like: Tensor) -> None:
        super().__init__(batch, like.device)
        self.inputs = torch.zeros(batch, length, channels, dtype=like.dtype, device=like.device)
        self.first = torch.ones_like(self.active)

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.inputs, mask)
        self.first |= mask


class CausalConv(StreamingModule):
    """A convolution in which no output sees an input after it; T inputs give T / stride outputs.

    Before the first input come zeros or, with ``replicate``, copies of the first input.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        replicate: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.stride, self.dilation = channels, stride, dilation
        self.replicate = replicate
        self.span = (kernel - 1) * dilation + 1  # inputs from the first to the last of a window
        self.past = self.span - stride
        conv = nn.Conv1d(channels, outputs, kernel, stride, dilation=dilation, bias=bias)
        conv.weight = _laid_out(conv.weight, (0, 2, 1))
        self.conv = nn.ModuleDict({"conv": conv})  # for the name in Kyutai's checkpoints

    def initial_state(self, batch: int) -> Previous:
        """Nothing read yet."""
        return Previous(batch, self.past, self.channels, floating(self))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T / stride, outputs).

        Raises:
            DataError: T is not a multiple of the stride, or the batch is not the stream's.
        """
        self.check_batch(x)
        if x.shape[1] % self.stride:
            raise DataError(f"{x.shape[1]} steps are not a multiple of the stride {self.stride}.")
        conv = cast("nn.Conv1d", self.conv["conv"])
        if self.past:
            x = torch.cat([self._before(x), x], dim=1)  # (B, P + T, C)
        if self.past and self._state is not None:
            self._state.keep(self._previous.inputs, x[:, -self.past :])
        windows = x.unfold(1, self.span, self.stride)[..., :: self.dilation]  # (B, T', C, K)
        weight = conv.weight.permute(0, 2, 1).flatten(1)  # (outputs, K C)
        parts = [
            linear(part.transpose(2, 3).flatten(2), weight, conv.bias)
            for part in torch.split(windows, ROWS, dim=1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def _previous(self) -> Previous:
        return cast("Previous", self.state())

    def _before(self, x: Tensor) -> Tensor:
        """The inputs before ``x``, (B, P, C)."""
        copies = x[:, :1].expand(-1, self.past, -1)
        if self._state is None:
            return copies if self.replicate else torch.zeros_like(copies)
        state = self._previous
        if not self.replicate:
            return state.inputs
        before = torch.where(state.first[:, None, None], copies, state.inputs)
        state.first &= ~state.active
        return before


class Overlap(State):
    """What the last input adds to the outputs that come next, (B, stride C)."""

    def __init__(self, batch: int, width: int, like: Tensor) -> None:
        super().__init__(batch, like.device)
        self.tail = torch.zeros(batch, width, dtype=like.dtype, device=like.device)

    def reset(self, mask: Tensor) -> None:
        """Put items of ``mask`` (B,) back to the start."""
        super().reset(mask)
        self.clear(self.tail, mask)


class CausalTransposedConv(StreamingModule):
    """A transposed convolution with kernel 2 stride: T inputs give T stride outputs.

    Each input gives 2 stride outputs; the second half of them overlaps the first half of the next
    input's. With ``depthwise``, each channel has a kernel of its own and sees no other.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        stride: int,
        *,
        bias: bool = True,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.outputs, self.stride, self.depthwise = outputs, stride, depthwise
        groups = channels if depthwise else 1
        conv = nn.ConvTranspose1d(channels, outputs, 2 * stride, stride, groups=groups, bias=bias)
        conv.weight = _laid_out(conv.weight, (2, 1, 0))
        self.convtr = nn.ModuleDict({"convtr": conv})

    def initial_state(self, batch: int) -> Overlap:
        """Nothing read yet."""
        return Overlap(batch, self.stride * self.outputs, floating(self))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T stride, outputs)."""
        self.check_batch(x)
        conv = cast("nn.ConvTranspose1d", self.convtr["convtr"])
        head, tail = self._spread(x, conv.weight).chunk(2, dim=2)  # (B, T, stride outputs) each
        if self._state is None:
            before = torch.zeros_like(tail[:, :1])
        else:
            state = cast("Overlap", self._state)
            before = state.tail[:, None].clone()
            state.keep(state.tail, tail[:, -1])
        y = head + torch.cat([before, tail[:, :-1]], dim=1)
        y = y.view(len(x), -1, self.outputs)
        return y if conv.bias is None else y + conv.bias

    def _spread(self, x: Tensor, weight: Tensor) -> Tensor:
        """What each input gives, (B, T, 2 stride outputs)."""
        kernel = weight.permute(2, 1, 0)  # (2 stride, outputs, C)
        if self.depthwise:
            return (x[:, :, None] * kernel[:, 0]).flatten(2)
        return linear(x, kernel.flatten(0, 1))


def _laid_out(weight: Tensor, order: tuple[int, int, int]) -> nn.Parameter:
    """The same parameter, contiguous in memory when its axes are put in this order.

    The orders in use are their own inverses.
    """
    return nn.Parameter(weight.detach().permute(order).contiguous().permute(order))
