"""Released files become the weights of a hub: what goes in comes out, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_fl.errors import ConfigError, CorruptRecord, MoshiError
from moshi_fl.models import get_family
from moshi_fl.models.common import load_weights
from moshi_fl.models.folder import ModelFolder, read_folder, require_weights_of
from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.imported import Choices, import_checkpoint
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.models.speech.model import SpeechModel
from tests.support.mimis import small_mimi
from tests.support.releases import CODEC, MODEL, TEXT, names_of_the_7b, write_release
from tests.support.speeches import codes_of


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def import_with(release: Path, out: Path, **model: object) -> ModelFolder:
    import_checkpoint(release, out, Choices(model=model))
    return read_folder(out)


def module_of(found: ModelFolder) -> SpeechModel:
    assert found.tokenizer is not None
    task = get_family(found.family).load(found.model, found.tokenizer)
    require_weights_of(task, found.weights)
    module = task.build()
    load_weights(module, found.weights)
    assert isinstance(module, SpeechModel)
    return module.eval()


def released_module(release: Path) -> LMModel:
    config = LMConfig.from_kyutai(json.loads((release / "config.json").read_text()))
    model = LMModel(config)
    load_checkpoint(model, load_file(release / MODEL))
    return model.eval()


def test_the_small_release_has_the_names_of_the_7b(release: Path) -> None:
    assert set(load_file(release / MODEL)) == names_of_the_7b(3, 2)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_imported_model_predicts_what_the_released_one_does(
    release: Path, tmp_path: Path, rank: int
) -> None:
    found = import_with(release, tmp_path / "out", lora_rank=rank)
    module, reference = module_of(found), released_module(release)
    codes = codes_of(reference.config, length=6)
    with torch.no_grad():
        ours, theirs = module(codes), reference(codes)
    assert torch.equal(ours.text_logits, theirs.text_logits)
    assert torch.equal(ours.logits, theirs.logits)
    sound = torch.randn(1, 1, 5 * 1920) / 10
    mimi = small_mimi()
    assert torch.equal(module.mimi.encode(sound), mimi.encode(sound))
    assert found.recipe["training"]["trains"] == ("lora" if rank else "all")
    assert found.tokenizer == (release / TEXT).read_bytes()


def test_bfloat16_is_widened_and_not_rounded(release: Path, tmp_path: Path) -> None:
    found = import_with(release, tmp_path / "out", lora_rank=0)
    released = load_file(release / MODEL)
    stacked = released["depformer.layers.1.self_attn.out_proj.weight"]
    assert stacked.dtype == torch.bfloat16
    parts = [
        found.weights[f"lm.depformer.layers.1.self_attn.out_projs.{step}.weight"]
        for step in range(8)
    ]
    assert np.array_equal(np.concatenate(parts), stacked.float().numpy())
    assert all(array.dtype == np.float32 for array in found.weights.values())


def test_importing_twice_gives_the_same_bytes(release: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_with(release, tmp_path / name, lora_rank=2, ttt_layers=1)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("mode", ["gated", "replace", "parallel"])
def test_top_layers_become_ttt_with_attentions_projections(
    release: Path, tmp_path: Path, mode: str
) -> None:
    found = import_with(release, tmp_path / "out", lora_rank=0, ttt_layers=1, ttt_mode=mode)
    base = "lm.transformer.layers.2.self_attn."
    stacked = load_file(release / MODEL)["transformer.layers.2.self_attn.in_proj_weight"]
    rows = [found.weights[f"{base}ttt.{kind}_proj.weight"] for kind in "qkv"]
    assert np.array_equal(np.concatenate(rows), stacked.float().numpy())
    assert (f"{base}in_projs.0.weight" in found.weights) == (mode == "parallel")
    module_of(found)


def test_adapters_named_by_the_configuration_are_taken(tmp_path: Path) -> None:
    release = write_release(
        tmp_path / "release", lora=True, lora_rank=2, lora_scaling=3.0, lora_name="lora.safetensors"
    )
    plain = import_with(
        release_without_adapters(release, tmp_path), tmp_path / "plain", lora_rank=2
    )
    adapters = {
        name.removeprefix("lm."): torch.full(array.shape, 0.25)
        for name, array in plain.weights.items()
        if ".lora_" in name
    }
    save_file(adapters, release / "lora.safetensors")
    found = import_with(release, tmp_path / "out")
    assert found.model["lora_scaling"] == 3.0
    taken = {name: array for name, array in found.weights.items() if ".lora_" in name}
    assert len(taken) == len(adapters)
    assert all((array == 0.25).all() for array in taken.values())


def release_without_adapters(release: Path, tmp_path: Path) -> Path:
    other = write_release(tmp_path / "other")
    (other / MODEL).write_bytes((release / MODEL).read_bytes())
    return other


def test_a_preset_takes_the_codec_and_a_new_language_model(release: Path, tmp_path: Path) -> None:
    sizes = {"card": 64, "n_q": 16, "dep_q": 8, "dim": 32, "depformer_dim": 16}
    choices = Choices(preset="tiny", model={**sizes, "delays": [0] * 17, "text_card": 512})
    import_checkpoint(release, tmp_path / "out", choices)
    module = module_of(read_folder(tmp_path / "out"))
    sound = torch.randn(1, 1, 5 * 1920) / 10
    assert torch.equal(module.mimi.encode(sound), small_mimi().encode(sound))
    assert module.config.lm.dim == 32


def test_keys_that_do_not_fit_are_listed_by_kind(release: Path, tmp_path: Path) -> None:
    tensors = load_file(release / MODEL)
    gone = [name for name in tensors if name.startswith("linears.")]
    tensors = {name: value for name, value in tensors.items() if name not in gone}
    tensors["out_norm.alpha"] = torch.zeros(1, 1, 3, dtype=torch.bfloat16)
    tensors["condition.weight"] = torch.zeros(1)
    save_file(tensors, release / MODEL)
    with pytest.raises(CorruptRecord) as caught:
        import_with(release, tmp_path / "out")
    message = str(caught.value)
    assert "8 missing: linears.0.weight, linears.1.weight" in message
    assert "1 unknown: condition.weight" in message
    assert "1 misshapen: out_norm.alpha [1, 1, 3] instead of [1, 1, 64]" in message
    assert not (tmp_path / "out").exists()


def _truncate(release: Path) -> None:
    data = (release / MODEL).read_bytes()
    (release / MODEL).write_bytes(data[:-100])


def _quantise(release: Path) -> None:
    tensors = load_file(release / MODEL)
    tensors["text_linear.weight"] = tensors["text_linear.weight"].to(torch.int8)
    save_file(tensors, release / MODEL)


def _poison(release: Path) -> None:
    tensors = load_file(release / MODEL)
    tensors["text_emb.weight"][3, 1] = torch.nan
    save_file(tensors, release / MODEL)


def _lose_codec(release: Path) -> None:
    (release / CODEC).unlink()


def _two_codecs(release: Path) -> None:
    (release / "tokenizer-other.safetensors").write_bytes(b"")


def _change(release: Path, **changes: object) -> None:
    table = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**table, **changes}))


def _change_mimi(release: Path, **changes: object) -> None:
    table = json.loads((release / "mimi.json").read_text())
    (release / "mimi.json").write_text(json.dumps({**table, **changes}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda r: _change(r, dimm=3), "config.json: unknown key 'dimm'; did you mean 'dim'"),
        (lambda r: _change(r, num_heads=3), "config.json: num_heads = 3 must divide dim = 64."),
        (lambda r: _change(r, delays=5), "config.json: delays = 5 must hold n_q + 1 = 17"),
        (lambda r: _change(r, layer_scale="a"), "config.json: layer_scale = 'a' must be a number"),
        (lambda r: _change(r, card=65), "config.json: card = 65 must be the codec's 64 bins"),
        (lambda r: _change(r, text_card=9), "config.json: the tokenizer has 512 tokens"),
        (lambda r: _change(r, existing_text_padding_id=600), "whole number from 0 to 512"),
        (lambda r: _change_mimi(r, seanet=3), "mimi.json: seanet = 3 must be a table"),
        (lambda r: _change_mimi(r, sample_rate="a"), "mimi.json: Mimi: sample_rate = 'a' must be"),
        (lambda r: _change_mimi(r, quantizer={"n_q": 0}), "mimi.json: quantizer: n_q = 0 must"),
        (lambda r: (r / "mimi.json").write_text("{}"), "mimi.json: 'sample_rate' is missing"),
        (lambda r: _change(r, mimi_name="none"), "config.json: mimi_name names Mimi's weights"),
    ],
)
def test_a_wrong_configuration_names_its_file_and_key(
    release: Path, tmp_path: Path, harm: object, said: str
) -> None:
    harm(release)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        import_with(release, tmp_path / "out")
    assert str(caught.value).startswith(str(release))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_truncate, "bytes of data where the header describes"),
        (_quantise, "'text_linear.weight' is I8; weights are BF16, F16, F32"),
        (_poison, "lm.text_emb.weight holds a number that is not finite"),
        (_lose_codec, "Mimi's weights should be one file tokenizer-*.safetensors; there is none"),
        (_two_codecs, "should be one file tokenizer-*.safetensors; there is tokenizer-"),
        (lambda r: (r / TEXT).write_bytes(b"no"), "not a SentencePiece model"),
        (lambda r: (r / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda r: _change(r, num_layers=4), "6 missing: transformer.layers.3."),
        (lambda r: _change(r, dim=128), "misshapen"),
        (lambda r: _change(r, fuser={"sum": []}), "fuser"),
        (lambda r: _change(r, moshi_name="../model.safetensors"), "must name a file beside it"),
        (lambda r: _change(r, mimi_name="none.safetensors"), "does not exist"),
    ],
)
def test_what_cannot_be_imported_is_one_clear_error(
    release: Path, tmp_path: Path, harm: object, said: str
) -> None:
    harm(release)  # type: ignore[operator]
    with pytest.raises(MoshiError) as caught:
        import_with(release, tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out" / MODEL).exists()


def test_a_folder_in_use_is_not_written_to(release: Path) -> None:
    with pytest.raises(ConfigError, match="already exists"):
        import_with(release, release)


def test_weights_of_another_model_are_no_beginning(release: Path, tmp_path: Path) -> None:
    found = import_with(release, tmp_path / "out", lora_rank=2)
    assert found.tokenizer is not None
    other = get_family("speech").load({**found.model, "lora_rank": 3}, found.tokenizer)
    with pytest.raises(
        CorruptRecord, match=r"lora_A.weight is float32 \[2, .*; and \d+ more"
    ) as caught:
        require_weights_of(other, found.weights)
    assert "--set" in caught.value.hint
    assert len(str(caught.value)) < 500, "three of hundreds tell the story"
