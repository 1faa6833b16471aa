"""Conversations: the reference's tokens, items that go their own ways, and hybrids that listen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.speech.checkpoints import load_checkpoint
from moshi_fl.models.speech.depth_decode import DepthDecoder
from moshi_fl.models.speech.eight_bits import EightBitLinear, in_eight_bits
from moshi_fl.models.speech.generate import UNGENERATED, Hooks, LMGen
from moshi_fl.models.speech.mixer import hybrid_weights
from moshi_fl.models.speech.sampling import Sampling
from tests.support.speeches import Reference, codes_of, lm_of, tiny, worst

GREEDY = Sampling(use_sampling=False)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference("lm_small")


def heard(batch: int = 1, frames: int = 1, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, (batch, 1, frames), generator=generator)


def talk(generator: LMGen, user: Tensor) -> Tensor:
    """All that is said, (B, dep_q + 1, frames); ``UNGENERATED`` where nothing is."""
    nothing = torch.full((len(user), generator.first_heard, 1), UNGENERATED)
    steps = [generator.step(frame) for frame in user.split(1, dim=2)]
    return torch.cat([nothing if said is None else said for said in steps], dim=2)


def test_greedy_tokens_are_the_references(reference: Reference) -> None:
    generator = LMGen(reference.lm(), GREEDY)
    with generator.streaming(3):
        for step, wanted in enumerate(reference["gen"]):
            said = generator.step(reference["user"][:, :, step : step + 1])
            if said is None:
                assert (wanted == -3).all()
            else:
                assert torch.equal(said[..., 0], wanted)


def test_items_held_and_reset_say_what_the_references_do(reference: Reference) -> None:
    generator = LMGen(reference.lm(), GREEDY, out_of_sync=True)
    with generator.streaming(3):
        for step, wanted in enumerate(reference["gen_exec"]):
            if f"reset.{step}" in reference.tensors:
                generator.reset_streaming(reference[f"reset.{step}"])
            generator.set_exec_mask(reference["exec_masks"][step])
            said = generator.step(reference["user"][:, :, step : step + 1])
            assert torch.equal(said[..., 0], wanted), step


@pytest.mark.parametrize("ttt", [{}, {"ttt_layers": 2}, {"ttt_layers": 1, "ttt_mode": "parallel"}])
def test_held_items_are_not_disturbed(ttt: dict[str, Any]) -> None:
    model, user = lm_of(tiny(**ttt)), heard(2, 40)
    with (alone := LMGen(model, GREEDY)).streaming(1):
        wanted = talk(alone, user[:1])
    generator, said, taken = LMGen(model, GREEDY, out_of_sync=True), [], 0
    with generator.streaming(2):
        for step in range(60):
            active = torch.tensor([step % 3 != 1, True])
            generator.set_exec_mask(active)
            frame = torch.stack([user[0, :, taken % 40], user[1, :, step % 40]])[..., None]
            out = generator.step(frame)
            if active[0]:
                said.append(out[:1])
                taken += 1
            else:
                assert (out[0] == UNGENERATED).all()
    assert torch.equal(torch.cat(said, dim=2)[..., 2:], wanted[..., 2:40])


def test_who_begins_anew_or_is_held_has_said_nothing_yet() -> None:
    model, user = lm_of(tiny()), heard(2, 12)
    with (alone := LMGen(model, GREEDY)).streaming(1):
        wanted = talk(alone, user[1:])
    first, generator = torch.tensor([True, False]), LMGen(model, GREEDY)
    with generator.streaming(2):
        before = talk(generator, user[..., :6])
        generator.reset_streaming(first)
        anew = talk(generator, user[..., 6:10])
        generator.set_exec_mask(~first)
        held = talk(generator, torch.cat([torch.full((1, 1, 2), UNGENERATED), user[1:, :, 10:]]))
    assert (anew[0, :, :2] == UNGENERATED).all()
    assert (anew[0, :, 2:] != UNGENERATED).all()
    assert (held[0] == UNGENERATED).all()
    assert torch.equal(torch.cat([before, anew, held], dim=2)[1:], wanted)


@pytest.mark.parametrize("ttt", [{}, {"ttt_layers": 2, "ttt_kind": "mlp"}])
def test_a_saved_conversation_goes_on_elsewhere(ttt: dict[str, Any]) -> None:
    model, user = lm_of(tiny(**ttt)), heard(2, 30)
    first, second = LMGen(model, GREEDY), LMGen(lm_of(tiny(**ttt)), GREEDY)
    with first.streaming(2):
        talk(first, user[..., :13])
        saved = first.get_streaming_state()
        wanted = talk(first, user[..., 13:])
        with second.streaming(2):
            second.set_streaming_state(saved)
            assert torch.equal(talk(second, user[..., 13:]), wanted)
        first.set_streaming_state(saved)
        assert torch.equal(talk(first, user[..., 13:]), wanted)


def test_what_is_generated_is_what_training_would_predict() -> None:
    """The delays of the step loop and of the training forward are the same."""
    config = tiny()
    model = lm_of(config).double()
    user, generator = heard(1, 25), LMGen(model, GREEDY)
    with generator.streaming(1):
        said = talk(generator, user)[..., config.max_delay :]
    # What the user said in step s is heard as frame s - 1; the very first is never heard.
    codes = torch.cat([said, user[..., 1 : said.shape[2] + 1]], dim=1)
    out = model(codes)
    assert torch.equal(out.text_logits.argmax(-1)[:, 0], codes[:, 0])
    for stream in range(config.dep_q):
        mask = out.mask[:, stream]
        found = out.logits[:, stream].argmax(-1)
        assert torch.equal(found[mask], codes[:, 1 + stream][mask])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "layer_norm", "gating": "none", "depformer_gating": "silu", "layer_scale": 0.5},
    {"depformer_norm": "layer_norm", "depformer_pos_emb": "sin", "depformer_kv_repeat": 2},
    {"depformer_weights_per_step": False, "depformer_gating": "none"},
    {"depformer_weights_per_step_schedule": (0, 0), "depformer_low_rank_embeddings": 4},
    {"depformer_pos_emb": "rope", "depformer_kv_repeat": 2},
    {"depformer_pos_emb": "rope_concat"},
    {"depformer_pos_emb": "sin_rope"},
]


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_a_frame_decoded_by_steps_is_one_decoded_at_once(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    model, codes = lm_of(config), codes_of(config, batch=3, length=1)
    hidden, found = torch.randn(3, 1, config.dim), []

    def teacher(logits: Tensor) -> Tensor:
        found.append(logits)
        return codes[:, len(found), 0]

    decoder = DepthDecoder(model, 3)
    for _ in range(2):  # what an earlier frame left does not matter
        found.clear()
        decoder.frame(hidden[:, 0], codes[:, 0, 0], teacher)
    wanted = model.forward_depth(hidden, codes[:, : config.dep_q])
    assert worst(torch.stack(found, dim=1), wanted[:, :, 0]) <= 2e-6


def test_teacher_and_hooks_are_in_the_loop() -> None:
    model, seen = lm_of(tiny()), []
    hooks = Hooks(
        on_text_logits=lambda logits: seen.append(logits.shape),
        on_text=lambda text: seen.append(text.shape),
        on_audio=lambda audio: seen.append(audio.tolist()),
    )
    generator, audio = LMGen(model, GREEDY, hooks=hooks), torch.tensor([[[7], [8]]])
    with generator.streaming(1):
        for _ in range(4):
            said = generator.step(heard(), replace_audio=audio)
    assert said[0, 1:, 0].tolist() == [7, 8]
    assert seen[:3] == [(1, 1, 1, 24), (1,), [[7, 8]]]


def test_extra_heads_speak_in_probabilities() -> None:
    model = lm_of(tiny(extra_heads_num_heads=2))
    with (generator := LMGen(model)).streaming(1):
        _, heads = generator.step_with_extra_heads(heard())
    assert [head.shape for head in heads] == [(1, 1, 6)] * 2
    assert all(head.sum().item() == pytest.approx(1) for head in heads)


def test_eight_bits_change_little_and_the_model_not_at_all() -> None:
    config = tiny(dim=64, depformer_dim=64)
    model, codes = lm_of(config), codes_of(config, 1, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = in_eight_bits(model)
    assert any(isinstance(module, EightBitLinear) for module in twin.modules())
    assert not any(isinstance(module, EightBitLinear) for module in model.modules())
    with torch.no_grad():
        plain, rough = model.forward_text(codes)[1], twin.forward_text(codes)[1]
    assert worst(rough, plain) <= 0.05 * plain.abs().max()
    with (generator := LMGen(twin, GREEDY)).streaming(2):
        talk(generator, heard(2, 5))
    assert not model.is_streaming
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_sampling_draws_from_the_likeliest_as_often_as_they_are_likely() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3])).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for sampling, wanted in [
        (Sampling(temp=1, top_k=0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temp=1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temp=1, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temp=0), [0, 1, 0, 0]),
        (Sampling(use_sampling=False), [0, 1, 0, 0]),
    ]:
        shares = sampling.audio(logits, generator).bincount(minlength=4) / len(logits)
        assert worst(shares, torch.tensor(wanted)) <= 0.015


def test_a_seed_makes_a_conversation_repeatable() -> None:
    model, said = lm_of(tiny()), []
    for seed in (1, 1, 2):
        generator = LMGen(model, generator=torch.Generator().manual_seed(seed))
        with generator.streaming(1):
            said.append(talk(generator, heard(1, 20)))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_hybrid_beside_attention_changes_nothing_while_its_gate_is_shut(kind: str) -> None:
    config = tiny()
    plain, codes = lm_of(config), codes_of(config)
    changes = {"ttt_layers": 2, "ttt_mode": "parallel", "ttt_kind": kind, "ttt_alpha": 0.0}
    hybrid = lm_of(tiny(**changes), seed=5)
    load_checkpoint(hybrid, hybrid_weights(plain.state_dict(), hybrid.state_dict(), hybrid.config))
    with torch.no_grad():
        assert torch.equal(hybrid(codes).logits, plain(codes).logits)


@pytest.mark.parametrize("mode", ["replace", "gated", "parallel"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_a_hybrid_starts_with_attentions_projections(mode: str, repeat: int) -> None:
    plain = lm_of(tiny(kv_repeat=repeat, num_heads=4))
    hybrid = lm_of(tiny(kv_repeat=repeat, num_heads=4, ttt_layers=1, ttt_mode=mode), seed=5)
    weights = hybrid_weights(plain.state_dict(), hybrid.state_dict(), hybrid.config)
    load_checkpoint(hybrid, weights)
    mixer = hybrid.transformer.layers[2].self_attn
    before = plain.transformer.layers[2].self_attn.in_projs[0].weight
    assert torch.equal(mixer.ttt.q_proj.weight, before[:16])
    keys = mixer.ttt.k_proj.weight.view(4, 4, 16)
    given = before[16 : 16 + 16 // repeat].view(4 // repeat, 4, 16)
    assert all(torch.equal(keys[head], given[head // repeat]) for head in range(4))
    assert ("transformer.layers.2.self_attn.in_projs.0.weight" in weights) == (mode == "parallel")
    assert hasattr(mixer.ttt, "alpha") == (mode != "replace")
    assert hybrid(codes_of(hybrid.config)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 1, 2, dtype=torch.long), "one frame at a time"),
        (torch.zeros(1, 0, 1, dtype=torch.long), "one frame at a time"),
        (torch.zeros(2, 1, 1, dtype=torch.long), "stream of 1 items was fed 2"),
        (torch.full((1, 1, 1), 21), "out of range"),
    ],
)
def test_frames_that_cannot_be_are_refused(tokens: Tensor, message: str) -> None:
    with (generator := LMGen(lm_of(tiny()))).streaming(1):
        with pytest.raises(DataError, match=message):
            generator.step(tokens)
        with pytest.raises(DataError, match=message):
            generator.step(heard(), replace_audio=tokens.repeat(1, 2, 1))
        generator.step(torch.zeros(1, 8, 1, dtype=torch.int32))  # only the user's rows are read


def test_a_step_outside_a_conversation_says_so() -> None:
    with pytest.raises(RuntimeError, match="streaming"):
        LMGen(lm_of(tiny())).step(heard())
    with pytest.raises(ConfigError, match="top_k"):
        Sampling(top_k=-1)
