"""Differential privacy: DP-SGD as an engine, and what it spends. The only user of Opacus.

DP-SGD (Abadi et al. 2016, algorithm 1): each step takes every window of the data with a
probability (Poisson sampling), clips each window's gradient to a norm, adds Gaussian noise, and
divides by the expected number of windows. What is protected is one *window*: whether it was in the
data. The optimizer, the schedule and the codec come after the noise and can tell nothing more.

All of its randomness must be unknown to whoever sees the result: which windows are taken, the
noise, and dropout (with known masks, one window's absence would move all others to other masks).
So nothing follows from the recipe's public seed. Sampling and noise come from the operating
system's generator, anew in each process: a resumed run repeats no noise. Noise is made and added in
float64 and rounded once, which hides the gaps between its possible values (Mironov 2012).
"""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, TrainingError
from moshi_fl.models.family import Corpus, Separable, Task, Windowed
from moshi_fl.models.moc_layers import RMSNorm, inverse_rms
from moshi_fl.train.engine import Engine, Loss
from moshi_fl.train.recipe import Recipe

UNIT = "window"
BLOCK = 1 << 20  # random numbers made at once
DISTINCT = 4  # kinds of steps that are composed exactly
HOPELESS = 100.0  # epsilons above it need not be known exactly
TOLERANCE = 1e-3  # relative; between the sum of windows' gradients and the batch's


@dataclass(frozen=True)
class Spend:
    """So many steps with this noise, each taking a window with this probability."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def require_opacus() -> None:
    """Fail early where the extra is not installed.

    Raises:
        ConfigError: Opacus is not installed.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "training with differential privacy needs the library Opacus, which is not installed.",
            hint="pip install 'moshi-fl[dp]'",
        ) from error


def epsilon(spends: Sequence[Spend], delta: float) -> float:
    """Upper bound of the epsilon of all these together, by the PRV accountant (Gopi et al. 2021).

    Of many different kinds of steps the sampling rates are rounded up to two digits, which only
    makes the bound larger. Above 100 it is the coarser bound of Renyi accounting.
    """
    require_opacus()
    from opacus.accountants import PRVAccountant, RDPAccountant

    history = _grouped(spends)
    if not history:
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of bounds that could be tighter
        coarse, exact = RDPAccountant(), PRVAccountant()
        coarse.history, exact.history = list(history), list(history)
        bound = float(coarse.get_epsilon(delta))
        return bound if bound > HOPELESS else float(exact.get_epsilon(delta))


def _grouped(spends: Sequence[Spend]) -> list[tuple[float, float, int]]:
    counts: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        counts[spend.noise_multiplier, spend.sample_rate] += spend.steps
    if len(counts) > DISTINCT:
        rounded: Counter[tuple[float, float]] = Counter()
        for (noise, rate), steps in counts.items():
            rounded[noise, _rounded_up(rate)] += steps
        counts = rounded
    return [(noise, rate, steps) for (noise, rate), steps in sorted(counts.items()) if steps]


def _rounded_up(rate: float) -> float:
    digits = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return min(1.0, max(rate, math.ceil(rate / digits) * digits))


# Sampling.


@dataclass(frozen=True)
class Sample:
    """A part of a step's windows, small enough to pass through the model at once."""

    batch: Any
    windows: int


def sample_rate(task: Task, corpus: Corpus, recipe: Recipe) -> float:
    """Probability with which a step takes a window, so that it expects the recipe's batch.

    Raises:
        ConfigError: The family has no windows to protect, or there are too few of them.
    """
    if not isinstance(task, Windowed):
        raise ConfigError(
            "this model family does not cut data into windows, so there is nothing to protect.",
            hint="Without --dp; or give the family's task window_count and take.",
        )
    count, expected = task.window_count(corpus), recipe.batch_size * recipe.accumulation
    if 2 * expected > count:
        raise ConfigError(
            f"the data has {count} windows; a step that expects {expected} of them would tell "
            "too much of each.",
            hint="Give more data, or a smaller --batch-size.",
        )
    return expected / count


def poisson_steps(task: Task, corpus: Corpus, recipe: Recipe) -> Iterator[list[Sample]]:
    """The windows of each step, endlessly; how many there are is random, and may be none."""
    rate = sample_rate(task, corpus, recipe)
    assert isinstance(task, Windowed)
    count = task.window_count(corpus)
    while True:
        chosen = np.flatnonzero(_uniform(count) < rate)
        parts = [
            chosen[start : start + recipe.batch_size]
            for start in range(0, len(chosen), recipe.batch_size)
        ]
        yield [
            Sample(task.take(corpus, part, seed=secrets.randbits(63)), len(part)) for part in parts
        ]


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def _uniform(count: int) -> NDArray[np.float64]:
    """Numbers from 0 to below 1, multiples of 2^-53."""
    return (_words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def gaussian(count: int) -> NDArray[np.float64]:
    """Standard normal numbers (Box and Muller 1958) from the operating system's generator."""
    parts = []
    for start in range(0, count, BLOCK):
        half = (min(BLOCK, count - start) + 1) // 2
        radius = np.sqrt(-2 * np.log(1 - _uniform(half)))
        angle = 2 * np.pi * _uniform(half)
        parts += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.concatenate(parts)[:count] if parts else np.empty(0)


# Gradients of single windows.


class WindowGradients:
    """Keeps the gradient of each window by itself, by Opacus's hooks on the layers of a module."""

    def __init__(self, module: nn.Module) -> None:
        from opacus.grad_sample import GradSampleHooks
        from opacus.grad_sample.utils import register_grad_sampler

        register_grad_sampler(RMSNorm)(_rms_norm)
        self._module = module
        # Not strict: that would refuse tables of positions, which are buffers but no state.
        self._hooks = GradSampleHooks(module, loss_reduction="sum", strict=False)
        self._checked = False

    def of(self, parameters: dict[str, nn.Parameter], windows: int) -> list[Tensor]:
        """After a backward pass: each parameter's gradients, (windows, ...); forgets them.

        Raises:
            ConfigError: Those of a parameter cannot be had.
        """
        found = []
        for name, parameter in parameters.items():
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor) or len(sample) != windows:
                raise _inseparable(f"{name} is used by no layer that hooks can follow")
            found.append(sample.detach().float())
            if not self._checked and not _agree(sample, parameter.grad):
                raise _inseparable(f"{name} is also used outside its layer")
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        self._checked = self._checked or windows > 1
        return found

    def release(self) -> None:
        """Take the hooks away, and what they left on parameters and layers."""
        self._hooks.remove_hooks()
        for parameter in self._module.parameters():
            for left in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, left):
                    delattr(parameter, left)
        for layer in self._module.modules():
            for left in ("activations", "max_batch_len"):
                if hasattr(layer, left):
                    delattr(layer, left)


