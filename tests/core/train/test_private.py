"""DP-SGD: gradients of single windows, clipping, noise, sampling, and what it all spends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, TrainingError
from moshi_fl.models import get_family, get_preset
from moshi_fl.models.char import CharConfig, CharTransformer
from moshi_fl.models.moc import Moc
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.token_corpus import TokenArray, TokenCorpus, take_windows, window_count
from moshi_fl.train import Recipe, train
from moshi_fl.train.private import (
    PrivateEngine,
    Sample,
    Spend,
    WindowGradients,
    _quiet,
    _separated,
    clip_and_sum,
    epsilon,
    gaussian,
    poisson_steps,
    require_separable,
    sample_rate,
)
from tests.support.simulator import small_preset, write_corpus

opacus = pytest.importorskip("opacus", reason="needs the extra dp (pip install 'moshi-fl[dp]')")

VOCABULARY = 40
CONTEXT = 24
MOC = MocConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY, multiple_of=16,
    max_seq_len=CONTEXT, n_experts=0,
)  # fmt: skip
CHAR = CharConfig(n_layer=2, n_head=2, d_model=16, d_ff=32, context=CONTEXT)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "char": lambda: CharTransformer(CHAR, VOCABULARY),
    "char, pre-norm": lambda: CharTransformer(dataclasses.replace(CHAR, norm="pre"), VOCABULARY),
    "moc, dense and tied": lambda: Moc(MOC),
    "moc, checkpointing": lambda: Moc(dataclasses.replace(MOC, grad_ckpt_policy="block")),
}


def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    """Mean cross-entropy of either family."""
    targets = batch[:, 1:]
    if isinstance(module, Moc):
        return module(batch[:, :-1], targets).loss.total, targets.numel()
    logits = module(batch[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, targets.flatten()), targets.numel()


def windows(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, CONTEXT + 1), generator=random)


def single_gradients(module: nn.Module, batch: Tensor) -> list[Tensor]:
    """Of each window by itself, by one backward pass each: (windows, ...) for each parameter."""
    rows = []
    for row in batch:
        module.zero_grad()
        loss(module, row[None])[0].backward()
        rows.append([parameter.grad.clone() for parameter in module.parameters()])
    module.zero_grad()
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_windows_are_those_of_single_backward_passes(name: str) -> None:
    torch.manual_seed(0)
    module, batch = MODELS[name]().train(), windows(5)
    before = dict(module.named_parameters())
    with _separated(module), _quiet():
        hooks = WindowGradients(module)
        (loss(module, batch)[0] * len(batch)).backward()
        found = hooks.of(before, len(batch))
        hooks.release()
    assert {name: id(p) for name, p in module.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert not any(hasattr(parameter, "grad_sample") for parameter in module.parameters())
    for one, expected in zip(found, single_gradients(module, batch), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(
            one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_a_mixture_of_experts_is_refused_with_the_reason() -> None:
    module = Moc(dataclasses.replace(MOC, n_experts=4, collab="none"))
    with pytest.raises(ConfigError, match="n_experts = 4") as caught, _separated(module):
        pass
    assert "compete for room" in str(caught.value)
    assert "char" in caught.value.hint


class Sneaky(nn.Module):
    """Uses a weight once through its layer and once around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + nn.functional.embedding(tokens, self.head.weight))


