"""The bridge to Flower: messages, array records, and any Flower strategy in delta space.

Importing this costs half a second, so commands that neither train nor aggregate with Flower do not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import logging

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from moshi_fl.aggregate import Step, Update
from moshi_fl.errors import ConfigError
from moshi_fl.records import Scalar
from moshi_fl.rules import Shapes
from moshi_fl.weights import Weights

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
PREFIX = "flower:"
STATEFUL = {"FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"}
"""Strategies that remember earlier rounds, and ask nothing special of a client."""
STATELESS = {"FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"}
"""Strategies whose result depends on one round's replies alone."""

logging.getLogger("flwr").setLevel(logging.WARNING)


def to_arrays(weights: Weights) -> ArrayRecord:
    """Weights as a Flower record, in canonical order."""
    return ArrayRecord({name: Array(np.asarray(weights[name])) for name in sorted(weights)})


class _Decoded(Mapping[str, NDArray[np.float32]]):
    """Of the bytes that Flower keeps, each array when it is asked for.

    So a large model is not in memory once more.
    """

    def __init__(self, arrays: ArrayRecord) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._arrays[name].numpy(), dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._arrays))

    def __len__(self) -> int:
        return len(self._arrays)


def to_weights(arrays: ArrayRecord) -> Mapping[str, NDArray[np.float32]]:
    """A Flower record as float32 weights, in canonical order."""
    return _Decoded(arrays)


def arrays_in(message: Message) -> Mapping[str, NDArray[np.float32]]:
    """The weights that a message carries."""
    record = message.content[ARRAYS]
    if not isinstance(record, ArrayRecord):
        raise ConfigError(f"the message's {ARRAYS!r} is no array record.")
    return to_weights(record)


def metrics_in(message: Message) -> MetricRecord:
    """The figures that a reply carries."""
    record = message.content[METRICS]
    if not isinstance(record, MetricRecord):
        raise ConfigError(f"the message's {METRICS!r} is no metric record.")
    return record


def config_in(message: Message) -> ConfigRecord:
    """The settings that a message carries."""
    record = message.content[CONFIG]
    if not isinstance(record, ConfigRecord):
        raise ConfigError(f"the message's {CONFIG!r} is no config record.")
    return record


def train_message(weights: Weights, config: Mapping[str, Scalar | bytes], node: int = 0) -> Message:
    """A ``train`` message as a server would send it, made without a running federation.

    Flower has no public way to do that, so this is the one place that uses ``make_message``.
    """
    content = RecordDict({ARRAYS: to_arrays(weights), CONFIG: ConfigRecord(dict(config))})
    return make_message(metadata=_metadata("train", node), content=content)


def with_config(message: Message, defaults: Mapping[str, Scalar | bytes]) -> Message:
    """The same message with the settings that its ``config`` lacks; what it says itself stays."""
    said = message.content.config_records.get(CONFIG, ConfigRecord())
    content = RecordDict(dict(message.content))
    content[CONFIG] = ConfigRecord({**defaults, **said})
    return make_message(metadata=message.metadata, content=content)


def identify_process() -> None:
    """Let messages be made in this process although no Flower run is going on in it.

    Flower asks who sends a message, and knows only inside a run; it has no public way to say so.
    """
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 1


def _metadata(kind: str, node: int = 0) -> Metadata:
    return Metadata(
        run_id=0,
        message_id=f"{kind}-{node}",
        src_node_id=0,
        dst_node_id=node,
        reply_to_message_id="",
        group_id="0",
        created_at=time.time(),
        ttl=86_400.0,
        message_type=kind,
    )


def local_context(**node_config: Scalar) -> Context:
    """The context of a client that runs in this process."""
    return Context(
        run_id=0, node_id=0, node_config=dict(node_config), state=RecordDict(), run_config={}
    )


def flower_strategy(name: str, options: Mapping[str, Scalar]) -> FlowerStrategy:
    """One of Flower's strategies, named such as ``flower:FedMedian``.

    Raises:
        ConfigError: Unknown, or one that cannot work on a hub.
    """
    if not name.startswith(PREFIX):
        raise ConfigError(f"there is no strategy {name!r}.", hint=f"Flower's: {PREFIX}FedMedian")
    return FlowerStrategy(name.removeprefix(PREFIX), options)


