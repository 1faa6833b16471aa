"""What a contribution sets out to do: the hub's recipe with the contributor's decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET, UnsetType

from moshi_fl.errors import ConfigError
from moshi_fl.models.family import Corpus, Task
from moshi_fl.optimizer import BETA2
from moshi_fl.policy import NO_DEMANDS, Policy
from moshi_fl.records import Training
from moshi_fl.replica import Snapshot
from moshi_fl.train import Recipe, calibrate, steps_for_epochs
from moshi_fl.weights import sha256_bytes
from moshi_sdk.privacy import PrivacyOptions, PrivacyPlan
from moshi_sdk.runs import RunPlan

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True)
class Options:
    """What a contributor may decide; None leaves it to the hub's recipe.

    ``root`` is the fingerprint that the hub's root of trust must have; empty pins the first seen.
    ``policy`` is what else is demanded of the round.
    """

    steps: int | None = None
    minutes: float | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    trains: str | None = None
    """The part of the model that learns, where its family has parts."""
    device: str = "cpu"
    seed: int | None = None
    contributor: str = "anonymous"
    max_bytes: int | None = None
    dry_run: bool = False
    replace: bool = False
    """Withdraw what this key has open on the same round; without it, that is an error."""
    privacy: PrivacyOptions | None = None
    key: Path | None = None
    """The contributor's own SSH key; None uses the one that moshi-fl made for them."""
    interactive: bool = False
    """Whether ssh-keygen may ask on the terminal for what the key needs."""
    root: str = ""
    policy: Policy = NO_DEMANDS


def make_plan(
    snapshot: Snapshot,
    task: Task,
    corpus: Corpus,
    paths: Sequence[Path],
    options: Options,
    key: str,
) -> RunPlan:
    """Settle everything that decides the result, so that a resumed run is the same run.

    ``key`` is the public key that will sign.

    Raises:
        ConfigError: Differential privacy is asked for and cannot be had.
    """
    rules = snapshot.state.config.training
    recipe = Recipe(
        steps=1,
        batch_size=options.batch_size or rules.batch_size,
        learning_rate=options.learning_rate or rules.learning_rate,
        accumulation=rules.accumulation,
        schedule=rules.schedule,
        weight_decay=rules.weight_decay,
        beta2=rules.beta2,
        gradient_clip=rules.gradient_clip,
        warmup_fraction=rules.warmup_fraction,
        precision=_precision(options, rules.precision),
        trains=options.trains or rules.trains,
        seed=_seed(options, snapshot),
        device=options.device,
        **_private_fields(options.privacy),
    ).settled()
    privacy = _privacy(options.privacy, task, corpus, recipe)
    training = Training(
        steps=_steps(snapshot, task, corpus, recipe, options),
        batch_size=recipe.batch_size * recipe.accumulation,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        precision=recipe.precision,
    )
    return RunPlan(
        base_round=snapshot.round,
        base=snapshot.record.weights,
        data=tuple(map(str, paths)),
        fingerprint=corpus.fingerprint,
        contributor=options.contributor,
        key=key,
        training=training,
        weight_decay=recipe.weight_decay,
        gradient_clip=recipe.gradient_clip,
        warmup_fraction=recipe.warmup_fraction,
        device=recipe.device,
        max_bytes=options.max_bytes,
        family=snapshot.state.config.family,
        accumulation=_unless(recipe.accumulation, 1),
        schedule=_unless(recipe.schedule, "one-cycle"),
        beta2=_unless(recipe.beta2, BETA2),
        trains=_unless(recipe.trains, "all"),
        privacy=privacy,
    )


def _precision(options: Options, rule: str) -> str:
    """Gradients are clipped and noised in float32, whatever the hub's recipe says."""
    if options.privacy is None:
        return options.precision or rule
    if options.precision == "bf16":
        raise ConfigError(
            "differential privacy is computed in fp32; bf16 is asked for.",
            hint="--precision fp32, or leave it out",
        )
    return "fp32"


def _private_fields(chosen: PrivacyOptions | PrivacyPlan | None) -> dict[str, Any]:
    if chosen is None:
        return {}
    return {
        "private": True,
        "noise_multiplier": chosen.noise_multiplier,
        "max_gradient_norm": chosen.max_gradient_norm,
    }


def _privacy(
    chosen: PrivacyOptions | None, task: Task, corpus: Corpus, recipe: Recipe
) -> PrivacyPlan | UnsetType:
    if chosen is None:
        return UNSET
    from moshi_fl.train.private import require_opacus, require_separable, sample_rate

    require_opacus()
    rate = sample_rate(task, corpus, recipe)
    windows = round(recipe.batch_size * recipe.accumulation / rate)
    if chosen.delta * windows >= 1:
        raise ConfigError(
            f"delta = {chosen.delta:g} means little for {windows:,} windows: one of them could be "
            "given away entirely.",
            hint=f"--dp-delta {0.1 / windows:.0e}",
        )
    require_separable(task.build(), task, corpus)
    return PrivacyPlan(
        noise_multiplier=chosen.noise_multiplier,
        max_gradient_norm=chosen.max_gradient_norm,
        delta=chosen.delta,
        sample_rate=rate,
    )


def _unless(value: T, default: T) -> T | UnsetType:
    return UNSET if value == default else value


def _seed(options: Options, snapshot: Snapshot) -> int:
    """The seed asked for, or one of the contributor's own that is new in each round."""
    if options.seed is not None:
        return options.seed
    return int(sha256_bytes(f"{options.contributor}/{snapshot.round}".encode())[:8], 16)


def _steps(snapshot: Snapshot, task: Task, corpus: Corpus, recipe: Recipe, options: Options) -> int:
    if options.steps is not None:
        return options.steps
    if options.epochs is not None:
        return steps_for_epochs(corpus, recipe.batch_size * recipe.accumulation, options.epochs)
    if options.minutes is not None:
        from moshi_fl.models.common import model_of

        module = model_of(task, snapshot.load())
        return calibrate(module, task, corpus, recipe, minutes=options.minutes)
    return snapshot.state.config.training.steps


def recipe_of(plan: RunPlan) -> Recipe:
    """The training recipe of a plan."""
    training = plan.training
    accumulation = _or(plan.accumulation, 1)
    return Recipe(
        steps=training.steps,
        batch_size=training.batch_size // accumulation,
        accumulation=accumulation,
        schedule=_or(plan.schedule, "one-cycle"),
        beta2=_or(plan.beta2, BETA2),
        learning_rate=training.learning_rate,
        weight_decay=plan.weight_decay,
        gradient_clip=plan.gradient_clip,
        warmup_fraction=plan.warmup_fraction,
        precision=training.precision,
        trains=plan.part,
        seed=training.seed,
        device=plan.device,
        **_private_fields(_or(plan.privacy, None)),
    )


def _or(value: T | UnsetType, default: D) -> T | D:
    return default if isinstance(value, UnsetType) else value
