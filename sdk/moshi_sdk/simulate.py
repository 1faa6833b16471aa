"""Simulate: many virtual clients in one process, with the pieces that a real hub uses.

The ClientApp trains, the codec encodes with error feedback for each client, the strategy
aggregates; only Git is left out. Clients train one after the other, so there is one model in memory
beside the global one however many there are; what error feedback carries lies in temporary files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moshi_fl.aggregate import apply_step
from moshi_fl.codec import get_codec
from moshi_fl.errors import DataError
from moshi_fl.models import task_of
from moshi_fl.models.common import able_to_read, model_of, require_part
from moshi_fl.models.family import Corpus, FindsFiles, Task
from moshi_fl.plot import Chart, Line
from moshi_fl.rules import shapes_of
from moshi_fl.train import Progress
from moshi_fl.weights import Weights
from moshi_sdk.client import job_config
from moshi_sdk.grid import LocalGrid
from moshi_sdk.partition import Share, partition, source_files
from moshi_sdk.scenario import Options, Start, from_hub, from_preset, recipe, settle
from moshi_sdk.virtual import Sent, Uplink, server

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

__all__ = [
    "Client",
    "Federation",
    "Options",
    "RoundResult",
    "Simulation",
    "Start",
    "Turn",
    "from_hub",
    "from_preset",
    "simulate",
]


@dataclass(frozen=True)
class Turn:
    """Where a simulation is: this client's turn in this round, ``place`` (from 0) of ``clients``.

    ``progress`` says how far the client's training is.
    """

    round: int
    client: int
    place: int
    clients: int
    progress: Progress


OnStep = Callable[[Turn], None]
"""Hears of each training step."""


@dataclass(frozen=True)
class Client:
    """One virtual client.

    Attributes:
        number: From 1; also its Flower node id.
        share: Its files.
        examples: How many training windows they make; 0 when it is left out.
        problem: Why it is left out, or what may be wrong with its data; empty when all is well.
    """

    number: int
    share: Share
    examples: int
    problem: str = ""


@dataclass(frozen=True)
class RoundResult:
    """One round; round 0 is the state before training.

    Attributes:
        round: Its number.
        held_out_loss: Of the global model after it, in nats per token, on data no client has.
        client_loss: Mean of the training losses that the clients ended with; None in round 0.
        bytes_up: Mean size of a client's delta, in bytes; None in round 0.
        clients: Numbers of the clients that took part.
        seconds: How long it took.
    """

    round: int
    held_out_loss: float
    client_loss: float | None
    bytes_up: int | None
    clients: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """What came of it.

    Attributes:
        label: What was simulated, in a line.
        rounds: One result for each round, from 0 on.
        clients: All clients, those that were left out too.
        weights: The final global weights.
    """

    label: str
    rounds: tuple[RoundResult, ...]
    clients: tuple[Client, ...]
    weights: Weights = field(repr=False)

    def svg(self) -> str:
        """Both losses over the rounds, as an SVG document."""
        held_out = [(float(entry.round), entry.held_out_loss) for entry in self.rounds]
        clients = [
            (float(entry.round), entry.client_loss)
            for entry in self.rounds
            if entry.client_loss is not None
        ]
        losses = "; ".join(f"round {number:g}: {loss:.4f}" for number, loss in held_out)
        return Chart(
            title="Loss over rounds",
            subtitle=self.label,
            description=f"Held-out loss in nats per token, {self.label}. {losses}.",
            x="Round",
            y="Loss (nats per token)",
            lines=[Line("held-out part", held_out), Line("clients' mean", clients)],
        ).svg()


def simulate(
    data: Sequence[Path | str],
    options: Options | None = None,
    *,
    start: Start | None = None,
    strategy: FlowerStrategy | None = None,
    on_step: OnStep | None = None,
) -> Simulation:
    """Train one model with many virtual clients in this process.

    Args:
        data: Files and folders; split among the clients and a held-out part.
        options: How many clients and rounds, and how to train.
        start: What to train, from ``from_preset`` or ``from_hub``; the tiny ``char`` model if None.
        strategy: A Flower strategy object to aggregate with, instead of one by name.
        on_step: Hears of each training step.

    Raises:
        ConfigError: An option that cannot be used.
        DataError: The data does not suffice for so many clients.
        TrainingError: A client's loss is not finite.

    Example:
        >>> result = simulate(["~/code"], Options(clients=4, rounds=3, steps=20))
        >>> [entry.held_out_loss for entry in result.rounds]
    """
    federation = Federation(data, options, start=start, strategy=strategy)
    rounds = tuple(federation.run(on_step))
    return Simulation(federation.label, rounds, federation.clients, federation.weights)


class Federation:
    """Virtual clients with their data, a held-out part, and the global model.

    Arguments and errors are those of ``simulate``, which is all that most callers need. ``run``
    goes round by round; ``grid`` lends the clients to a Flower ``ServerApp`` instead.
    """

    def __init__(
        self,
        data: Sequence[Path | str],
        options: Options | None = None,
        *,
        start: Start | None = None,
        strategy: FlowerStrategy | None = None,
    ) -> None:
        self.options, start = options or Options(), start or from_preset()
        self.config, self._tokenizer = settle(start.config, self.options), start.tokenizer
        self._recipe = recipe(self.config, self.options)
        self._codec = get_codec(self.config.delta.codec, self.config.delta.options)
        self._task = task_of(self.config, start.tokenizer)
        require_part(self._task, self._recipe.trains)
        self.weights: Weights = start.weights or self._task.initial_weights(self.options.seed)
        """The global weights as they are now."""
        self._reader = able_to_read(self._task, lambda: self.weights)
        self._server = server(self.config.aggregation, shapes_of(self.weights), strategy)
        self._strategy = type(strategy).__name__ if strategy else self.config.aggregation.strategy
        self._deal([Path(path) for path in ([data] if isinstance(data, str) else data)])

    def _deal(self, paths: Sequence[Path]) -> None:
        seed = self.options.seed
        how, count = self.options.split, self.options.clients
        find = self._task.files if isinstance(self._task, FindsFiles) else source_files
        parts = partition(paths, count, how=how, seed=seed, find=find)
        self.held_out = parts.held_out
        """Files that no client has."""
        self._pool = _pool(self._reader, parts.held_out, self.config.evaluation.sequences, seed)
        self._corpora: dict[int, Corpus] = {}
        shares = enumerate(parts.shares, 1)
        self.clients = tuple(self._client(number, share) for number, share in shares)
        """All clients, those that are left out too."""
        if not self._corpora:
            raise DataError(
                f"no client has usable data; client 1: {self.clients[0].problem}",
                hint="fewer --clients, or more --data",
            )

    def _client(self, number: int, share: Share) -> Client:
        try:
            corpus = self._reader.read(share.paths, seed=self.options.seed)
        except DataError as error:
            return Client(number, share, 0, f"left out: {error}")
        self._corpora[number] = corpus
        batch = self._recipe.batch_size
        few = f"only {corpus.num_examples} windows; a batch has {batch}"
        problem = few if corpus.num_examples < batch else ""
        return Client(number, share, corpus.num_examples, problem)

    @property
    def steps(self) -> int:
        """Training steps of each client in each round."""
        return self._recipe.steps

    @property
    def trains(self) -> str:
        """What of the model learns."""
        return self._recipe.trains

    @property
    def label(self) -> str:
        """What is simulated, in a line."""
        options = self.options
        return f"{options.clients} clients, {options.split}, {self._strategy}, {self._codec.name}"

    def grid(self) -> LocalGrid:
        """The clients as a Flower grid of nodes, for a ``ServerApp`` or a strategy's ``start``."""
        config = self.config
        job = job_config(config.family, config.model_table, self._tokenizer, self._recipe)
        return LocalGrid(self._corpora, job)

    def evaluate(self, weights: Weights) -> float:
        """Mean held-out loss of some weights, in nats per token."""
        module = model_of(self._task, weights)
        losses = self._task.evaluate(module, self._pool, torch.device(self.options.device))
        return float(losses.mean())

    def run(self, on_step: OnStep | None = None) -> Iterator[RoundResult]:
        """Train for all rounds, moving ``weights``; yields round 0, which is before training, too.

        Another call goes on from there, with the same draws and without error feedback.

        Raises:
            ConfigError: The strategy asks for what the clients do not do.
            TrainingError: A client's loss is not finite.
        """
        started = time.monotonic()
        loss = self.evaluate(self.weights)
        yield RoundResult(0, loss, None, None, (), time.monotonic() - started)
        with tempfile.TemporaryDirectory(prefix="moshi-fl-simulate-") as folder:
            uplink = Uplink(self.grid(), self._codec, self.config.aggregation, Path(folder))
            for number in range(1, self.options.rounds + 1):
                yield self._round(number, uplink, on_step)

    def _round(self, number: int, uplink: Uplink, on_step: OnStep | None) -> RoundResult:
        started = time.monotonic()
        uplink.grid.online = self._drawn(number)
        sent: dict[int, Sent] = {}
        asked = self._server.configure(uplink.grid)
        for place, node in enumerate(asked):
            hear = partial(Turn, number, node, place, len(asked))
            uplink.grid.on_step = _relay(hear, on_step)
            sent[node] = uplink.train(node, self.weights, asked[node])
        step = self._server.aggregate({node: entry.reply for node, entry in sent.items()})
        rate = self.config.aggregation.server_learning_rate
        self.weights = apply_step(self.weights, step, rate)
        return RoundResult(
            number,
            self.evaluate(self.weights),
            float(np.mean([entry.reply.loss for entry in sent.values()])),
            round(float(np.mean([entry.bytes for entry in sent.values()]))),
            tuple(sent),
            time.monotonic() - started,
        )

    def _drawn(self, number: int) -> list[int]:
        """The clients that take part in a round."""
        nodes = sorted(self._corpora)
        count = max(1, round(self.options.fraction * len(nodes)))
        random = np.random.default_rng([self.options.seed, number])
        return sorted(random.choice(nodes, count, replace=False).tolist())


def _relay(
    hear: Callable[[Progress], Turn], on_step: OnStep | None
) -> Callable[[Progress], None] | None:
    return (lambda progress: on_step(hear(progress))) if on_step else None


def _pool(task: Task, held_out: Share, sequences: int, seed: int) -> bytes:
    try:
        corpus = task.read(held_out.paths, seed=seed)
        return task.pool(corpus, sequences, seed=seed, held_out=False)
    except DataError as error:
        raise DataError(f"the held-out part: {error}", hint="give more --data") from error
