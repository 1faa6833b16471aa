"""Linear layers for a few rows: whichever way around, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moshi_fl.models.speech.product import HAS_ONEDNN, Linear, Product, linear

# Rows and widths on both sides of every limit.
SHAPES = [(rows, width) for rows in (1, 2, 3, 8, 9) for width in (24, 512, 520, 1536, 1544)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@torch.no_grad()
def test_few_rows_and_many_give_the_same_numbers(rows: int, width: int) -> None:
    torch.manual_seed(0)
    module, x = Linear(width, 40), torch.randn(rows, 1, width)
    exact = nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
    for found in (module(x), linear(x[:, 0], module.weight, module.bias)[:, None]):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
        assert found.is_contiguous()


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@torch.no_grad()
def test_a_product_is_written_or_added_to_its_place(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    module = kind(24, 10, bias=False)
    for rows in (1, 2, 9):
        x, base, place = torch.randn(rows, 24), torch.randn(rows, 10), torch.zeros(rows, 10)
        wanted, product = module(x), Product(module)
        product.into(place, x)
        for found, expected in (
            (product(x), wanted),
            (place, wanted),
            (product.onto(base, x), base + wanted),
        ):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_rows_that_overlap_in_memory_are_no_matter() -> None:
    """As windows of a convolution do, whose last axes may be one only in a view."""
    torch.manual_seed(0)
    weight, sound = torch.randn(12, 48), torch.randn(1, 80)
    windows = sound.unfold(1, 48, 16)  # (1, 3, 48)
    wanted = windows.contiguous() @ weight.t()
    torch.testing.assert_close(linear(windows, weight), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(linear(windows[:, :2], weight), wanted[:, :2], atol=1e-5, rtol=0)


def test_gradients_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    module = Linear(8, 4, bias=False)
    module(torch.ones(1, 8)).sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(4, 8))


@torch.no_grad()
def test_other_numbers_than_float32_are_left_to_pytorch() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float64):
        module, x = Linear(16, 4, bias=False).to(dtype), torch.randn(2, 16).to(dtype)
        assert torch.equal(module(x), nn.functional.linear(x, module.weight))


@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_many_rows_have_the_gradients_of_a_linear_layer(frozen: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 4, 24)[:, 1:3]  # with gaps between them
    weight, aim = torch.randn(10, 24), torch.randn(20, 2, 10)
    found = []
    for multiply in (linear, nn.functional.linear):
        x, w = (
            tensor.clone().requires_grad_(frozen != name)
            for name, tensor in (("input", rows), ("weight", weight))
        )
        y = multiply(x, w)
        (y * aim).sum().backward()
        found.append((y, x.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this build of PyTorch has no such product")
def test_many_rows_say_that_they_have_no_second_derivative() -> None:
    x = torch.randn(40, 8, requires_grad=True)
    y = linear(x, torch.randn(4, 8)).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