class Mixing(Sneaky):
    """Its layer does not see windows but tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens.flatten())).view(*tokens.shape, -1)


@pytest.mark.parametrize(("kind", "said"), [(Sneaky, "outside its layer"), (Mixing, "no layer")])
def test_gradients_that_cannot_be_told_apart_are_noticed(kind: type, said: str) -> None:
    engine = engine_of(kind())
    with pytest.raises(ConfigError, match=said), engine.active():
        engine.step(0, [Sample(windows(3), 3)])


def engine_of(module: nn.Module, **fields: object) -> PrivateEngine:
    recipe = Recipe(
        **{"steps": 10, "batch_size": 4, "private": True, "noise_multiplier": 1e-9} | fields
    )
    return PrivateEngine(module, loss, recipe)


def gradient_of(engine: PrivateEngine, samples: list[Sample]) -> list[Tensor]:
    with engine.active():
        return engine._differentiate(samples)[1]


def test_without_noise_it_is_the_clipped_mean_that_opacus_makes() -> None:
    torch.manual_seed(0)
    module, batch = MODELS["char"](), windows(6)
    limit = 0.5
    found = gradient_of(
        engine_of(module, max_gradient_norm=limit), [Sample(batch[:4], 4), Sample(batch[4:], 2)]
    )
    module.train()
    for parameter, rows in zip(module.parameters(), single_gradients(module, batch), strict=True):
        parameter.grad_sample = rows
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        expected_batch_size=4,
    )
    optimizer.pre_step()
    for one, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_no_window_has_more_influence_than_the_clipping_norm(scale: float) -> None:
    torch.manual_seed(0)
    module, batch = MODELS["char"](), windows(6)
    with torch.no_grad():
        module.fc_out.weight.mul_(scale)
    limit = 0.7
    engine = engine_of(module, max_gradient_norm=limit, batch_size=1)
    whole = gradient_of(engine, [Sample(batch, 6)])
    for left in range(6):
        rest = torch.cat([batch[:left], batch[left + 1 :]])
        without = gradient_of(engine, [Sample(rest, 5)])
        moved = math.sqrt(
            sum(float((a - b).square().sum()) for a, b in zip(whole, without, strict=True))
        )
        assert moved <= limit * 1.001
        assert moved > 0


def test_clipping_scales_a_window_over_all_tensors_at_once() -> None:
    samples = [torch.tensor([[3.0], [0.3]]), torch.tensor([[4.0], [0.4]])]
    a, b = clip_and_sum(samples, 1.0)
    torch.testing.assert_close(a, torch.tensor([0.6 + 0.3]))
    torch.testing.assert_close(b, torch.tensor([0.8 + 0.4]))


def test_noise_of_the_right_size_is_in_every_gradient() -> None:
    module = MODELS["char"]()
    engine = engine_of(module, noise_multiplier=1.5, max_gradient_norm=0.4, batch_size=8)
    first, second = gradient_of(engine, []), gradient_of(engine, [])  # of a step without windows
    noise = torch.cat([part.flatten() for part in first]).double()
    expected = 1.5 * 0.4 / 8
    error = 4 / math.sqrt(2 * len(noise))  # four standard errors of a deviation
    assert abs(float(noise.std()) / expected - 1) < error
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(len(noise))
    other = torch.cat([part.flatten() for part in second]).double()
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 4 / math.sqrt(len(noise))


def test_the_noise_is_normal() -> None:
    from scipy import stats

    assert stats.kstest(gaussian(100_001), "norm").pvalue > 1e-6
    assert len(gaussian(0)) == 0


def test_the_same_run_twice_has_other_noise_and_other_windows(tmp_path: Path) -> None:
    task, corpus = task_and_corpus(tmp_path)
    recipe = Recipe(steps=2, batch_size=4, seed=1, private=True)
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        module = task.build()
        train(module, task, corpus, recipe)
        ends.append(module.fc_out.weight.detach().clone())
    assert not torch.equal(*ends)


def task_and_corpus(folder: Path):
    preset = small_preset()
    task = get_family("char").load(preset.model, preset.tokenizer)
    return task, task.read([write_corpus(folder / "code", files=9)], seed=0)


def test_windows_are_sampled_each_by_itself(tmp_path: Path) -> None:
    task, corpus = task_and_corpus(tmp_path)
    recipe = Recipe(steps=1, batch_size=8, private=True)
    rate, count = sample_rate(task, corpus, recipe), task.window_count(corpus)
    assert rate == 8 / count
    steps = poisson_steps(task, corpus, recipe)
    sizes = [sum(sample.windows for sample in next(steps)) for _ in range(400)]
    assert abs(np.mean(sizes) - 8) < 4 * math.sqrt(8 / 400)
    assert 0.7 < np.var(sizes) / (8 * (1 - rate)) < 1.4  # binomial, unlike batches of a fixed size
    assert all(sample.windows <= 8 for sample in next(steps))


def test_windows_share_no_token(tmp_path: Path) -> None:
    task, corpus = task_and_corpus(tmp_path)
    count = task.window_count(corpus)
    rows = task.take(corpus, np.arange(count), seed=0)
    assert rows.shape == (count, 33)
    assert rows.flatten().tolist() == corpus.tokens[: count * 33].tolist()


def test_windows_of_a_stream_share_no_token() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    corpus = TokenCorpus(TokenArray(tokens), 9, None)
    assert window_count(corpus) == 10
    assert take_windows(corpus, np.arange(10)).flatten().tolist() == list(range(100))


def test_a_window_rearranged_to_fill_in_the_middle_is_still_one(tmp_path: Path) -> None:
    preset = small_preset(model={"fill_in_middle": 0.9})
    task = get_family("char").load(preset.model, preset.tokenizer)
    corpus = task.read([write_corpus(tmp_path / "code", files=9)], seed=0)
    one, other = (task.take(corpus, np.array([3]), seed=seed) for seed in (1, 2))
    assert one.shape == other.shape == (1, 33)
    assert not torch.equal(one, other)


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    task, corpus = task_and_corpus(tmp_path)
    size = task.window_count(corpus) // 2 + 1
    with pytest.raises(ConfigError, match="would tell too much"):
        sample_rate(task, corpus, Recipe(steps=1, batch_size=size, private=True))


def test_a_family_without_windows_is_refused(tmp_path: Path) -> None:
    _, corpus = task_and_corpus(tmp_path)
    with pytest.raises(ConfigError, match="does not cut data into windows"):
        sample_rate(object(), corpus, Recipe(steps=1, private=True))


def test_a_hub_of_the_tiny_preset_can_be_served(tmp_path: Path) -> None:
    preset = get_preset("char", "tiny")
    task = get_family("char").load(preset.model, preset.tokenizer)
    corpus = task.read([write_corpus(tmp_path / "code", files=9)], seed=0)
    require_separable(task.build(), task, corpus)


def test_windows_of_unequal_length_are_refused() -> None:
    engine = engine_of(MODELS["char"]())
    with pytest.raises(TrainingError, match="same number"), engine.active():
        engine.step(0, [Sample(windows(2), 2), Sample(windows(2)[:, :9], 2)])


@pytest.mark.parametrize(
    "fields", [{"precision": "bf16"}, {"compile": True}, {"precision": "auto"}]
)
def test_only_plain_float32_is_private(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="private"):
        Recipe(steps=1, private=True, **fields)


def test_dropout_works() -> None:
    module = CharTransformer(dataclasses.replace(CHAR, dropout=0.5), VOCABULARY)
    engine = engine_of(module)
    first = gradient_of(engine, [Sample(windows(3), 3)])
    assert all(torch.isfinite(part).all() for part in first)


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    module = MODELS["char"]()
    with torch.no_grad():
        module.fc_out.weight.fill_(float("inf"))
    engine = engine_of(module)
    with pytest.raises(TrainingError, match="nan"), engine.active():
        engine.step(0, [Sample(windows(3), 3)])


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    task, corpus = task_and_corpus(tmp_path)
    recipe = Recipe(steps=4, batch_size=4, private=True)
    module, checkpoint = task.build(), tmp_path / "checkpoint"

    def stop(progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            module, task, corpus, recipe, checkpoint=checkpoint, checkpoint_seconds=0, on_step=stop
        )
    fresh = task.build()
    fresh.load_state_dict(module.state_dict())
    with pytest.raises(TrainingError, match="private"):
        train(
            fresh, task, corpus, dataclasses.replace(recipe, private=False), checkpoint=checkpoint
        )


# What is spent.


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.01, 200), (1.1, 256 / 60_000, 3516), (0.8, 0.03, 50)]
)
def test_epsilon_is_what_opacus_says(noise: float, rate: float, steps: int) -> None:
    accountant = opacus.accountants.PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    assert epsilon([Spend(noise, rate, steps)], 1e-5) == accountant.get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]
)
def test_epsilon_is_a_little_below_published_bounds(noise, epochs, published) -> None:
    # MNIST, 256 of 60 000, delta 1e-5: the table of tensorflow/privacy, tutorials/README.md. Those
    # are bounds by Renyi accounting, which is looser than PRV.
    steps = epochs * 60_000 // 256
    found = epsilon([Spend(noise, 256 / 60_000, steps)], 1e-5)
    assert 0.7 * published < found < published


def test_runs_together_spend_less_than_their_sum_and_more_than_each() -> None:
    one, other = Spend(1.0, 0.01, 200), Spend(1.2, 0.02, 100)
    together = epsilon([one, other], 1e-5)
    parts = [epsilon([spend], 1e-5) for spend in (one, other)]
    assert max(parts) < together < sum(parts)
    assert epsilon([one, one], 1e-5) == epsilon([Spend(1.0, 0.01, 400)], 1e-5)
    assert epsilon([], 1e-5) == 0


def test_many_kinds_of_runs_are_bounded_from_above() -> None:
    spends = [Spend(1.0, 0.0101 + number * 1e-5, 40) for number in range(6)]
    exact = opacus.accountants.PRVAccountant()
    exact.history = [(1.0, spend.sample_rate, 40) for spend in spends]
    assert epsilon(spends, 1e-5) > exact.get_epsilon(1e-5)


def test_what_is_hopeless_is_said_quickly() -> None:
    assert 100 < epsilon([Spend(0.3, 0.4, 1000)], 1e-5) < math.inf
