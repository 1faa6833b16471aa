"""The two ends of a simulated round: what a virtual client sends, and the server that takes it.

A client's delta takes the way of a real one: trained by the ClientApp, encoded with the error
feedback of that client, written as a delta file, and read back as a stranger's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moshi_fl.aggregate import Step, Update
from moshi_fl.aggregate.centers import median
from moshi_fl.aggregate.gram import norms
from moshi_fl.aggregate.robust import next_running_norm
from moshi_fl.codec.base import Codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.errors import ConfigError, TrainingError
from moshi_fl.flower import (
    PREFIX,
    STATELESS,
    FlowerRound,
    Reply,
    arrays_in,
    metrics_in,
    named_strategy,
    train_message,
)
from moshi_fl.hubfile import AggregationRules
from moshi_fl.records import Scalar
from moshi_fl.rules import MEASURES_NORMS, Shapes, contribution_weight, shapes_of, weighting
from moshi_fl.strategies import find_strategy
from moshi_fl.weights import Weights, open_weights, save_weights
from moshi_sdk.grid import LocalGrid

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy


class Server(Protocol):
    """Chooses nodes and turns what they send into a step, round after round."""

    def configure(self, grid: LocalGrid) -> Mapping[int, Mapping[str, Any]]:
        """Begin a round: nodes to train, in order, and settings asked of each."""
        ...

    def aggregate(self, replies: Mapping[int, Reply]) -> Step:
        """End the round."""
        ...


@dataclass
class _Stateless:
    """A strategy as a hub uses it: every node that is online.

    All that it may know of earlier rounds is their norms, as in the records of a hub.
    """

    name: str
    options: Mapping[str, Scalar]
    shapes: Shapes
    running_norm: float = 0.0

    def configure(self, grid: LocalGrid) -> Mapping[int, Mapping[str, Any]]:
        return {node: {} for node in grid.online}

    def aggregate(self, replies: Mapping[int, Reply]) -> Step:
        updates, options = [reply.update for reply in replies.values()], dict(self.options)
        if self.name in MEASURES_NORMS:
            options["running_norm"] = self.running_norm
            self.running_norm = next_running_norm(median(norms(updates)), self.running_norm)
        return find_strategy(self.name, options).aggregate(updates, self.shapes)


def server(
    rules: AggregationRules, shapes: Shapes, strategy: FlowerStrategy | None = None
) -> Server:
    """The server for a strategy by name, or for a strategy object of Flower's.

    Raises:
        ConfigError: Unknown strategy or option.
    """
    if strategy is not None:
        return FlowerRound(strategy, shapes)
    name = rules.strategy
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in STATELESS:
        return FlowerRound(named_strategy(name, rules.options), shapes)
    find_strategy(name, rules.options)  # a mistake in it is said before anyone trains
    return _Stateless(name, rules.options, shapes)


@dataclass(frozen=True)
class Sent:
    """A client's part of a round: what the server hears, and how many bytes that took."""

    reply: Reply
    bytes: int


@dataclass(frozen=True)
class Uplink:
    """Lets clients train, and encodes what they learned.

    Args:
        grid: The clients.
        codec: How deltas are encoded.
        rules: How examples become weights.
        folder: Where each client's error feedback lies between rounds.
    """

    grid: LocalGrid
    codec: Codec
    rules: AggregationRules
    folder: Path

    def train(self, node: int, weights: Weights, asked: Mapping[str, Any]) -> Sent:
        """One client's turn, from these global weights and with these settings.

        Raises:
            TrainingError: Its loss is not finite.
        """
        message = train_message(weights, self._settings(asked), node)
        try:
            (answer,) = self.grid.send_and_receive([message])
        except TrainingError as error:
            raise TrainingError(
                f"client {node}: {error}", hint="lower the learning rate"
            ) from error
        figures = metrics_in(answer)
        trained = arrays_in(answer)
        data = self._encode(node, {name: trained[name] - weights[name] for name in weights})
        delta = Delta.parse(data, shapes_of(weights), self.codec, f"client {node}")
        weight = contribution_weight(weighting(self.rules), int(str(figures["num-examples"])), 0)
        update = Update(f"{node:06}", weight, delta)
        return Sent(Reply(update, float(str(figures["train-loss"]))), len(data))

    def _settings(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        unknown = sorted(set(asked) - set(self.grid.settings) - {"server-round"})
        if unknown:
            raise ConfigError(
                f"the strategy asks clients for {unknown[0]!r}, which they do not do.",
                hint=f"clients obey: {', '.join(self.grid.settings)}",
            )
        return asked

    def _encode(self, node: int, delta: Weights) -> bytes:
        path = self.folder / f"{node}.safetensors"
        carry = open_weights(path) if path.exists() else None
        entries, rest = encode_delta(delta, self.codec, carry)
        save_weights(path, rest)
        return delta_bytes(entries, self.codec)
