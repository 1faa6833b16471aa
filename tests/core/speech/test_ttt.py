"""TTT layers: three ways of computing the same, and streams that live as long as they like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.models.speech.ttt import Ttt
from moshi_fl.models.speech.ttt_config import TttConfig
from moshi_fl.models.speech.ttt_rule import gelu, gelu_slope
from tests.support.speeches import Reference, relative, worst

KINDS = ["linear", "mlp"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def layer_of(kind: str, **changes: Any) -> Ttt:
    """A small layer in float64 whose parameters all matter."""
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_heads": 2, "kind": kind, "mini_batch": 4} | changes
    layer = Ttt(TttConfig(**settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def sequence(batch: int = 3, length: int = 23, width: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, width, dtype=torch.float64)


def primal(layer: Ttt, x: Tensor) -> Tensor:
    """The definition: for each token a gradient, and weights of its own, by autograd's gradient."""
    config, K, D = layer.config, layer.config.mini_batch, layer.config.head_dim
    rows = []
    for item in x:
        given = layer.project(item[None], torch.arange(len(item))[None] % K)
        heads = []
        for h in range(config.n_heads):
            gain, shift = layer.ttt_norm_weight[h], layer.ttt_norm_bias[h]
            first = [p[h] for fast in layer.first_weights(1) for p in fast]
            base, total = first, [torch.zeros_like(p) for p in first]
            answers = []
            for t in range(len(item)):
                q, k, target = (part[h, t : t + 1] for part in given[:3])
                leaves = [p.detach().requires_grad_() for p in base]
                z = F.layer_norm(network(leaves, k), (D,), gain, shift, 1e-6)
                gradients = torch.autograd.grad(0.5 * (z - target).square().sum(), leaves)
                eta, tau = given.eta[h, t], layer.causal()[t % K, 0]
                total = [s + eta * g for s, g in zip(total, gradients, strict=True)]
                now = [p - tau * s for p, s in zip(base, total, strict=True)]
                answers.append(q + F.layer_norm(network(now, q), (D,), gain, shift, 1e-6))
                if t % K == K - 1:
                    base = [n.lerp(f, config.forget) for n, f in zip(now, first, strict=True)]
                    total = [torch.zeros_like(p) for p in base]
            heads.append(torch.cat(answers))
        rows.append(torch.cat(heads, dim=1))
    y = layer.post_norm(torch.stack(rows))
    y = gelu(layer.g_proj(x)) * y if config.use_gate else y
    y = layer.o_proj(y)
    return y if config.alpha is None else y * layer.alpha.tanh()


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    x = x @ weights[0] + weights[1]
    return gelu(x) @ weights[2] + weights[3] if len(weights) > 2 else x


@torch.no_grad()
def stream(layer: Ttt, x: Tensor, size: int) -> Tensor:
    with layer.streaming(len(x)):
        return torch.cat([layer(piece) for piece in x.split(size, dim=1)], dim=1)


def test_outputs_and_gradients_are_the_references(kind: str) -> None:
    reference = Reference(f"ttt_{kind}_plain")
    layer = Ttt(TttConfig.from_reference(reference.spec["cfg"], kind))
    layer.load_state_dict(reference.part("w."))
    x = reference["x"].requires_grad_()
    y = layer(x)
    assert worst(y, reference["y"]) <= 1e-5
    y.backward(reference["dy"])
    assert relative(x.grad, reference["dx"]) <= 1e-4
    for name, gradient in reference.part("g.").items():
        assert relative(layer.get_parameter(name).grad, gradient) <= 1e-4, name


@pytest.mark.parametrize("size", [1, 16, 37])
def test_a_stream_ends_with_the_references_weights(kind: str, size: int) -> None:
    reference = Reference(f"ttt_{kind}_plain")
    layer = Ttt(TttConfig.from_reference(reference.spec["cfg"], kind))
    layer.load_state_dict(reference.part("w."))
    with torch.no_grad(), layer.streaming(2):
        pieces = [layer(piece) for piece in reference["x"].split(size, dim=1)]
        state = layer.state()
    assert worst(torch.cat(pieces, dim=1), reference["y_stream"]) <= 1e-5
    for name, weights in reference.part("s.").items():
        assert worst(getattr(state, name), weights) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_gate": True}, {"alpha": 0.3}, {"forget": 0.2}, {"mini_batch": 5}],
    ids=str,
)
def test_three_forms_agree(kind: str, changes: dict[str, Any]) -> None:
    layer, x = layer_of(kind, **changes), sequence()
    with torch.no_grad():
        dual = layer(x)
    # The slope of GELU has constants of seven digits in the reference, and so here.
    assert worst(primal(layer, x), dual) <= (1e-12 if kind == "linear" else 1e-7)
    for size in (1, 2, 4, 7, 23):
        assert worst(stream(layer, x, size), dual) <= 1e-12


def test_a_shared_projection_streams_with_its_convolutions(kind: str) -> None:
    layer, x = layer_of(kind, share_qk=True, use_gate=True), sequence()
    assert not any("k_proj" in name for name in layer.state_dict())
    with torch.no_grad():
        dual = layer(x)
    for size in (1, 2, 7):
        assert worst(stream(layer, x, size), dual) <= 1e-12


