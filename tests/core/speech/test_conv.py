"""Causal convolutions against PyTorch's own, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_fl.errors import DataError
from moshi_fl.models.speech.conv import CausalConv, CausalTransposedConv

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "kind",
    [
        {"kernel": 7},
        {"kernel": 1},
        {"kernel": 3, "dilation": 4},
        {"kernel": 8, "stride": 4},
        {"kernel": 4, "stride": 2, "replicate": True, "bias": False},
    ],
)
@pytest.mark.parametrize("size", [4, 8, 12, 48])
def test_a_convolution_is_pytorchs(kind: dict[str, Any], size: int) -> None:
    conv, x = CausalConv(5, 6, **kind), torch.randn(2, 48, 5)
    inner = conv.conv["conv"]
    mode = "replicate" if kind.get("replicate") else "constant"
    padded = F.pad(x.transpose(1, 2), (conv.past, 0), mode=mode)
    wanted = F.conv1d(
        padded, inner.weight, inner.bias, kind.get("stride", 1), 0, kind.get("dilation", 1)
    ).transpose(1, 2)
    torch.testing.assert_close(conv(x), wanted, **CLOSE)
    with torch.no_grad(), conv.streaming(2):
        streamed = torch.cat([conv(piece) for piece in x.split(size, dim=1)], dim=1)
    torch.testing.assert_close(streamed, wanted, **CLOSE)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_a_transposed_convolution_is_pytorchs(depthwise: bool, bias: bool, size: int) -> None:
    conv = CausalTransposedConv(4, 4, 3, bias=bias, depthwise=depthwise)
    inner, x = conv.convtr["convtr"], torch.randn(2, 24, 4)
    wanted = inner(x.transpose(1, 2))[..., :-3].transpose(1, 2)
    torch.testing.assert_close(conv(x), wanted, **CLOSE)
    with torch.no_grad(), conv.streaming(2):
        streamed = torch.cat([conv(piece) for piece in x.split(size, dim=1)], dim=1)
    torch.testing.assert_close(streamed, wanted, **CLOSE)


def test_long_inputs_are_convolved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = CausalConv(2, 3, 5, dilation=2), torch.randn(1, 50, 2)
    whole = conv(x)
    monkeypatch.setattr("moshi_fl.models.speech.conv.ROWS", 16)
    torch.testing.assert_close(conv(x), whole, **CLOSE)


@pytest.mark.parametrize("conv", [CausalConv(5, 6, 3), CausalTransposedConv(5, 6, 3)])
def test_weights_lie_as_the_product_reads_them(conv: torch.nn.Module) -> None:
    """After loading and conversion too: rearranging them at each call would cost more than it."""
    twin = type(conv)(5, 6, 3)
    twin.load_state_dict(conv.state_dict())
    order = (0, 2, 1) if isinstance(conv, CausalConv) else (2, 1, 0)
    for module in (conv, twin, twin.double()):
        weight: Tensor = next(module.parameters())
        assert weight.permute(order).is_contiguous()


def test_gradients_are_pytorchs() -> None:
    conv, up = CausalConv(3, 4, 4, stride=2), CausalTransposedConv(4, 3, 2)
    x = torch.randn(2, 10, 3)
    up(F.elu(conv(x))).square().sum().backward()
    mine = {name: p.grad for m in (conv, up) for name, p in m.named_parameters()}
    for module in (conv, up):
        module.zero_grad()
    first, second = conv.conv["conv"], up.convtr["convtr"]
    y = second(F.elu(first(F.pad(x.transpose(1, 2), (2, 0)))))[..., :-2]
    y.square().sum().backward()
    for module in (conv, up):
        for name, p in module.named_parameters():
            torch.testing.assert_close(mine[name], p.grad, atol=1e-4, rtol=1e-4)


def test_a_step_that_is_no_stride_is_refused() -> None:
    with pytest.raises(DataError, match="7 steps are not a multiple of the stride 2"):
        CausalConv(3, 4, 4, stride=2)(torch.zeros(1, 7, 3))