class FlowerStrategy:
    """Runs a Flower strategy unmodified, on deltas instead of weights.

    Distance-based strategies need this: on whole float32 weights their squared distances cancel.
    Adding the result to the base is the same as aggregating weights for all linear strategies.
    """

    def __init__(self, name: str, options: Mapping[str, Scalar]) -> None:
        if name not in STATELESS:
            known = ", ".join(sorted(STATELESS))
            raise ConfigError(
                f"Flower's strategy {name!r} cannot merge a round: it is unknown, or keeps state "
                f"from round to round that a hub does not hold.",
                hint=f"usable here: {known}; the others run in a live Flower federation",
            )
        try:
            self._strategy = getattr(flower_strategies, name)(**dict(options))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options of {PREFIX}{name}: {error}") from error

    def aggregate(
        self, updates: Sequence[Update], shapes: Shapes
    ) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Aggregate deltas as Flower would aggregate weights; see ``moshi_fl.aggregate``."""
        ordered = sorted(updates, key=lambda update: update.id)
        replies = [self._reply(node, update, shapes) for node, update in enumerate(ordered, 1)]
        arrays, _ = self._strategy.aggregate_train(1, replies)
        if arrays is None:
            raise ConfigError(f"{type(self._strategy).__name__} made nothing of {len(ordered)}.")
        for name in sorted(arrays):
            yield name, np.asarray(arrays[name].numpy(), dtype=np.float64)

    def _reply(self, node: int, update: Update, shapes: Shapes) -> Message:
        content = RecordDict(
            {
                ARRAYS: to_arrays(_dense(update, shapes)),
                METRICS: MetricRecord({"num-examples": update.weight}),
            }
        )
        return make_message(metadata=_metadata("train", node), content=content)


def _dense(update: Update, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    carried = set(update.delta.names)
    dense = {}
    for name, shape in shapes.items():
        whole = np.zeros(shape, dtype=np.float32)
        if name in carried:
            delta = update.delta.decode(name)
            whole.reshape(-1)[: delta.size] = delta.reshape(-1)
        dense[name] = whole
    return dense


def named_strategy(name: str, options: Mapping[str, Scalar]) -> Strategy:
    """One of Flower's strategies that keep state, named such as ``flower:FedAdam``.

    Raises:
        ConfigError: There is none of this name, or it does not take these options.
    """
    kind = name.removeprefix(PREFIX)
    if kind not in STATEFUL:
        known = ", ".join(sorted(PREFIX + known for known in STATEFUL | STATELESS))
        raise ConfigError(
            f"there is no strategy {name!r} to simulate by name.",
            hint=f"{known}; in Python, simulate(strategy=…) takes any strategy object",
        )
    one = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    if taken := sorted(set(options) & {*one, "fraction_train", "fraction_evaluate"}):
        raise ConfigError(f"{name}: {taken[0]} is settled by the number of clients (--fraction).")
    try:
        strategy: Strategy = getattr(flower_strategies, kind)(**one, **dict(options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options of {name}: {error}") from error
    return strategy


@dataclass(frozen=True)
class Reply:
    """What a node sent: its update, and its loss as it states it."""

    update: Update
    loss: float


class FlowerRound:
    """Runs a Flower strategy object, unmodified, over all rounds of a simulation.

    The strategy sees a global model that starts at zero and moves by the steps it makes itself;
    replies are that model plus a delta. Zeros in every round would not do: FedAvgM keeps the
    weights of the round before and would take their difference for a gradient. All of it is
    float64, so that nothing a strategy compares or remembers is lost to rounding.
    """

    def __init__(self, strategy: Strategy, shapes: Shapes) -> None:
        self._strategy = strategy
        self._seen = {name: np.zeros(shapes[name]) for name in sorted(shapes)}
        self._messages: dict[int, Message] = {}
        self._number = 0

    def configure(self, grid: Grid) -> dict[int, ConfigRecord]:
        """Begin a round: the nodes that the strategy chooses, and what it asks of each.

        Raises:
            ConfigError: It chooses none.
        """
        self._number += 1
        arrays = ArrayRecord({name: Array(array) for name, array in self._seen.items()})
        messages = self._strategy.configure_train(self._number, arrays, ConfigRecord(), grid)
        self._messages = {message.metadata.dst_node_id: message for message in messages}
        if not self._messages:
            raise ConfigError(f"{type(self._strategy).__name__} chose no node to train.")
        return {
            node: next(iter(message.content.config_records.values()), ConfigRecord())
            for node, message in sorted(self._messages.items())
        }

    def aggregate(self, replies: Mapping[int, Reply]) -> Step:
        """End the round: how far the strategy moves its model."""
        messages = [self._reply(node, replies[node]) for node in sorted(replies)]
        arrays, _ = self._strategy.aggregate_train(self._number, messages)
        if arrays is None:
            name = type(self._strategy).__name__
            raise ConfigError(f"{name} made nothing of {len(messages)} replies.")
        new = {name: np.asarray(arrays[name].numpy(), np.float64) for name in self._seen}
        step = [(name, new[name] - seen) for name, seen in self._seen.items()]
        self._seen = new
        return step

    def _reply(self, node: int, reply: Reply) -> Message:
        arrays = {name: Array(self._moved(name, reply.update)) for name in self._seen}
        metrics = MetricRecord({"num-examples": reply.update.weight, "train-loss": reply.loss})
        content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: metrics})
        return Message(content, reply_to=self._messages[node])

    def _moved(self, name: str, update: Update) -> NDArray[np.float64]:
        moved = self._seen[name].copy()
        update.delta.add(name, 0, moved.reshape(-1), 1.0)
        return moved
