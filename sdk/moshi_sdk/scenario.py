"""What a simulation is about: model, rules, first weights, and how many clients train how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from moshi_fl.errors import ConfigError
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import get_preset
from moshi_fl.records import Scalar
from moshi_fl.train import Recipe
from moshi_fl.weights import Weights
from moshi_sdk.sync import SyncManager


@dataclass(frozen=True)
class Options:
    """How to simulate; None leaves it to the recipe of the preset or the hub.

    Attributes:
        clients: How many virtual clients share the data.
        rounds: How many rounds to train.
        fraction: Share of the clients that take part in a round, drawn by the seed.
        steps: Training steps of each client in each round.
        batch_size: Windows per step.
        learning_rate: Peak of the one-cycle schedule.
        trains: The part of the model that learns, where its family has parts.
        device: A torch device.
        split: ``iid`` or ``directory``, see ``moshi_sdk.partition``.
        strategy: ``fedavg``, ``median``, ``trimmed-mean``, or Flower's, such as ``flower:FedAdam``.
        strategy_options: What the strategy takes, such as ``{"trim": 0.2}``.
        codec: ``topk``, ``int8``, ``f16`` or ``f32``.
        codec_options: What the codec takes, such as ``{"keep": 32}``.
        seed: Decides the split, the first weights, who takes part, and batches.

    Raises:
        ConfigError: A number out of range.
    """

    clients: int = 10
    rounds: int = 5
    fraction: float = 1.0
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    trains: str | None = None
    device: str = "cpu"
    split: str = "iid"
    strategy: str | None = None
    strategy_options: Mapping[str, Scalar] = field(default_factory=dict)
    codec: str | None = None
    codec_options: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("clients", "rounds"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} = {getattr(self, key)} must be at least 1.")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction = {self.fraction} must be above 0 and at most 1.")


@dataclass(frozen=True)
class Start:
    """What is trained, by which rules, and from which weights (None: new ones, by the seed)."""

    config: HubConfig
    tokenizer: bytes
    weights: Weights | None = None


def from_preset(
    family: str = "char", preset: str = "tiny", *, model: Mapping[str, Any] | None = None
) -> Start:
    """Start as a new hub of this family would, but with plain federated averaging.

    Args:
        family: Name of the model family.
        preset: Name of its ready-made settings.
        model: Settings of the model that replace the preset's.

    Raises:
        ConfigError: There is no such family or preset.
    """
    chosen = get_preset(family, preset)
    tables = {
        "hub": {"format": 1, "id": "0" * 16, "name": "simulation"},
        "model": {**chosen.model, **(model or {}), "family": family},
        "training": dict(chosen.training),
        "delta": dict(chosen.delta),
        "evaluation": dict(chosen.evaluation),
    }
    return Start(msgspec.convert(tables, HubConfig), chosen.tokenizer)


def from_hub(hub: str, *, home: Path | None = None) -> Start:
    """Start from a hub's newest round and its rules; nothing will be sent there.

    Raises:
        HubError: The hub does not answer, and there is no copy of it on this machine.
    """
    snapshot = SyncManager(hub, home=home).pull()
    return Start(snapshot.state.config, snapshot.state.tokenizer, snapshot.load())


def settle(config: HubConfig, options: Options) -> HubConfig:
    """The rules with what the options say about codec and strategy."""
    delta, aggregation = config.delta, config.aggregation
    if options.codec or options.codec_options:
        delta = msgspec.structs.replace(
            delta, codec=options.codec or delta.codec, options=dict(options.codec_options)
        )
    if options.strategy or options.strategy_options:
        aggregation = msgspec.structs.replace(
            aggregation,
            strategy=options.strategy or aggregation.strategy,
            options=dict(options.strategy_options),
        )
    return msgspec.structs.replace(config, delta=delta, aggregation=aggregation)


def recipe(config: HubConfig, options: Options) -> Recipe:
    """How each client trains in each round.

    Raises:
        ConfigError: A value out of range; names the field.
    """
    rules = config.training
    return Recipe(
        steps=rules.steps if options.steps is None else options.steps,
        batch_size=rules.batch_size if options.batch_size is None else options.batch_size,
        learning_rate=(
            rules.learning_rate if options.learning_rate is None else options.learning_rate
        ),
        accumulation=rules.accumulation,
        schedule=rules.schedule,
        weight_decay=rules.weight_decay,
        beta2=rules.beta2,
        gradient_clip=rules.gradient_clip,
        warmup_fraction=rules.warmup_fraction,
        precision=rules.precision,
        trains=options.trains or rules.trains,
        seed=options.seed,
        device=options.device,
    )