def test_the_gradients_are_those_of_the_whole_scan(kind: str) -> None:
    layer = layer_of(kind, d_model=4, n_heads=1, mini_batch=2)
    x = sequence(1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    found = []
    for every in (0, 2):
        layer = layer_of(kind, checkpoint_every=every).train()
        layer(sequence()).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(worst(a, b) <= 1e-12 for a, b in zip(*found, strict=True))


def test_the_slope_of_gelu_is_its_derivative() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    assert worst(gelu_slope(x), slope) <= 1e-8


@pytest.mark.parametrize("share_qk", [False, True])
@torch.no_grad()
def test_streams_of_a_batch_keep_their_own_count(kind: str, share_qk: bool) -> None:
    layer, x = layer_of(kind, share_qk=share_qk), sequence(3, 40)
    whole, taken = layer(x), torch.zeros(3, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    with layer.streaming(3):
        for size in (1, 3, 1, 6, 1, 9, 2, 1, 1, 4):
            active = torch.rand(3, generator=generator) < 0.6
            layer.set_exec_mask(active)
            piece = torch.stack(
                [row[start : start + size] for row, start in zip(x, taken, strict=True)]
            )
            y = layer(torch.where(active[:, None, None], piece, torch.nan_to_num(piece * 1e3)))
            for item in active.nonzero()[:, 0].tolist():
                start = taken[item]
                assert worst(y[item], whole[item, start : start + size]) <= 1e-12
            taken += size * active


@torch.no_grad()
def test_a_reset_item_begins_with_what_was_learnt_and_the_others_go_on(kind: str) -> None:
    layer, x = layer_of(kind), sequence(2, 20)
    whole = layer(x)
    with layer.streaming(2):
        layer(x[:, :9])
        layer.reset_streaming(torch.tensor([True, False]))
        y = layer(torch.stack([x[0, :11], x[1, 9:]]))
    assert worst(y[0], whole[0, :11]) <= 1e-12
    assert worst(y[1], whole[1, 9:]) <= 1e-12


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_sound_that_broke_ends_with_a_reset_and_never_reaches_an_item_that_is_held(
    kind: str, size: int
) -> None:
    layer, x = layer_of(kind), sequence(2, 20)
    whole, broken = layer(x), torch.full((2, size, 16), torch.nan, dtype=x.dtype)
    with layer.streaming(2):
        layer(x[:, :6])
        layer.set_exec_mask(torch.tensor([True, False]))
        layer(broken)
        layer.reset_streaming(torch.tensor([True, False]))
        layer.set_exec_mask(torch.tensor([True, True]))
        y = layer(torch.stack([x[0, :14], x[1, 6:]]))
    assert worst(y[0], whole[0, :14]) <= 1e-12
    assert worst(y[1], whole[1, 6:]) <= 1e-12


@pytest.mark.parametrize("size", [1, 5])
def test_a_stream_keeps_no_graph(kind: str, size: int) -> None:
    layer, x = layer_of(kind, forget=0.1), sequence(2, 20)
    with layer.streaming(2):
        y = torch.cat([layer(piece) for piece in x.split(size, dim=1)], dim=1)
        kept = [*vars(layer.state()).values(), *layer.state().kept]
    assert worst(y, layer(x).detach()) <= 1e-12
    assert not any(value.requires_grad for value in kept if isinstance(value, Tensor))


@torch.no_grad()
def test_a_saved_stream_goes_on_elsewhere(kind: str) -> None:
    layer, other, x = layer_of(kind), layer_of(kind), sequence(2, 20)
    whole = layer(x)
    with layer.streaming(2):
        layer(x[:, :10])
        saved = layer.get_streaming_state()
        layer(x[:, 10:])
    with other.streaming(2):
        other.set_streaming_state(saved)
        assert worst(other(x[:, 10:]), whole[:, 10:]) <= 1e-12


def test_a_layer_made_without_memory_is_whole_once_it_has_weights(kind: str) -> None:
    layer, x = layer_of(kind), sequence()
    with torch.device("meta"):
        other = Ttt(layer.config)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))


def test_fast_weights_stay_float32_in_a_bfloat16_layer(kind: str) -> None:
    layer, x = layer_of(kind).bfloat16(), sequence().bfloat16()
    with torch.no_grad(), layer.streaming(3):
        y = layer(x)
        state = layer.state()
    assert y.dtype == torch.bfloat16
    assert state.W1.dtype == state.rates.dtype == layer.turns.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :4], y[:, :4])


@pytest.mark.parametrize("forget", [0.0, 0.01])
@torch.no_grad()
def test_an_hour_stays_bounded(kind: str, forget: float) -> None:
    torch.manual_seed(0)
    layer = Ttt(TttConfig(16, 2, kind=kind, forget=forget))
    layer.load_state_dict({n: p + 0.1 * torch.randn_like(p) for n, p in layer.named_parameters()})
    norms = []
    with layer.streaming(1):
        for _ in range(90):  # of 500 frames: an hour at 12.5 Hz
            y = layer(torch.randn(1, 500, 16))
            assert torch.isfinite(y).all()
            norms.append(layer.state().W1.norm().item())
    # Plain TTT grows for as long as it reads, ever more slowly; one that forgets arrives.
    assert norms[-1] <= 30 * norms[0]
    if forget:
        assert max(norms[45:]) <= 1.1 * max(norms[5:45])


@pytest.mark.parametrize(
    "changes",
    [{"kind": "cubic"}, {"n_heads": 3}, {"mini_batch": 0}, {"forget": 1.0}, {"n_heads": 16}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TttConfig(**{"d_model": 16, "n_heads": 2} | changes)
