"""Blocked attention against the textbook's, and the cheap dropout masks."""

import math

import pytest
import torch

from moshi_fl.models.attention import Dropout, causal_attention, keep_mask


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(QK' / sqrt(D)) V with the future masked; key heads repeated for their queries."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def heads(count: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, count, length, 8, dtype=dtype, requires_grad=True)


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, inputs, wanted)


@pytest.mark.parametrize("length", [1, 7, 96, 97, 250])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_values_and_gradients_are_those_of_the_textbook(length: int, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = heads(4, length), heads(groups, length), heads(groups, length)
    y, wanted = causal_attention(q, k, v, training=True), plain(q, k, v)
    assert torch.allclose(y, wanted, atol=1e-5)
    pairs = zip(gradients(y, q, k, v), gradients(wanted, q, k, v), strict=True)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in pairs)


def test_half_precision_stays_near_the_textbook() -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 150, torch.bfloat16) for _ in range(3))
    y = causal_attention(q, k, v, training=True)
    exact = [z.detach().float().requires_grad_() for z in (q, k, v)]
    wanted = plain(*exact)
    assert y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() < 0.02
    for mine, theirs in zip(gradients(y, q, k, v), gradients(wanted, *exact), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_gradients_under_dropout_are_those_of_the_loss_with_the_same_masks() -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 100, torch.float64) for _ in range(3))

    def same_masks(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return causal_attention(*inputs, dropout=0.3, training=True).square().sum()

    analytic = torch.autograd.grad(same_masks(q, k, v), (q, k, v))
    for index, gradient in enumerate(analytic):
        direction = torch.randn_like(gradient)
        ends = []
        for sign in (1, -1):
            moved = [z.detach() for z in (q, k, v)]
            moved[index] = moved[index] + sign * 1e-6 * direction
            ends.append(same_masks(*(z.requires_grad_() for z in moved)))
        slope = (ends[0] - ends[1]).item() / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = heads(4, 200), heads(4, 200)
    ones = torch.ones_like(k)
    assert torch.allclose(causal_attention(q, k, ones, dropout=0.5, training=False), ones)
    dropped = causal_attention(q, k, ones, dropout=0.5, training=True)
    assert (dropped - 1).abs().mean() > 0.05
    assert dropped[:, :, 100:].detach().mean() == pytest.approx(1, abs=0.02)


def test_equal_seeds_drop_the_same_elements_at_the_asked_rate() -> None:
    x = torch.ones(1001, 999)
    layer = Dropout(0.1)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert first.mean() == pytest.approx(1, abs=2e-3)
    assert (first == 0).double().mean() == pytest.approx(0.1, abs=2.5e-3)  # rounded to a 256th
    assert torch.equal(layer.eval()(x), x)


def test_neighbouring_bytes_of_a_mask_are_independent() -> None:
    torch.manual_seed(0)
    keep = keep_mask(torch.Size((1 << 17, 8)), 0.5).double()
    correlation = torch.corrcoef(keep.t()) - torch.eye(8)
    assert correlation.abs().max() < 0.015
