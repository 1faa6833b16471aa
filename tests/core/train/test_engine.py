"""What one step does, whatever the model."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moshi_fl.models.family import ParameterGroup
from moshi_fl.optimizer import warmup_cosine
from moshi_fl.train import Recipe
from moshi_fl.train.engine import Engine

RECIPE = Recipe(steps=8, learning_rate=1e-2, schedule="cosine", warmup_steps=3, gradient_clip=1e9)


class Line(nn.Module):
    """Two weights that see the same gradient."""

    def __init__(self, groups: bool = False) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.ones(1))
        self.router = nn.Parameter(torch.ones(1))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.plain + self.router)


class GroupedLine(Line):
    def parameter_group(self, name: str) -> ParameterGroup:
        return ParameterGroup(0.5, decays=False) if name == "router" else ParameterGroup()


def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    return module(batch).square().mean(), len(batch)


def test_the_router_learns_at_half_the_rate_at_every_step_and_is_not_decayed() -> None:
    module = GroupedLine()
    engine = Engine(module, loss, replace(RECIPE, weight_decay=0.0))
    with engine.active():
        for step in range(8):
            before = {name: float(w) for name, w in engine.weights.items()}
            engine.step(step, [torch.ones(4)])
            moved = {name: float(w) - before[name] for name, w in engine.weights.items()}
            assert moved["router"] == pytest.approx(moved["plain"] / 2, rel=1e-2)
    decayed = Engine(GroupedLine(), loss, replace(RECIPE, weight_decay=0.5))
    with decayed.active():
        decayed.step(7, [torch.zeros(4)])
    rate = 0.01 * RECIPE.learning_rate
    assert float(decayed.weights["router"]) == 1.0
    assert float(decayed.weights["plain"]) == pytest.approx(1 - 0.5 * rate)


def test_a_step_is_the_mean_over_all_tokens_however_they_are_cut_into_batches() -> None:
    tokens = torch.arange(1.0, 8.0)
    results = []
    for cut in ([7], [1, 6], [4, 3], [2, 2, 3]):
        engine = Engine(Line(), loss, RECIPE)
        with engine.active():
            engine.step(0, torch.split(tokens, cut))
            report = engine.settle()[0]
        results.append((report.loss, report.gradient_norm))
        assert report.tokens == 7
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-6)
    engine = Engine(Line(), loss, RECIPE)
    with engine.active():
        engine.step(0, [tokens[:3], tokens[3:6]])
        halves = [float(part.mul(2).square().mean()) for part in (tokens[:3], tokens[3:6])]
        assert engine.settle()[0].loss == pytest.approx(sum(halves) / 2)  # the reference's loss/2


def test_the_cosine_schedule_is_the_references() -> None:
    peak, warmup, steps = 3e-4, 10, 100
    rates = [warmup_cosine(s, steps, peak=peak, warmup_steps=warmup) for s in range(120)]
    assert rates[0] == pytest.approx(peak / 10)
    assert rates[9] == peak
    middle = 0.01 * peak + 0.99 * peak * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert rates[54] == pytest.approx(middle)
    assert rates[99:] == [0.01 * peak] * 21
    assert warmup_cosine(49, 100, peak=1.0, warmup_steps=2000) == pytest.approx(50 / 2000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_a_compiled_module_keeps_its_names_and_learns_the_same() -> None:
    results = []
    for compiled in (False, True):
        engine = Engine(Line(), loss, replace(RECIPE, compile=compiled))
        with engine.active():
            for step in range(3):
                engine.step(step, [torch.arange(4.0)])
        results.append({name: float(w.detach()) for name, w in engine.module.named_parameters()})
    assert list(results[1]) == ["plain", "router"]
    assert results[1] == pytest.approx(results[0])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1


def test_importing_the_engine_brings_no_yaml_tracker_or_compiler() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import moshi_fl.train\n"
        "new = set(sys.modules) - before\n"
        "bad = ('yaml', 'wandb', 'tensorboard', 'torch._dynamo')\n"
        "assert not [name for name in new if name.startswith(bad)]\n"
        "assert not any(n in sys.modules for n in bad)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
