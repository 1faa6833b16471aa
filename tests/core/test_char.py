"""The character transformer against the reference implementation's numbers, and its own cache."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.char import CharConfig, CharTransformer, sinusoids
from moshi_fl.models.char_decode import CharDecoder
from moshi_fl.models.common import extract_weights, load_weights
from moshi_fl.optimizer import AdamW, clip_, one_cycle
from moshi_fl.weights import Weights, open_weights

FIXTURE = Path(__file__).parents[1] / "fixtures" / "char_orig.safetensors"
TINY = CharConfig(n_layer=2, n_head=2, d_model=16, d_ff=32, context=32)
# As the reference writes its settings down.
TABLE = {"vocab_size": 50, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_len": 32}


@pytest.fixture(scope="module")
def reference() -> Weights:
    return open_weights(FIXTURE)


def part(reference: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}


def model_of(reference: Weights) -> CharTransformer:
    config = CharConfig(n_layer=3, n_head=4, d_model=48, d_ff=128, context=64)
    model = CharTransformer(config, 101)
    load_weights(model, part(reference, "w/"))
    return model


def loss_of(logits: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    flat = torch.tensor(targets, dtype=torch.long).flatten()
    return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1)


def tokens_of(ids: np.ndarray) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long)


def test_logits_loss_and_gradients_are_the_references(reference: Weights) -> None:
    model = model_of(reference)
    logits = model(tokens_of(reference["in/idx"]))
    wanted = torch.tensor(reference["out/logits"])
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    loss = loss_of(logits, reference["in/targets"])
    assert abs(loss.item() - reference["out/loss"].item()) <= 2e-6
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert set(gradients) == set(part(reference, "g/"))
    for name, wanted_gradient in part(reference, "g/").items():
        assert np.abs(gradients[name].numpy() - wanted_gradient).max() <= 1e-6, name


def test_eight_steps_of_training_follow_the_references_losses(reference: Weights) -> None:
    model = model_of(reference)
    optimizer = AdamW({n: p.data for n, p in model.named_parameters()}, weight_decay=0.01)
    for step in range(8):
        loss = loss_of(
            model(tokens_of(reference["traj/idx"][step])), reference["traj/targets"][step]
        )
        assert abs(loss.item() - reference["traj/losses"][step]) <= 5e-6
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        clip_(gradients, 1.0)
        rate, beta1 = one_cycle(step, 40, peak=1e-3, warmup_fraction=0.05)
        optimizer.step(gradients, step, learning_rate=rate, beta1=beta1)


class PlainBlock(torch.nn.Module):
    """A block made of PyTorch's own parts, under the reference's names."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.attn = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm1, self.norm2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        self.ff = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)

        def attend(z: torch.Tensor) -> torch.Tensor:
            return self.attn(z, z, z, attn_mask=mask, need_weights=False)[0]

        if self.norm == "pre":
            x = x + attend(self.norm1(x))
            return x + self.ff(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self.ff(x))


