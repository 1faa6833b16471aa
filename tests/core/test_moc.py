"""MoC against the reference's numbers, and what it promises beyond them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import extract_weights, load_weights, settings_from
from moshi_fl.models.moc import Moc
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_decode import MocDecoder
from moshi_fl.models.moc_experts import Expert, padded, plan, ragged
from moshi_fl.models.moc_mixture import Conversation
from moshi_fl.models.moc_talk import talk
from moshi_fl.weights import open_weights, read_header
from tests.support.mocs import TINY, gradients, model_of, random_tokens

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = ["base", "drops", "gqa2", "irl2", "mediator_off", "simple"]


class Reference:
    """One fixture: configuration, weights, inputs and what the reference made of them."""

    def __init__(self, name: str) -> None:
        path = FIXTURES / f"moc_{name}.safetensors"
        self.spec = json.loads(read_header(path).metadata["spec"])
        self.arrays = open_weights(path)

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def tokens(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name], dtype=torch.long)

    def model(self, **changes: Any) -> Moc:
        model = Moc(replace(MocConfig.from_reference(self.spec["cfg"]), **changes))
        load_weights(model, self.part("w/"))
        return model


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def test_training_is_the_references(reference: Reference) -> None:
    model = reference.model(grad_ckpt_policy="none").train()
    out = model(reference.tokens("in/idx"), reference.tokens("in/targets"))
    wanted = torch.tensor(reference.arrays["out/logits"])
    assert (out.logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    for name in ("total", "main", "aux"):
        ours, theirs = getattr(out.loss, name).item(), reference.arrays[f"out/{name}"].item()
        assert abs(ours - theirs) <= 2e-6, name
    for layer, chosen in enumerate(out.experts):
        assert np.array_equal(chosen.numpy(), reference.arrays[f"out/experts{layer}"])
    dropped = sum(reference.spec["dropped_per_layer"]) / chosen.numel() / len(out.experts)
    assert model.statistics()["drop_fraction"] == pytest.approx(dropped, abs=1e-6)


def test_gradients_are_the_references(reference: Reference) -> None:
    model = reference.model()
    found = gradients(model, reference.tokens("in/idx"), reference.tokens("in/targets"))
    wanted = reference.part("g/")
    assert set(wanted) <= set(found)
    for name, gradient in wanted.items():
        worst = np.abs(found[name].numpy() - gradient).max()
        assert worst <= 2e-4, name
    for name in set(found) - set(wanted):  # the reference leaves these without a gradient
        assert not found[name].any(), name


def test_inference_is_the_references_where_nothing_is_dropped(reference: Reference) -> None:
    model = reference.model().eval()
    with torch.no_grad():
        logits = model(reference.tokens("in/idx"), reference.tokens("in/targets")).logits
    wanted = torch.tensor(reference.arrays["out/eval_logits"])
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# Where pairs are dropped, each step amplifies the last bits threefold: float64 differs as well.
@pytest.mark.parametrize(
    ("name", "steps", "tolerance"), [("base", 6, 1e-5), ("drops", 3, 1e-3), ("simple", 6, 1e-5)]
)
def test_some_steps_of_training_follow_the_references_losses(
    name: str, steps: int, tolerance: float
) -> None:
    reference = Reference(name)
    model, run = reference.model(), reference.spec["traj"]
    groups = []
    for key, parameter in model.named_parameters():
        group = model.parameter_group(key)
        rate, decay = run["lr"] * group.learning_rate_scale, run["weight_decay"] * group.decays
        assert [rate, decay] == run["groups"][key]
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=run["betas"])
    for step in range(steps):
        idx, targets = (reference.tokens(f"traj/{part}")[step] for part in ("idx", "targets"))
        loss = model(idx, targets).loss.total
        assert abs(loss.item() - reference.arrays["traj/losses"][step]) <= tolerance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip"])
        optimizer.step()


def test_the_references_names_load_and_save(reference: Reference) -> None:
    model = Moc(MocConfig.from_reference(reference.spec["cfg"]))
    given = {name: torch.tensor(value) for name, value in reference.part("w/").items()}
    model.load_state_dict(given)
    dead = model.computed_tensors
    assert set(model.state_dict()) == {name for name in given if name not in dead} | {
        "lm_head.weight"
    }
    assert set(extract_weights(model)) == {name for name in given if name not in dead}
    assert not any("q_proj" in name or "msg_proj" in name for name in model.state_dict())
    again = Moc(MocConfig.from_reference(reference.spec["cfg"]))
    again.load_state_dict(model.state_dict())
    assert all(
        torch.equal(again.state_dict()[name], value)
        for name, value in given.items()
        if name not in dead
    )


@pytest.mark.parametrize("policy", ["ffn", "block"])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(policy: str) -> None:
    idx, targets = random_tokens(3, 20), random_tokens(3, 20, seed=2)
    found = []
    for kind in ("none", policy):
        config = replace(
            TINY, grad_ckpt_policy=kind, router_noise_std=0.5, dropout=0.1, moc_collab_dropout=0.1
        )
        model = model_of(config).train()
        torch.manual_seed(7)
        found.append(gradients(model, idx, targets))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("capacity", [0, 3, 1000])
def test_both_ways_to_the_experts_give_the_same(capacity: int) -> None:
    torch.manual_seed(0)
    experts = [Expert(replace(TINY, d_model=8, n_heads=2)) for _ in range(4)]
    x = torch.randn(11, 8)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(11)])
    chosen[3] = 4  # a row that nobody reads
    table = plan(chosen, torch.randn(11, 2), 4, capacity)
    results = []
    for way in (ragged, padded):
        rows = x.clone().requires_grad_()
        for expert in experts:
            expert.zero_grad()
        slots = way(experts, rows, table)
        (slots * torch.arange(1, 9)).sum().backward()
        weights = [p.grad for e in experts for p in e.parameters()]
        results.append([slots, rows.grad, *weights])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    slots, kept = results[0][0], table.kept_slots
    assert not slots[~kept].any()
    for row, choice in kept.nonzero().tolist():
        wanted = experts[chosen[row, choice]](x[row])
        assert torch.allclose(slots[row, choice], wanted, atol=1e-5)
    assert table.counts.tolist() == torch.bincount(chosen[chosen < 4], minlength=4).tolist()


def test_an_expert_without_room_keeps_the_most_wanted() -> None:
    wanted = torch.tensor([[0.1], [0.9], [0.5], [0.7]])
    table = plan(torch.zeros(4, 1, dtype=torch.long), wanted, 2, 2)
    assert table.kept_slots.flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("masked", [False, True])
def test_the_quick_way_of_talking_is_the_plain_one(masked: bool) -> None:
    torch.manual_seed(0)
    conversation = Conversation(replace(TINY, save_attn_weights=True))
    qkv = torch.randn(300, 3, 96)  # more than a block
    heard = torch.rand(300, 3) < 0.5 if masked else None
    results = []
    for way in (lambda x: talk(x, 4, heard), lambda x: conversation._talk(x, heard)):
        x = qkv.clone().requires_grad_()
        y = way(x)
        (y * torch.arange(32)).sum().backward()
        results.append((y, x.grad))
    for quick, plain in zip(*results, strict=True):
        assert torch.allclose(quick, plain, atol=1e-4)
        assert quick.any()


def test_the_experts_own_backward_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    config = replace(TINY, d_model=8, n_heads=2, n_reasoning_steps=3)
    experts = [Expert(config).double() for _ in range(3)]
    weights = [p for e in experts for p in e.parameters()]
    table = plan(torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]]), torch.randn(4, 2), 3, 3)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ragged(experts, x, table), (x, *weights))


@pytest.mark.parametrize("collab", ["none", "simple", "moc"])
@pytest.mark.parametrize("mediator", [True, False])
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12], [20], [3, 17]])
def test_cached_reading_gives_the_logits_of_reading_at_once(
    collab: str, mediator: bool, chunks: list[int]
) -> None:
    model = model_of(replace(TINY, collab=collab, moc_use_mediator=mediator)).eval()
    idx = random_tokens(3, 20)
    with torch.no_grad():
        wanted = model(idx, idx).logits
        past, start = None, 0
        for size in chunks:
            out = model(idx[:, start : start + size], past_key_values=past)
            past, start = out.present, start + size
            assert torch.allclose(out.logits[:, 0], wanted[:, start - 1], atol=1e-5)
    assert past[0][0].shape == (3, 2, 20, 8)  # (B, n_kv_heads, L, head_dim)


@pytest.mark.parametrize("n_experts", [0, 1, 4])
def test_every_number_of_experts_trains(n_experts: int) -> None:
    model = model_of(replace(TINY, n_experts=n_experts, top_k=1), gain=1.0)
    idx = random_tokens(2, 16)
    before = model(idx, idx).loss.total.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(idx, idx).loss.total.backward()
        optimizer.step()
    assert model(idx, idx).loss.total.item() < before - 0.1


def test_no_rounds_of_conversation_is_a_choice() -> None:
    model = model_of(replace(TINY, moc_collab_steps=0))
    assert not any("collab_" in name for name in model.state_dict())
    found = gradients(model, random_tokens(2, 8), random_tokens(2, 8))
    assert all(gradient.any() for name, gradient in found.items() if "experts" not in name)


def test_the_seeds_model_has_the_size_that_is_told_of_it() -> None:
    seed = MocConfig.from_reference(
        {
            "d_model": 1024,
            "n_layers": 20,
            "n_heads": 16,
            "n_kv_heads": 4,
            "vocab_size": 50304,
            "n_reasoning_steps": 2,
            "dropout": "5e-2",
            "use_gradient_checkpointing": True,
            "use_simple_collab": False,
            "use_moc_collab": True,
        }
    )
    with torch.device("meta"):
        model = Moc(seed)
    dead = 3 * 1024**2 * 20
    assert sum(p.numel() for p in model.parameters()) == 1_698_145_300 - dead
    assert abs(model.active_parameters() + dead - 660e6) < 1e6
    assert seed.dropout == 0.05


def test_numbers_that_yaml_leaves_as_text_are_read() -> None:
    config = MocConfig.from_reference({"rope_theta": "1e6", "max_seq_len": "1e3", "d_model": 768})
    assert config.rope_theta == 1e6
    assert config.max_seq_len == 1000


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"n_head": 4}, "unknown key 'n_head'; did you mean 'n_heads'"),
        ({"rope_theta": "much"}, "rope_theta = 'much' is not a number"),
        ({"use_simple_collab": True}, "contradict each other"),
        ({"use_moc_collab": False}, "contradict each other"),
        ({"grad_ckpt_policy": "layer"}, "grad_ckpt_policy = 'layer' must be one of"),
        ({"top_k": 9}, "top_k = 9 must be at most n_experts = 8"),
    ],
)
def test_reference_settings_that_cannot_be_meant_are_refused(
    table: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MocConfig.from_reference(table)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", 100),
        ("n_heads", 5),
        ("n_kv_heads", 5),
        ("n_kv_heads", 0),
        ("n_experts", -1),
        ("top_k", 0),
        ("top_k", 9),
        ("moc_collab_heads", 7),
        ("moc_collab_steps", -1),
        ("n_reasoning_steps", 0),
        ("capacity_factor", float("nan")),
        ("capacity_factor", -1.0),
        ("capacity_rounding", "up"),
        ("rope_theta", 0),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("collab", "full"),
        ("moc_use_mediator", 1),
        ("max_seq_len", True),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        settings_from(MocConfig, {key: value}, name="[model]")


@pytest.mark.parametrize(
    ("tokens", "factor", "rounding", "capacity"),
    [
        (1024, 1.0, "pow2", 256),
        (1024, 1.25, "pow2", 512),
        (1024, 1.25, "none", 320),
        (3, 1.0, "none", 1),
        (1024, 0.0, "pow2", 0),
    ],
)
def test_capacity(tokens: int, factor: float, rounding: Any, capacity: int) -> None:
    config = replace(TINY, n_experts=8, capacity_factor=factor, capacity_rounding=rounding)
    assert config.capacity(tokens) == capacity


def test_flops_grow_as_the_model_is_asked_to_think() -> None:
    flops: Callable[..., int] = lambda **changes: Moc(replace(TINY, **changes)).flops_per_token()  # noqa: E731
    assert flops(n_reasoning_steps=3) > flops(n_reasoning_steps=2) > flops(n_reasoning_steps=1)
    assert flops(moc_collab_steps=3) > flops() > flops(collab="simple") > flops(n_experts=0)


def test_eight_bit_weights_decode_nearly_the_same() -> None:
    config = replace(TINY, d_model=128, n_experts=8, max_seq_len=64)
    model = model_of(config, gain=2.0).eval()
    idx = random_tokens(1, 40)
    exact, rounded = MocDecoder(model), MocDecoder(model, storage="int8")
    assert torch.equal(exact.restart(idx[:, :8]), rounded.restart(idx[:, :8]))
    errors = []
    for t in range(8, 40):
        wanted, found = exact.step(idx[:, t]), rounded.step(idx[:, t])
        errors.append((found - wanted).norm() / wanted.norm())
    assert 0 < sorted(errors)[16] < 0.05  # now and then a rounding sends a token elsewhere
