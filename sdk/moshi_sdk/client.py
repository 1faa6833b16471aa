"""The Flower client: one ``ClientApp`` for contributions, simulations and live federations.

The message brings the model's family, its settings, the recipe and the weights; the node's own
configuration says where its data lies and where to keep checkpoints. The reply carries the trained
weights, all of them unless the message says otherwise, and ``num-examples``, as every Flower
strategy expects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from moshi_fl.errors import ConfigError
from moshi_fl.flower import ARRAYS, METRICS, arrays_in, config_in, to_arrays
from moshi_fl.models import get_family
from moshi_fl.models.common import able_to_read, extract_weights, model_of
from moshi_fl.models.family import Corpus, Task
from moshi_fl.train import Progress, Recipe, train

ONLY_TRAINED = "only-trained"
"""Key of a message's ``config``: the reply shall hold what trained and nothing else."""

OnStep = Callable[[Progress], None]
_on_step: ContextVar[OnStep | None] = ContextVar("on_step", default=None)
_corpus: ContextVar[Corpus | None] = ContextVar("corpus", default=None)

app = ClientApp()


@dataclass(frozen=True)
class Job:
    """What one client is asked to train, from a message and the node's own configuration."""

    task: Task
    recipe: Recipe
    corpus: Corpus
    checkpoint: Path | None


@contextmanager
def watched(on_step: OnStep | None, corpus: Corpus | None = None) -> Iterator[None]:
    """Let a caller in this process see each step, and lend the data that it has already read."""
    tokens = _on_step.set(on_step), _corpus.set(corpus)
    try:
        yield
    finally:
        _on_step.reset(tokens[0])
        _corpus.reset(tokens[1])


def job_config(
    family: str, model: Mapping[str, Any], tokenizer: bytes, recipe: Recipe
) -> dict[str, Any]:
    """The ``config`` record of a train message: everything a client needs except data."""
    return {
        "family": family,
        "model": json.dumps(dict(model)),
        "tokenizer": tokenizer,
        **{key.replace("_", "-"): value for key, value in asdict(recipe).items()},
    }


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train the weights in the message on this node's data and reply with what became of them."""
    job = _job(message, context)
    module = model_of(job.task, arrays_in(message))
    result = train(
        module,
        job.task,
        job.corpus,
        job.recipe,
        checkpoint=job.checkpoint,
        on_step=_on_step.get(),
    )
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": job.recipe.steps * job.recipe.batch_size * job.recipe.accumulation,
        "train-loss": result.loss,
        "steps": job.recipe.steps,
    }
    weights = extract_weights(module, only_trained=bool(config_in(message).get(ONLY_TRAINED)))
    content = RecordDict({ARRAYS: to_arrays(weights), METRICS: MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_client(message: Message, context: Context) -> Message:
    """Measure the weights in the message on this node's held-out data."""
    job = _job(message, context)
    module = model_of(job.task, arrays_in(message))
    pool = job.task.pool(job.corpus, 32, seed=job.recipe.seed, held_out=True)
    losses = job.task.evaluate(module, pool, torch.device(job.recipe.device))
    metrics = MetricRecord({"num-examples": len(losses), "loss": float(losses.mean())})
    return Message(content=RecordDict({METRICS: metrics}), reply_to=message)


def _job(message: Message, context: Context) -> Job:
    config = config_in(message)
    model, tokenizer = json.loads(str(config["model"])), config["tokenizer"]
    if not isinstance(tokenizer, bytes):
        raise ConfigError("the message's tokenizer is not bytes.")
    task = get_family(str(config["family"])).load(model, tokenizer)
    recipe = _recipe(config)
    checkpoint = str(context.node_config.get("checkpoint", ""))
    corpus = _corpus.get()
    if corpus is None:
        reader = able_to_read(task, lambda: arrays_in(message))
        corpus = _read(reader, context, recipe.seed)
    return Job(task, recipe, corpus, Path(checkpoint) if checkpoint else None)


def _recipe(config: ConfigRecord) -> Recipe:
    """What the message says of it; the rest as it is by default."""
    values: dict[str, Any] = {}
    for key, default in asdict(Recipe(steps=1)).items():
        if key.replace("_", "-") in config:
            values[key] = type(default)(config[key.replace("_", "-")])
    return Recipe(**values)


def _read(task: Task, context: Context, seed: int) -> Corpus:
    data = str(context.node_config.get("data") or context.run_config.get("data") or "")
    if not data:
        raise ConfigError(
            "this node does not say where its data lies.",
            hint="flower-supernode --node-config \"data='/path/to/code'\"",
        )
    paths = data.split(os.pathsep)
    if "partition-id" in context.node_config:  # a virtual node of a simulation takes its share
        paths = [paths[int(context.node_config["partition-id"]) % len(paths)]]
    return task.read([Path(path) for path in paths], seed=seed)