class Plain(torch.nn.Module):
    def __init__(self, norm: str, *, final_norm: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.blocks = torch.nn.ModuleList(PlainBlock(norm) for _ in range(2))
        self.ln_f = torch.nn.LayerNorm(16) if final_norm else None
        self.fc_out = torch.nn.Linear(16, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + sinusoids(tokens.shape[1], 16)
        for block in self.blocks:
            x = block(x)
        return self.fc_out(x if self.ln_f is None else self.ln_f(x))


@pytest.mark.parametrize(
    ("norm", "final_norm"), [("post", False), ("post", True), ("pre", False), ("pre", True)]
)
def test_both_norms_with_and_without_a_final_one_are_pytorchs_own_blocks(
    norm: str, final_norm: bool
) -> None:
    torch.manual_seed(0)
    plain = Plain(norm, final_norm=final_norm or norm == "pre")
    for parameter in plain.parameters():  # gains of one and biases of zero would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = CharConfig.from_reference({**TABLE, "norm": norm, "final_norm": final_norm})
    model = CharTransformer(config, 50)
    load_weights(model, extract_weights(plain))
    tokens = torch.randint(50, (2, 20))
    logits, wanted = model(tokens), plain(tokens)
    assert torch.allclose(logits, wanted, atol=1e-5)
    logits.square().mean().backward()
    wanted.square().mean().backward()
    for name, parameter in plain.named_parameters():
        gradient = model.get_parameter(name).grad
        assert torch.allclose(gradient, parameter.grad, atol=1e-6, rtol=1e-4), name


def test_a_reference_configuration_is_read_under_its_own_names() -> None:
    assert CharConfig.from_reference(TABLE) == TINY
    assert CharConfig.from_reference({**TABLE, "final_norm": True}).normalises_output
    with pytest.raises(ConfigError, match="unknown key 'heads'"):
        CharConfig.from_reference({**TABLE, "heads": 2})


def test_the_schedule_is_torchs_one_cycle() -> None:
    for steps, warmup in ((40, 0.05), (100, 0.3), (7, 0.5), (200, 0.015)):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([weight], lr=1e-3)
        oracle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-3, total_steps=steps, pct_start=warmup
        )
        for step in range(steps):
            rate, beta1 = one_cycle(step, steps, peak=1e-3, warmup_fraction=warmup)
            group = optimizer.param_groups[0]
            assert rate == pytest.approx(group["lr"], rel=1e-9), (steps, step)
            assert beta1 == pytest.approx(group["betas"][0], rel=1e-9)
            optimizer.step()
            if step < steps - 1:
                oracle.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_very_short_schedules_stay_within_the_peak(steps: int, warmup: float) -> None:
    rates = [one_cycle(s, steps, peak=1.0, warmup_fraction=warmup)[0] for s in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


def test_the_position_table_of_older_checkpoints_is_accepted_and_ignored(
    reference: Weights,
) -> None:
    model = model_of(reference)
    before = extract_weights(model)
    table = np.full((768, 48), np.nan, np.float32)
    load_weights(model, {**part(reference, "w/"), "pos_encoding.pe": table})
    after = extract_weights(model)
    assert set(after) == set(part(reference, "w/"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(reference: Weights) -> None:
    model = model_of(reference)
    before = extract_weights(model)
    weights = {name: value + 1 for name, value in before.items()}
    weights["fc_out.bias"] = weights["fc_out.bias"][:-1]
    weights["extra"] = weights.pop("embedding.weight")
    with pytest.raises(CorruptRecord) as caught:
        load_weights(model, weights)
    message = str(caught.value)
    assert "embedding.weight is missing" in message
    assert "extra is not in the model" in message
    assert "fc_out.bias has shape [100] instead of [101]" in message
    assert all(np.array_equal(before[n], v) for n, v in extract_weights(model).items())
    with pytest.raises(CorruptRecord, match="and 29 more"):
        load_weights(model, {})


@pytest.mark.parametrize("first", [1, 2, 17, 32])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_reading_token_by_token_gives_the_logits_of_all_at_once(first: int, norm: str) -> None:
    torch.manual_seed(0)
    model = CharTransformer(dataclasses.replace(TINY, norm=norm, final_norm=True), 50).eval()
    tokens = torch.randint(50, (32,)).tolist()
    decoder = CharDecoder(model)
    decoder.restart([7, 7, 7])  # must leave no trace
    logits = [decoder.restart(tokens[:first]), *map(decoder.step, tokens[first:])]
    wanted = model(torch.tensor([tokens]))[0, first - 1 :]
    # The sums run over differently shaped blocks, so the last bits may differ.
    assert torch.allclose(torch.stack(logits), wanted, atol=1e-5)


def test_rounded_weights_change_the_logits_by_little() -> None:
    torch.manual_seed(0)
    model = CharTransformer(dataclasses.replace(TINY, d_model=64, d_ff=128), 50).eval()
    tokens = torch.randint(50, (32,)).tolist()
    exact, rounded = CharDecoder(model), CharDecoder(model, "int8")
    exact.restart(tokens[:8])
    rounded.restart(tokens[:8])
    for token in tokens[8:]:
        wanted, logits = exact.step(token), rounded.step(token)
        assert not torch.equal(wanted, logits)
        assert (wanted - logits).norm() < 0.03 * wanted.norm()


def test_the_decoder_uses_the_models_weights_as_they_are_now() -> None:
    model = CharTransformer(TINY, 50).eval()
    decoder = CharDecoder(model)
    before = decoder.restart([1, 2, 3])
    load_weights(model, {name: value * 0.5 for name, value in extract_weights(model).items()})
    after = decoder.restart([1, 2, 3])
    assert not torch.allclose(before, after)
    assert torch.allclose(after, model(torch.tensor([[1, 2, 3]]))[0, -1], atol=1e-5)


def test_a_token_does_not_see_those_after_it() -> None:
    torch.manual_seed(0)
    model = CharTransformer(TINY, 50).eval()
    tokens = torch.randint(50, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 50
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12], b[:, 12])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 0),
        ("d_ff", 1.5),
        ("n_head", True),
        ("n_head", 5),
        ("d_model", 33),
        ("context", 8),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("fill_in_middle", -0.1),
        ("norm", "before"),
        ("final_norm", 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        CharConfig(**{key: value})  # type: ignore[arg-type]
