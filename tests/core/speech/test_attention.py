"""Streaming transformers: streamed is offline, whatever the pieces, far past the ring's wrap."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.layers import LayerNormF32, RMSNorm, rotate, rotation, rotation_rates
from moshi_fl.models.speech.transformer import (
    StreamingTransformer,
    TransformerConfig,
    set_attention_context,
)

CONFIG = TransformerConfig(
    d_model=16,
    num_heads=4,
    num_layers=2,
    dim_feedforward=32,
    context=6,
    positional_embedding="rope",
    gating="silu",
    norm="rms_norm_f32",
)
LENGTH = 61  # ten contexts
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gating": "none", "norm": "layer_norm", "layer_scale": 0.3},
    {"kv_repeat": 2, "norm": "layer_norm_f32"},
    {"positional_embedding": "rope_concat", "norm": "rms_norm"},
    {"positional_embedding": "sin"},
    {"positional_embedding": "sin_rope", "positional_scale": 0.5},
    {"positional_embedding": "none"},
]


def build(**changes: Any) -> StreamingTransformer:
    torch.manual_seed(0)
    return StreamingTransformer(replace(CONFIG, **changes))


def sequence(batch: int = 2, length: int = LENGTH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, CONFIG.d_model)


def stream(model: StreamingTransformer, x: Tensor, *sizes: int) -> Tensor:
    """``x`` (B, T, C) in pieces of these sizes, again and again."""
    parts, start, turns = [], 0, cycle(sizes)
    while start < x.shape[1]:
        stop = start + next(turns)
        parts.append(model(x[:, start:stop]))
        start = stop
    return torch.cat(parts, dim=1)


def oracle(model: StreamingTransformer, x: Tensor) -> Tensor:
    """Attention as a plain matrix product with a plain mask, two rows of positions at a time."""
    T, config = x.shape[1], model.config
    ahead = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (ahead < 0) | (ahead >= (model.context or T))
    if "sin" in config.positional_embedding:
        half = torch.arange(8) / 7
        phase = torch.arange(T)[:, None] / config.max_period**half
        x = x + config.positional_scale * torch.cat([phase.cos(), phase.sin()], dim=1)
    for layer in model.layers:
        attn, y = layer.self_attn, layer.norm1(x)
        qkv = attn.in_projs[0](y).unflatten(-1, (-1, 4)).transpose(1, 2)  # (B, H + 2 G, T, 4)
        groups = (qkv.shape[1] - 4) // 2
        q, k, v = qkv.split([4, groups, groups], dim=1)
        if "rope" in config.positional_embedding:
            q, k = (turned(z, concat="concat" in config.positional_embedding) for z in (q, k))
        k, v = (z.repeat_interleave(4 // groups, 1) for z in (k, v))
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(hidden, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.layer_scale_1(attn.out_projs[0](y))
        x = x + layer.layer_scale_2(layer.feed_forward(layer.norm2(x), None))
    return x


def turned(z: Tensor, *, concat: bool) -> Tensor:
    """Rotary positions, column by column."""
    out = torch.empty_like(z)
    for i in range(2):
        a, b = (i, i + 2) if concat else (2 * i, 2 * i + 1)
        angle = torch.arange(z.shape[2]) * 10000.0 ** (-2 * i / 4)
        out[..., a] = z[..., a] * angle.cos() - z[..., b] * angle.sin()
        out[..., b] = z[..., a] * angle.sin() + z[..., b] * angle.cos()
    return out


@pytest.mark.parametrize("changes", VARIANTS)
def test_offline_is_the_formula(changes: dict[str, Any]) -> None:
    model, x = build(**changes), sequence()
    torch.testing.assert_close(model(x), oracle(model, x), atol=2e-5, rtol=0)
    torch.testing.assert_close(model(x[:, :5]), oracle(model, x[:, :5]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(1,), (2,), (5,), (8,), (9,), (23,), (61,), (1, 17, 3, 8, 2)])
@pytest.mark.parametrize("changes", VARIANTS[:3])
def test_streamed_is_offline(changes: dict[str, Any], sizes: tuple[int, ...]) -> None:
    model, x = build(**changes), sequence()
    with torch.no_grad(), model.streaming(2):
        torch.testing.assert_close(stream(model, x, *sizes), model_offline(model, x), **CLOSE)


CLOSE = {"atol": 2e-5, "rtol": 0}


def model_offline(model: StreamingTransformer, x: Tensor) -> Tensor:
    twin = StreamingTransformer(model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_context(model.context)
    return twin(x)


def test_long_inputs_are_attended_to_in_blocks() -> None:
    model, x = build(num_layers=1), sequence(1, 1300)
    with torch.no_grad():
        torch.testing.assert_close(model(x), oracle(model, x), **CLOSE)


def test_whole_rings_give_the_same() -> None:
    model, x = build(), sequence()
    with torch.no_grad(), model.streaming(2):
        model.fixed_shapes = True
        torch.testing.assert_close(stream(model, x, 1), model_offline(model, x), **CLOSE)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_masked_item_stands_still(size: int) -> None:
    """The second item sits out some calls, with rubbish for data; the first goes on."""
    model, x = build(), sequence(2, 40)
    rubbish = torch.full((1, size, 16), torch.nan)
    taken, got = [0, 0], [[], []]
    with torch.no_grad(), model.streaming(2):
        for call in range(1 if size == 20 else 12):
            runs = call % 3 != 1
            model.set_exec_mask(torch.tensor([True, runs]))
            feed = [
                x[i : i + 1, taken[i] : taken[i] + size] if i == 0 or runs else rubbish
                for i in (0, 1)
            ]
            y = model(torch.cat(feed))
            for i in (0, 1) if runs else (0,):
                got[i].append(y[i])
                taken[i] += size
        model.reset_streaming()
    for i in (0, 1):
        wanted = model(x[i : i + 1, : taken[i]])[0]
        torch.testing.assert_close(torch.cat(got[i]), wanted, **CLOSE)


def test_a_reset_concerns_one_item() -> None:
    model, x = build(), sequence()
    with torch.no_grad(), model.streaming(2):
        stream(model, x[:, :25], 5)
        model.set_exec_mask(torch.tensor([False, False]))
        model.reset_streaming(torch.tensor([True, False]))
        model.set_exec_mask(torch.tensor([True, True]))
        again = torch.stack([x[0, :30], x[1, 25:55]])
        y = stream(model, again, 2)
    torch.testing.assert_close(y[0], model(x[:1, :30])[0], **CLOSE)
    torch.testing.assert_close(y[1], model(x[1:, :55])[0, 25:], **CLOSE)


def test_a_stream_goes_back_to_a_snapshot() -> None:
    model, x = build(), sequence()
    with torch.no_grad(), model.streaming(2):
        stream(model, x[:, :25], 5)
        saved = model.get_streaming_state()
        first = stream(model, x[:, 25:], 3)
        model.set_streaming_state(saved)
        assert torch.equal(stream(model, x[:, 25:], 3), first)
    with torch.no_grad(), model.streaming(2):
        model.set_streaming_state(saved)
        assert torch.equal(stream(model, x[:, 25:], 3), first)


def test_rings_are_allocated_once() -> None:
    model, x = build(), sequence()
    with torch.no_grad(), model.streaming(2):
        state = model.layers[0].self_attn.state()
        before = state.held.data_ptr()
        stream(model, x, 1, 20)
        assert state.held.data_ptr() == before
        assert state.held.shape[2] == 13


def test_context_changes_at_run_time() -> None:
    model, x = build(), sequence()
    set_attention_context(model, 3)
    torch.testing.assert_close(model(x), oracle(model, x), **CLOSE)
    with torch.no_grad(), model.streaming(2):
        torch.testing.assert_close(stream(model, x, 4), model_offline(model, x), **CLOSE)
        with pytest.raises(ConfigError, match="context = 100 is more than the 10 positions"):
            set_attention_context(model, 100)
        with pytest.raises(ConfigError, match="more than"):
            set_attention_context(model, None)
    set_attention_context(model, None)
    torch.testing.assert_close(model(x), oracle(model, x), **CLOSE)
    with pytest.raises(ConfigError, match="no bound"):
        model.streaming_forever(1)


DEPTH = {
    "context": None,
    "weights_per_step": 4,
    "positional_embedding": "none",
    "weights_per_step_schedule": (0, 1, 2, 2),
}


def test_depth_steps_have_weights_of_their_own() -> None:
    model, x = build(**DEPTH), sequence(3, 4)
    whole = model(x)
    with torch.no_grad(), model.streaming(3):
        for _ in range(2):
            torch.testing.assert_close(stream(model, x, 1), whole, **CLOSE)
            with pytest.raises(DataError, match="step 5 of a depth transformer of 4 steps"):
                model(x[:, :1])
            model.rewind()
        torch.testing.assert_close(stream(model, x, 3), whole, **CLOSE)
    same = x[:, :1].expand(-1, 4, -1)
    per_step = model.layers[0].feed_forward(same, [0, 1, 2, 2])
    assert torch.equal(per_step[:, 2], per_step[:, 3])
    assert not torch.equal(per_step[:, 1], per_step[:, 2])


@pytest.mark.parametrize("changes", [{}, DEPTH])
@pytest.mark.parametrize("stacked", ["in_proj_weight", "in_proj.weight"])
def test_stacked_and_listed_projections_load(changes: dict[str, Any], stacked: str) -> None:
    model = build(**changes)
    state = dict(model.state_dict())
    for layer in range(2):
        for name, whole in (("in_proj", stacked), ("out_proj", "out_proj.weight")):
            prefix = f"layers.{layer}.self_attn."
            keys = sorted(k for k in state if k.startswith(f"{prefix}{name}s."))
            state[prefix + whole] = torch.cat([state.pop(k) for k in keys])
    other = StreamingTransformer(model.config)
    other.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_gradients_flow_through_blocks_and_steps() -> None:
    for changes in ({}, {"context": None}, DEPTH):
        model = build(**changes)
        x = sequence(2, 4 if changes is DEPTH else 20).requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("norm", [RMSNorm(8), RMSNorm(8, 1e-8, in_float32=True), LayerNormF32(8)])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 2, 2, 8)])
def test_norms_take_any_rank(norm: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    centred = x if isinstance(norm, RMSNorm) else x - x.mean(-1, keepdim=True)
    wanted = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(norm(x), wanted, atol=1e-4, rtol=1e-4)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_keeps_length_and_relative_angle() -> None:
    x = torch.randn(1, 2, 1, 8)
    near, far = (
        rotate(x, rotation(torch.tensor([[p, p + 5]]), rotation_rates(8, 1e4, x.device)))
        for p in (0, 1000)
    )
    torch.testing.assert_close(near.norm(dim=-1), x.norm(dim=-1))
    products = [(y[0, 0] * y[0, 1]).sum() for y in (near, far)]
    torch.testing.assert_close(products[0], products[1], atol=1e-3, rtol=1e-3)


def test_autocast_streams_and_trains() -> None:
    model, x = build(), sequence()
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(x)
        with torch.no_grad(), model.streaming(2):
            streamed = stream(model, x, 3, 12)
    for y in (whole, streamed):
        torch.testing.assert_close(y.float(), wanted, atol=0.1, rtol=0.1)


def test_half_precision_caches_in_its_own_dtype() -> None:
    model = build().bfloat16()
    with torch.no_grad(), model.streaming(2):
        y = stream(model, sequence().bfloat16(), 3)
        assert y.dtype == model.layers[0].self_attn.state().held.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3"),
        ({"kv_repeat": 3}, "kv_repeat = 3"),
        ({"norm": "batch"}, "norm = 'batch' is unknown"),
        ({"gating": "relu"}, "gating = 'relu'"),
        ({"positional_embedding": "alibi"}, "'alibi' must be one of"),
        ({"weights_per_step": 2, "gating": "none"}, "weights_per_step needs"),
        ({"weights_per_step": 2, "weights_per_step_schedule": (0,)}, "1 entries for 2 steps"),
        ({"context": 0}, "context = 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
