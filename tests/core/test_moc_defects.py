"""What users of the MoC reference suffered, one test each; numbers are those of its list (M1-M24).

Of the trainer's part, M13, M16 and what YAML leaves as text have more tests in ``train/`` and
``test_shards.py``.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from moshi_fl.errors import ConfigError
from moshi_fl.models.moc import IGNORED, Moc
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_decode import MocDecoder
from moshi_fl.models.moc_layers import Rotary
from moshi_fl.models.moc_mixture import Mixture
from moshi_fl.shards import TokenShards
from moshi_fl.train.engine import Engine
from moshi_fl.train.recipe import Recipe
from tests.support.mocs import TINY, gradients, model_of, random_tokens


def logits_of(model: Moc, idx: Tensor) -> Tensor:
    with torch.no_grad():
        return model(idx, idx).logits


def engine_of(model: Moc, **recipe: object) -> Engine:
    settings = {"steps": 50, "learning_rate": 3e-4, "schedule": "cosine", **recipe}
    return Engine(
        model,
        lambda module, batch: (module(batch[:, :-1], batch[:, 1:]).loss.total, batch.numel()),
        Recipe(**settings),  # type: ignore[arg-type]
    )


def test_m1_grouped_queries_run_and_train() -> None:
    for heads in (1, 2, 4):
        found = gradients(model_of(replace(TINY, n_kv_heads=heads)), *[random_tokens(2, 16)] * 2)
        assert all(found[name].any() for name in found if "wqkv" in name)


@pytest.mark.parametrize("convert", [lambda m: m, lambda m: m.bfloat16(), lambda m: m.half()])
def test_m2_positions_are_rotations_whatever_the_model_is_converted_to(convert) -> None:  # type: ignore[no-untyped-def]
    rotary: Rotary = convert(model_of()).rotary
    x = torch.randn(1, 1, 1, 8).expand(1, 32, 1, 8)
    turned = rotary(x, 0)[0, :, 0]  # (T, D)
    assert torch.allclose(turned.norm(dim=-1), x[0, 0, 0].norm().expand(32), atol=1e-5)
    scores = turned @ turned.T
    for offset in (1, 7, 20):  # equal distances, equal scores
        diagonal = scores.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-4)


def test_m3_greedy_decoding_with_a_cache_says_what_it_says_without() -> None:
    model = model_of().eval()
    idx, decoder = random_tokens(1, 4), MocDecoder(model)
    logits = decoder.restart(idx)
    for _ in range(20):
        wanted = logits_of(model, idx)[:, -1]
        assert torch.allclose(logits, wanted, atol=1e-5)
        token = logits.argmax(-1)
        idx = torch.cat([idx, token[:, None]], dim=1)
        logits = decoder.step(token)


def test_m4_what_others_in_the_batch_say_changes_nothing() -> None:
    model = model_of().eval()
    mine, others = random_tokens(1, 24), random_tokens(15, 24, seed=2)
    together = logits_of(model, torch.cat([mine, others]))[:1]
    assert torch.allclose(together, logits_of(model, mine), atol=1e-5)


def test_m4_what_comes_later_changes_nothing() -> None:
    model = model_of().eval()
    idx = random_tokens(2, 24)
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    assert torch.allclose(
        logits_of(model, idx)[:, :12], logits_of(model, changed)[:, :12], atol=1e-5
    )


def test_m4_sequences_decoded_side_by_side_are_those_decoded_alone() -> None:
    model = model_of().eval()
    idx = random_tokens(16, 20)
    together = MocDecoder(model, batch=16)
    found = [together.restart(idx[:, :8]), *(together.step(idx[:, t]) for t in range(8, 20))]
    wanted = logits_of(model, idx)
    for t, logits in enumerate(found, 7):
        assert torch.allclose(logits, wanted[:, t], atol=1e-5)


def test_m5_the_capacity_factor_can_mean_what_it_says() -> None:
    exact = replace(TINY, capacity_rounding="none")
    assert [replace(exact, capacity_factor=f).capacity(1024) for f in (1.0, 1.25, 2.0)] == [
        *(512, 640, 1024)
    ]


def test_m6_dropout_trains_on_any_device() -> None:
    config = replace(TINY, dropout=0.2, moc_collab_dropout=0.2, capacity_factor=0.5)
    idx = random_tokens(2, 16)
    found = gradients(model_of(config).train(), idx, idx)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("factor", [0.0, 0.2])
@pytest.mark.parametrize("mediator", [True, False])
def test_m7_tokens_that_no_expert_took_are_no_nan(factor: float, mediator: bool) -> None:
    config = replace(
        TINY, capacity_factor=factor, moc_use_mediator=mediator, save_attn_weights=True
    )
    idx = random_tokens(3, 20)
    model = model_of(config).train()
    found = gradients(model, idx, idx)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert logits_of(model, idx).isfinite().all()
    assert model.statistics()["drop_fraction"] > 0.5


def test_m8_the_router_chooses_in_float32_under_autocast() -> None:
    mixture = model_of().transformer["h"][0].feed_forward
    assert isinstance(mixture, Mixture)
    rows = torch.randn(64, 32)
    exact = mixture._route(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixture._route(rows), exact)


def test_m8_the_router_stays_exact_while_all_else_trains_in_bfloat16() -> None:
    model = model_of(gain=1.0)
    engine = engine_of(model, precision="bf16")
    gate = "transformer.h.0.feed_forward.gate.weight"
    with engine.active():
        before = model.get_parameter(gate).clone()
        assert model.get_parameter("transformer.wte.weight").dtype == torch.bfloat16
        engine.step(0, [random_tokens(2, 17)])
        assert model.get_parameter(gate).dtype == torch.float32
        assert torch.equal(model.get_parameter(gate), engine.weights[gate])
        assert not torch.equal(model.get_parameter(gate), before)


def test_m8_a_bfloat16_model_runs_without_autocast() -> None:
    model, idx = model_of(gain=1.0).eval(), random_tokens(2, 16)
    exact = logits_of(model, idx)
    rounded = logits_of(model.bfloat16(), idx)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_autocast_trains_close_to_float32() -> None:
    model, idx = model_of(gain=1.0).train(), random_tokens(2, 16)
    exact = gradients(model, idx, idx)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx).loss.total
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        wanted = exact[name]
        if wanted.norm() > 1e-3:
            assert (parameter.grad - wanted).norm() < 0.2 * wanted.norm(), name


def test_m9_the_drop_penalty_is_told_to_be_a_constant_and_is_one() -> None:
    idx = random_tokens(3, 20)
    found = []
    for weight in (0.0, 100.0):
        model = model_of(replace(TINY, drop_penalty_weight=weight, capacity_factor=0.5))
        found.append((model(idx, idx).loss.total.item(), gradients(model, idx, idx)))
    (loss, plain), (higher, same) = found
    assert higher > loss + 1
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize("collab", ["none", "simple", "moc"])
def test_m10_every_parameter_gets_a_gradient_so_that_processes_can_add_them_up(collab: str) -> None:
    config = replace(TINY, n_experts=16, top_k=1, collab=collab)  # most experts read nothing
    model, idx = model_of(config), random_tokens(1, 4)
    model(idx, idx).loss.total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_m11_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model, idx = model_of(replace(TINY, n_experts=16, top_k=1)), random_tokens(1, 4)
    found = gradients(model, idx, idx)
    idle = [name for name, g in found.items() if ".experts." in name and not g.any()]
    assert len(idle) >= 2 * (16 - 4)


def test_m12_the_router_keeps_half_the_rate_while_the_schedule_moves() -> None:
    engine = engine_of(model_of(), warmup_steps=2, weight_decay=0.0, gradient_clip=1e9)
    with engine.active():
        for step in range(3):
            before = {name: w.clone() for name, w in engine.weights.items()}
            engine.step(step, [random_tokens(2, 17, seed=step)])
            rate = engine.settle()[0].learning_rate
            moved = {name: (engine.weights[name] - w).abs().max() for name, w in before.items()}
            gate, other = "transformer.h.0.feed_forward.gate.weight", "transformer.wte.weight"
            assert moved[gate] <= 0.5 * rate * 1.6  # Adam moves by about the rate
            assert moved[other] > 0.9 * rate


def test_m13_a_compiled_model_saves_names_that_load() -> None:
    model = model_of()
    model.compile(backend="eager")
    assert not any("_orig_mod" in name for name in model.state_dict())
    model_of(seed=1).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "table",
    [
        {"use_moc_collab": False},
        {"use_simple_collab": True},
        {"grad_ckpt_policy": "fnn"},
        {"top_k": 9, "n_experts": 8},
    ],
)
def test_m14_settings_that_would_be_ignored_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MocConfig.from_reference(table)


def test_m15_bfloat16_training_moves_gains_and_moves_at_the_end_of_the_schedule() -> None:
    model = model_of(gain=1.0)
    engine = engine_of(model, precision="bf16", weight_decay=0.1)
    with engine.active():
        for step in range(4):
            engine.step(step, [random_tokens(2, 17, seed=step)])
        gains = [w for name, w in engine.weights.items() if "norm" in name]
        assert all((gain != 1).float().mean() > 0.9 for gain in gains)
        before = {name: w.clone() for name, w in engine.weights.items()}
        engine.step(49, [random_tokens(2, 17)])  # the rate is a hundredth of its peak
        moved = [(engine.weights[name] != w).float().mean() for name, w in before.items()]
    assert torch.stack(moved).mean() > 0.9


def test_m16_a_sample_is_whole_across_any_number_of_shards(tmp_path: Path) -> None:
    tokens = np.arange(32, dtype=np.uint16)
    for number, part in enumerate(np.split(tokens, [10, 12])):  # 10, 2 and 20 tokens
        np.save(tmp_path / f"{number}.npy", part)
    assert TokenShards.open(tmp_path, vocab_size=61).read(8, 9).tolist() == list(range(8, 17))


def test_m17_the_drop_rate_that_is_told_is_the_real_one() -> None:
    model, idx = model_of(replace(TINY, capacity_factor=0.5)).train(), random_tokens(4, 16)
    model(idx, idx)
    layers = [block.feed_forward.last for block in model.blocks]
    capacity = model.config.capacity(64)
    for load in layers:
        sent = (load.use * 128).round()
        dropped = (sent - capacity).clamp_min(0).sum() / 128
        assert load.dropped == pytest.approx(float(dropped), abs=1e-6)


def test_m18_padding_need_not_take_room_in_experts() -> None:
    model = model_of(replace(TINY, route_ignored=False, capacity_factor=0.5)).train()
    idx, targets = random_tokens(3, 20), random_tokens(3, 20, seed=2)
    targets[:, 12:] = IGNORED
    first = model(idx, targets)
    idx[:, 12:] = 7
    second = model(idx, targets)
    assert second.loss.aux.item() == pytest.approx(first.loss.aux.item(), abs=1e-6)
    assert torch.allclose(second.logits[:, :12], first.logits[:, :12], atol=1e-5)


def test_m19_nothing_to_learn_from_is_a_loss_of_zero() -> None:
    idx = random_tokens(2, 8)
    loss = model_of()(idx, torch.full_like(idx, IGNORED)).loss
    assert loss.main == 0
    assert loss.total.isfinite()


def test_m19_no_tokens_or_too_many_are_told() -> None:
    model = model_of().eval()
    with pytest.raises(ValueError, match="no tokens"):
        model(random_tokens(1, 0))
    with pytest.raises(ValueError, match="33 tokens do not fit into max_seq_len = 32"):
        model(random_tokens(1, 33))
    past = model(random_tokens(1, 32)).present
    with pytest.raises(ValueError, match="33 tokens"):
        model(random_tokens(1, 1), past_key_values=past)


def test_m19_a_long_conversation_goes_on_past_the_context() -> None:
    model, idx = model_of().eval(), random_tokens(1, 100)
    decoder = MocDecoder(model)
    decoder.restart(idx[:, :40])  # of a longer prompt the end is read
    assert decoder.length == 32
    logits = [decoder.step(idx[:, t]) for t in range(40, 100)]
    assert torch.stack(logits).isfinite().all()
    # What was forgotten has no say: one layer sees exactly the last 32 tokens.
    single = model_of(replace(TINY, n_layers=1)).eval()
    decoder = MocDecoder(single)
    decoder.restart(idx[:, :40])
    for t in range(40, 100):
        logits_now = decoder.step(idx[:, t])
    assert torch.allclose(logits_now, logits_of(single, idx[:, 68:])[:, -1], atol=1e-4)


def test_m20_a_training_step_is_one_graph_without_breaks() -> None:
    model, idx = model_of(replace(TINY, n_layers=1)).train(), random_tokens(2, 16)
    explained = torch._dynamo.explain(lambda: model(idx, idx).loss.total)()
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


def test_m21_kept_attention_weights_hold_no_graph() -> None:
    model, idx = model_of(replace(TINY, save_attn_weights=True)).train(), random_tokens(2, 8)
    model(idx, idx)
    for block in model.blocks:
        seen = block.feed_forward.collab_attn.seen
        assert not seen.requires_grad
        assert seen.shape == (16, 3, 3)
        assert torch.allclose(seen.sum(-1), torch.ones(16, 3), atol=1e-5)


def test_m22_importing_and_building_say_nothing_and_change_no_global() -> None:
    code = (
        "import torch; before = torch.get_float32_matmul_precision()\n"
        "from moshi_fl.models.moc import Moc; from moshi_fl.models.moc_config import MocConfig\n"
        "Moc(MocConfig(d_model=32, n_heads=4, n_kv_heads=2, n_layers=1, vocab_size=61))\n"
        "assert torch.get_float32_matmul_precision() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_m23_the_seeds_yaml_is_read_as_it_stands() -> None:
    text = "d_model: 32\nn_heads: 4\nn_kv_heads: 2\nrope_theta: 1e6\ndropout: 5e-2\nn_experts: null"
    table = yaml.safe_load(text)
    assert table["rope_theta"] == "1e6"
    config = MocConfig.from_reference(table)
    assert (config.rope_theta, config.dropout, config.n_experts) == (1e6, 0.05, 0)


def test_m24_without_a_mediator_the_mean_is_over_all_choices_as_in_the_reference() -> None:
    config = replace(TINY, moc_use_mediator=False, moc_collab_steps=0, capacity_factor=0.0)
    mixture = model_of(config).transformer["h"][0].feed_forward.train()
    x = torch.randn(1, 5, 32)
    y, _ = mixture(x)  # all dropped: the mean of empty slots
    assert not y.any()
