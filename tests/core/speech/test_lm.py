"""The Moshi language model against the reference's numbers, and what it promises beyond them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moshi_fl.errors import ConfigError, CorruptRecord, DataError
from moshi_fl.models.speech.checkpoints import load_checkpoint, released_state
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.transformer import set_attention_context
from tests.support.speeches import (
    Reference,
    codes_of,
    lm_of,
    not_in_the_repository,
    relative,
    tiny,
    worst,
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference("lm_small")


def test_the_references_own_golden_test() -> None:
    golden = Reference("golden", folder := not_in_the_repository("golden.json"))
    model = LMModel(LMConfig.from_kyutai(golden.spec["cfg"]))
    load_checkpoint(model, load_file(folder / "golden_model.safetensors"))
    out = model(load_file(folder / "golden_codes.safetensors")["codes"])
    wanted = load_file(folder / "golden_out.safetensors")
    assert torch.equal(out.mask, wanted["mask"])
    assert torch.equal(out.text_mask, wanted["text_mask"])
    assert worst(out.logits, wanted["logits"], wanted["mask"]) <= 5e-6
    assert worst(out.text_logits, wanted["text_logits"], wanted["text_mask"]) <= 5e-6


@pytest.mark.parametrize("holes", ["", "_holes"])
def test_the_training_forward_is_the_references(reference: Reference, holes: str) -> None:
    out = reference.lm()(reference[f"codes{holes}"])
    mask = reference[f"fwd{holes}_mask"]
    assert torch.equal(out.mask, mask)
    assert torch.equal(out.text_mask, reference[f"fwd{holes}_text_mask"])
    assert worst(out.logits, reference[f"fwd{holes}_logits"], mask) <= 5e-5
    assert worst(out.text_logits, reference[f"fwd{holes}_text_logits"]) <= 5e-5
    assert torch.isfinite(out.logits).all()


def test_bfloat16_rounds_where_the_reference_does(reference: Reference) -> None:
    model = reference.lm().bfloat16()
    with torch.no_grad():
        out = model(reference["codes"])
    # One rounding of a logit of 15 in bfloat16 is 0.06.
    assert worst(out.logits.float(), reference["bf16_logits"], out.mask) <= 0.07
    assert worst(out.text_logits.float(), reference["bf16_text_logits"]) <= 0.07


def test_loss_and_gradients_are_the_references(reference: Reference) -> None:
    model, codes = reference.lm(), reference["codes_holes"]
    weights = {
        "first_codebook_weight": reference.spec["first_codebook_weight"],
        "text_padding_weight": reference.spec["text_padding_weight"],
    }
    found = losses(model(codes), codes, model.config, **weights)
    assert abs(found.text.item() - reference.spec["text_loss"]) <= 1e-5
    assert abs(found.audio.item() - reference.spec["audio_loss"]) <= 1e-5
    found.total.backward()
    gradients = stacked({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    norms = reference.spec["grad_norms"]
    assert set(gradients) == set(norms)
    assert all(gradients[name].norm().item() == pytest.approx(norms[name], 1e-4) for name in norms)
    for name, gradient in reference.part("grad.").items():
        assert relative(gradients[name], gradient) <= 1e-3, name


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = defaultdict(list)
    for name, tensor in tensors.items():
        whole = re.sub(r"in_projs\.\d+\.weight", "in_proj_weight", name)
        parts[re.sub(r"out_projs\.\d+\.", "out_proj.", whole)].append(tensor)
    return {name: torch.cat(found) for name, found in parts.items()}


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 30])
def test_streams_in_pieces_of_any_size_past_the_rings_wrap(reference: Reference, size: int) -> None:
    model = reference.lm()
    with torch.no_grad(), model.streaming(2):
        pieces = [model.forward_text(piece) for piece in reference["seq"].split(size, dim=2)]
    assert worst(torch.cat([p[0] for p in pieces], 1), reference["stream_out"]) <= 3e-5
    text = torch.cat([p[1] for p in pieces], dim=2)[:, 0]
    assert worst(text, reference["stream_text_logits"].view(text.shape)) <= 3e-5


def test_depth_logits_are_the_references(reference: Reference) -> None:
    hidden, tokens = reference["stream_out"][:, 9:10], reference["dep_prev"][:, :, None]
    with torch.no_grad():
        logits = reference.lm().forward_depth(hidden, tokens)
    assert worst(logits[:, :, 0], reference["dep_logits"]) <= 5e-5


def test_the_released_model_has_the_listed_tensors() -> None:
    listed = Reference("keys").spec["lm_7b"]
    with torch.device("meta"):
        model = LMModel(LMConfig.from_kyutai(listed["cfg"]))
    found = {name: list(value.shape) for name, value in released_state(model).items()}
    assert found == listed["keys"]
    assert sum(p.numel() for p in model.parameters()) == 7_687_729_152


def test_both_forms_of_a_checkpoint_load(reference: Reference) -> None:
    given = reference.part("w.")
    first, second = reference.lm(), reference.lm()
    load_checkpoint(second, first.state_dict())
    saved = released_state(second)
    assert set(saved) == set(given)
    assert all(torch.equal(saved[name], given[name]) for name in given)


def test_a_checkpoint_that_does_not_fit_is_refused_with_what_is_wrong(reference: Reference) -> None:
    given = reference.part("w.")
    given["emb.0.weight"] = given["emb.0.weight"][1:]
    del given["out_norm.alpha"]
    given["stranger"] = torch.zeros(1)
    model = LMModel(LMConfig.from_kyutai(reference.spec["cfg"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CorruptRecord, match=r"out_norm\.alpha") as found:
        load_checkpoint(model, given)
    assert "stranger" in str(found.value)
    assert "emb.0.weight" in str(found.value)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@pytest.mark.parametrize("also", [torch.tensor(1.0), torch.zeros(48, 16)])
def test_a_projection_given_in_both_forms_is_refused(also: Tensor) -> None:
    model = lm_of(tiny())
    stacked = {"transformer.layers.0.self_attn.in_proj_weight": also}
    with pytest.raises(CorruptRecord, match=r"1 unknown: transformer.*in_proj_weight"):
        load_checkpoint(model, model.state_dict() | stacked)


VARIANTS: list[dict[str, Any]] = [
    {"norm": "layer_norm", "gating": "none", "depformer_gating": "silu", "layer_scale": 0.5},
    {"norm_emb": True, "bias_proj": True, "depformer_low_rank_embeddings": 4},
    {"depformer_norm": "rms_norm_f32", "depformer_layer_scale": 0.5},
    {"kv_repeat": 2, "depformer_kv_repeat": 2, "positional_embedding": "sin_rope"},
    {"depformer_weights_per_step": False, "depformer_multi_linear": False},
    {"depformer_weights_per_step_schedule": (0, 0), "depformer_pos_emb": "sin"},
    {"ttt_layers": 2},
    {"ttt_layers": 1, "ttt_mode": "parallel", "ttt_kind": "mlp"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_variant_streams_what_it_reads_at_once(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    model, codes = lm_of(config).double(), codes_of(config)
    with torch.no_grad():
        whole = model.forward_text(codes)[0]
        for size in (1, 4, 7, 30):
            with model.streaming(2):
                pieces = [model.forward_text(piece)[0] for piece in codes.split(size, dim=2)]
            assert worst(torch.cat(pieces, dim=1), whole) <= 1e-6  # rotations are float32


def test_a_new_model_begins_as_the_references() -> None:
    config = tiny(dim=128, depformer_dim=128, bias_proj=True, text_card=999, card=999)
    parameters = dict(lm_of(config).named_parameters())
    temporal = "transformer.layers.0"
    for name in (
        *("emb.0", "text_emb", "depformer_emb.0", "depformer_text_emb", "text_linear", "linears.0"),
        *(f"{temporal}.self_attn.in_projs.0", f"{temporal}.self_attn.out_projs.0"),
        *(f"{temporal}.gating.linear_in", f"{temporal}.gating.linear_out"),
    ):
        weight = parameters[f"{name}.weight"]
        deviations = weight.detach() * weight.shape[1] ** 0.5
        assert deviations.std() == pytest.approx(0.9867, abs=0.02), name  # cut at 3
        assert 2.5 < deviations.abs().max() <= 3.0001, name
    for name in ("depformer_in.0", "depformer.layers.0.self_attn.in_projs.0"):
        assert parameters[f"{name}.weight"].abs().max() <= 128**-0.5, name  # PyTorch's
    assert not parameters["text_linear.bias"].any()
    assert not parameters["linears.1.bias"].any()


def test_the_zero_token_adds_exactly_nothing() -> None:
    model = lm_of(tiny(norm_emb=True, depformer_low_rank_embeddings=4))
    nothing = torch.full((1, 4, 1), -1)
    assert not model.embedded(nothing).any()
    assert not model.depformer_emb[0](nothing).any()


def test_a_delay_longer_than_the_codes_leaves_nothing_to_predict() -> None:
    config = tiny(delays=(0, 0, 9, 1))
    codes = codes_of(config, length=4)
    out = lm_of(config)(codes)
    assert out.mask[:, 0].all()
    assert not out.mask[:, 1].any()
    assert losses(out, codes, config).total.isfinite()


def test_a_loss_of_nothing_is_zero() -> None:
    config = tiny()
    codes = torch.full((1, 4, 5), -1)
    assert losses(lm_of(config)(codes), codes, config).total == 0


@pytest.mark.parametrize("per_step", [True, False])
def test_the_context_can_change_at_run_time(per_step: bool) -> None:
    config = tiny(n_q=4, dep_q=4, delays=(0,) * 5, depformer_weights_per_step=per_step)
    model, codes = lm_of(config), codes_of(config)
    set_attention_context(model, 3)
    short = lm_of(replace(config, context=3))
    with torch.no_grad():
        assert torch.equal(model(codes).logits, short(codes).logits)


def test_a_stream_that_cannot_begin_leaves_none_behind() -> None:
    model = lm_of(tiny(context=None))
    with pytest.raises(ConfigError, match="no bound"):
        model.streaming_forever(1)
    assert not model.is_streaming
    set_attention_context(model, 5)
    with model.streaming(2):
        assert model.transformer.is_streaming


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 3, 5, dtype=torch.long), r"must be \(batch, 4, frames\)"),
        (torch.zeros(1, 4, 0, dtype=torch.long), r"must be \(batch, 4, frames\)"),
        (torch.zeros(1, 4, 5), "whole numbers"),
        (torch.full((1, 4, 5), 21), "code 21 of stream 1 at frame 0"),
        (torch.full((1, 4, 5), -2), "code -2 of stream 0"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lm_of(tiny())(codes)


def kyutai(**changes: Any) -> dict[str, Any]:
    return {"num_layers": 2, "depformer_num_heads": 2, "n_q": 2, "dep_q": 1} | {
        "delays": [0, 0, 1],
        **changes,
    }


def test_defaults_are_the_references() -> None:
    config = LMConfig.from_kyutai(kyutai(layer_scale=0.1, gating="silu", kv_repeat=2))
    depth = config.depth
    assert (depth.gating, depth.kv_repeat, depth.layer_scale) == ("silu", 2, 0.1)
    assert (depth.num_layers, depth.dim_feedforward, depth.context) == (2, 1024, 1)
    assert (config.dim, config.card, config.norm) == (128, 1024, "layer_norm")
    assert LMConfig.from_kyutai(kyutai(layer_scale=0.1, depformer_layer_scale=None)).depth == (
        LMConfig.from_kyutai(kyutai()).depth
    )


def test_the_depth_transformer_has_positions_of_its_own_where_a_release_says_so() -> None:
    inherited = LMConfig.from_kyutai(kyutai(max_period=500, positional_scale=2.0)).depth
    assert (inherited.max_period, inherited.positional_scale) == (500, 2.0)
    own = {"depformer_max_period": 50, "depformer_positional_scale": 0.0}
    depth = LMConfig.from_kyutai(kyutai(max_period=500, positional_scale=2.0, **own)).depth
    assert (depth.max_period, depth.positional_scale) == (50, 0.0)


def test_what_a_release_says_about_other_things_is_passed_over() -> None:
    extra = {"mimi_name": "m", "lora": True, "lora_rank": 8, "fuser": None, "model_id": {}}
    assert LMConfig.from_kyutai(kyutai(**extra)) == LMConfig.from_kyutai(kyutai())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 3}, "num_layer"),
        ({"fuser": {"sum": []}}, "fuser"),
        ({"delays": [0, 0]}, "delays"),
        ({"delays": [0, 0, -1]}, "delays"),
        ({"dep_q": 3}, "dep_q"),
        ({"dep_q": 0}, "dep_q"),
        ({"num_heads": 7}, "num_heads"),
        ({"norm": "batch"}, "norm"),
        ({"context": 0}, "context"),
        ({"causal": False}, "causal"),
        ({"ttt_layers": 3}, "ttt_layers"),
        ({"ttt_forget": 1.0}, "ttt_forget"),
        ({"depformer_weights_per_step_schedule": [0, 1]}, "schedule"),
        ({"bias_proj": 1}, "bias_proj"),
        ({"depformer_max_period": 0}, "depformer_max_period"),
        ({"layer_scale": "small"}, "layer_scale"),
        ({"positional_scale": float("nan")}, "positional_scale"),
        ({"hidden_scale": float("inf")}, "hidden_scale"),
        ({"delays": 1}, "delays"),
        ({"existing_text_padding_id": "pad"}, "existing_text_padding_id"),
        ({"extra_heads_dim": 0}, "extra_heads_dim"),
        ({"ttt_alpha": []}, "ttt_alpha"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LMConfig.from_kyutai(kyutai(**changes))


@pytest.mark.parametrize(
    "changes", [{"x" * 9999: 1}, {"dim": "x" * 9999}, {"layer_scale": "x" * 9999}]
)
def test_a_strangers_setting_is_quoted_in_part(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        LMConfig.from_kyutai(kyutai(**changes))
    assert len(str(refused.value)) < 1000


def test_gains_may_be_whole_numbers() -> None:
    model = lm_of(tiny(layer_scale=1, depformer_layer_scale=0, ttt_layers=1, ttt_alpha=0))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        LMConfig.from_kyutai({"depformer_num_heads": 2})