def _agree(sample: Tensor, gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    scale = float(sample.abs().sum(0).max())
    apart = float((sample.sum(0) - gradient).abs().max())
    return not apart > TOLERANCE * scale + 1e-12  # what is not finite, the engine reports


def _inseparable(why: str) -> ConfigError:
    return ConfigError(
        f"the gradients of single windows cannot be had from this model: {why}.",
        hint="Without --dp; or let the model's separated() give each parameter a layer.",
    )


def _rms_norm(layer: RMSNorm, activations: list[Tensor], dy: Tensor) -> dict[Tensor, Tensor]:
    x = activations[0]
    product = x * inverse_rms(x) * dy  # (B, ..., C)
    return {layer.weight: product.flatten(1, -2).sum(1)}


def clip_and_sum(samples: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Sum over windows, each scaled so that its norm over all tensors is at most ``limit``."""
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)  # (B,)
    return [torch.tensordot(factors, sample, dims=1) for sample in samples]


class PrivateEngine(Engine):
    """DP-SGD with whatever comes after it: moments, schedule, decay.

    Args:
        module: Model with float32 weights, on the recipe's device.
        loss: Of a batch; the mean over windows of equal length.
        recipe: With ``private``.

    Raises:
        ConfigError: Opacus is not installed.
    """

    def __init__(self, module: nn.Module, loss: Loss, recipe: Recipe) -> None:
        require_opacus()
        super().__init__(module, loss, recipe)
        self._windows: WindowGradients | None = None
        self._length = 0  # tokens of a window

    @contextmanager
    def active(self) -> Iterator[None]:
        """Training mode, with hooks on the layers.

        Raises:
            ConfigError: Windows of a batch influence each other.
        """
        with super().active(), _separated(self.module), _quiet():
            self._windows = WindowGradients(self.module)
            try:
                yield
            finally:
                self._windows.release()
                self._windows = None

    def _seed(self, step: int) -> int:
        return secrets.randbits(63)

    def _differentiate(self, batches: Iterable[Sample]) -> tuple[Tensor, list[Tensor], int, int]:
        sums = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        total, tokens, windows = torch.zeros((), device=self.recipe.device), 0, 0
        for sample in batches:
            loss, count = self._loss(self.module, sample.batch)
            self._require_equal(count, sample.windows)
            (loss * sample.windows).backward()  # type: ignore[no-untyped-call]
            assert self._windows is not None, "inside active()"
            gradients = self._windows.of(self.parameters, sample.windows)
            torch._foreach_add_(sums, clip_and_sum(gradients, self.recipe.max_gradient_norm))
            total += loss.detach() * sample.windows
            tokens, windows = tokens + count, windows + sample.windows
        unit = max(tokens, 1)
        return total / max(windows, 1), [self._noised(part) for part in sums], unit, tokens

    def _noised(self, total: Tensor) -> Tensor:
        recipe = self.recipe
        deviation = recipe.noise_multiplier * recipe.max_gradient_norm
        noise = torch.from_numpy(gaussian(total.numel())).view(total.shape) * deviation
        exact = (total.double().cpu() + noise) / (recipe.batch_size * recipe.accumulation)
        return exact.float().to(total.device)

    def _require_equal(self, tokens: int, windows: int) -> None:
        self._length = self._length or tokens // windows
        if tokens != self._length * windows:
            raise TrainingError(
                f"a batch of {windows} windows has {tokens} tokens; with differential privacy "
                f"each must have the same number, here {self._length}."
            )


def _separated(module: nn.Module) -> AbstractContextManager[None]:
    return module.separated() if isinstance(module, Separable) else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's remark that an embedding's input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def require_separable(module: nn.Module, task: Task, corpus: Corpus) -> None:
    """Try two windows, and give nothing away: fails before anything is spent.

    Raises:
        ConfigError: Gradients of single windows cannot be had from this model.
    """
    assert isinstance(task, Windowed)
    recipe = Recipe(steps=1, batch_size=1, private=True)
    engine = PrivateEngine(module, task.loss, recipe)
    batch = task.take(corpus, np.arange(2), seed=0)
    with engine.active():
        engine._differentiate([Sample(batch, 2)])  # noqa: SLF001 - of this module
