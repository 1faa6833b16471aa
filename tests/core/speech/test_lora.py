"""Low-rank adapters: the reference's file, what trains, and what fusing does."""

from __future__ import annotations

import pytest
import torch

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.speech.checkpoints import load_checkpoint, released_state
from moshi_fl.models.speech.generate import LMGen
from moshi_fl.models.speech.lora import add_lora, fuse_lora, load_lora, lora_state
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.sampling import Sampling
from tests.support.speeches import Reference, codes_of, lm_of, tiny, worst


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference("lm_small")


def test_an_adapter_file_does_what_it_does_in_the_reference(reference: Reference) -> None:
    model = reference.lm()
    add_lora(model, rank=4)
    load_lora(model, reference.part("l."))
    out = model(reference["codes"])
    assert worst(out.logits, reference["lora_logits"], out.mask) <= 5e-5
    assert worst(out.text_logits, reference["lora_text_logits"]) <= 5e-5
    fuse_lora(model)
    fused = model(reference["codes"])
    assert worst(fused.logits, out.logits.detach()) <= 5e-5
    assert set(released_state(model)) == set(reference.part("w."))


def test_a_plain_checkpoint_loads_under_the_adapters(reference: Reference) -> None:
    model, plain = reference.lm(), reference.lm()
    add_lora(model, rank=2)
    load_checkpoint(model, reference.part("w.") | lora_state(model))
    codes = reference["codes"]
    assert torch.equal(model(codes).logits, plain(codes).logits)


def test_only_adapters_train_and_only_they_are_saved() -> None:
    config = tiny()
    model, codes = lm_of(config), codes_of(config)
    add_lora(model, rank=2, scaling=1.0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(lora_state(model))
    assert all(".lora_" in name for name in trained)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    first = losses(model(codes), codes, config).total
    for _ in range(5):
        optimizer.zero_grad()
        loss = losses(model(codes), codes, config).total
        loss.backward()
        optimizer.step()
    assert loss < first
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == set(trained)


def test_embeddings_train_on_demand() -> None:
    model = lm_of(tiny(depformer_low_rank_embeddings=4))
    add_lora(model, rank=2, embeddings=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert trained == {
        *(f"emb.{i}.weight" for i in range(3)),
        *("text_emb.weight", "depformer_text_emb.weight", "depformer_emb.0.weight"),
    }


def test_an_adapted_model_talks() -> None:
    config = tiny()
    model = lm_of(config)
    add_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.1)
    said = []
    for _ in range(2):
        generator = LMGen(model, Sampling(use_sampling=False))
        with generator.streaming(1):
            said.append([generator.step(torch.zeros(1, 1, 1, dtype=torch.long)) for _ in range(9)])
        fuse_lora(model)
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True) if a is not None)


def test_an_adapter_of_another_rank_or_model_is_refused(reference: Reference) -> None:
    model = reference.lm()
    add_lora(model, rank=8)
    with pytest.raises(CorruptRecord, match="misshapen"):
        load_lora(model, reference.part("l."))
    with pytest.raises(ConfigError, match="already"):
        add_lora(model, rank=8)
    with pytest.raises(ConfigError, match="rank"):
        add_lora(reference.lm(), rank=0)
