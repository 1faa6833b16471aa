"""Ten contributors with different code, a sealed held-out pool, and a model that learns in seconds.

The data is Python's own standard library, so that every machine has it: each contributor holds
other packages of it (non-IID), split by file; a tenth of each one's files is held out, and the pool
mixes those. What the contributors begin with is a state that was trained on a little of everything.
"""

from __future__ import annotations

import sysconfig
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, delta_bytes, encode_delta
from moshi_fl.hubfile import HubConfig, parse_hubfile
from moshi_fl.models import get_preset
from moshi_fl.models.char import CharConfig
from moshi_fl.models.char_corpus import CharCorpus, stream
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.common import extract_weights, load_weights
from moshi_fl.models.family import Preset
from moshi_fl.rules import shapes_of
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.train import Recipe, train
from moshi_fl.weights import Weights, weights_digest
from moshi_hub.create import Plan, render_hubfile

Losses = NDArray[np.float64]
SHARES = (
    ("asyncio",),
    ("email",),
    ("http", "urllib", "html", "wsgiref", "xmlrpc"),
    ("importlib", "zoneinfo", "venv", "collections"),
    ("multiprocessing", "concurrent"),
    ("json", "logging", "re", "tomllib"),
    ("unittest",),
    ("xml", "dbm"),
    ("ctypes", "curses", "sqlite3"),
    ("argparse.py", "ast.py", "configparser.py", "dataclasses.py", "datetime.py", "doctest.py"),
)
"""Packages and modules of the standard library that each contributor holds."""

MODEL = {"n_layer": 1, "n_head": 2, "d_model": 32, "d_ff": 96, "context": 48}
MAX_BYTES = 250_000
KEPT = 1500  # trained deltas that are remembered; about 140 kB each


@dataclass(frozen=True)
class Geometry:
    """How long a federation runs, and on how many sequences it is judged."""

    rounds: int = 3
    steps: int = 15
    batch_size: int = 16
    learning_rate: float = 1e-3
    first_steps: int = 150
    verdict_sequences: int = 256
    held_out_sequences: int = 512


FULL = Geometry()
LATE = Geometry(first_steps=400)
"""A hub that hardly learns any more: most single deltas make its model worse, their mean better."""
SHORT = Geometry(rounds=2, verdict_sequences=128, held_out_sequences=256)


def preset() -> Preset:
    """The preset ``tiny`` with a smaller model; codec, recipe and server's rate as they are."""
    tiny = get_preset("char", "tiny")
    return replace(tiny, model={**tiny.model, **MODEL})


class World:
    """Everything that does not depend on who attacks and how one defends."""

    def __init__(self, geometry: Geometry = FULL) -> None:
        self.geometry = geometry
        plan = Plan(url="hub.git", family="char", preset="tiny", name="attacked")
        self.config: HubConfig = parse_hubfile(render_hubfile(plan, preset()))
        config = CharConfig(**self.config.model_table)
        self.task = CharTask(config, CharVocabulary())
        self.codec = get_codec(self.config.delta.codec, self.config.delta.options)
        self.corpora = [self._read(names) for names in SHARES]
        self.verdict_pool, self.held_out = self._pools()
        self._module = self.task.build()
        self._trained: OrderedDict[Any, dict[str, np.ndarray]] = OrderedDict()
        self._judged: OrderedDict[Any, Losses] = OrderedDict()
        self.start = self._first_weights()
        self.shapes = shapes_of(self.start)

    def _read(self, names: tuple[str, ...]) -> CharCorpus:
        library = Path(sysconfig.get_path("stdlib"))
        paths = [path for name in names if (path := library / name).exists()]
        return self.task.read(paths, seed=0, max_bytes=MAX_BYTES)

    def _pools(self) -> tuple[Tensor, Tensor]:
        """Two sets of windows that share no place: the hub's pool, and what the table shows."""
        wanted = self.geometry.verdict_sequences, self.geometry.held_out_sequences
        share = -(-sum(wanted) // len(self.corpora))
        rows = [self._windows(corpus, share, number) for number, corpus in enumerate(self.corpora)]
        mixed = np.random.default_rng(0).permutation(np.concatenate(rows))
        every = torch.from_numpy(mixed[: sum(wanted)].astype(np.int64))
        return every[: wanted[0]], every[wanted[0] :]

    def _windows(self, corpus: CharCorpus, count: int, seed: int) -> np.ndarray:
        tokens = stream(self.task.vocabulary, corpus.split.held_out)
        length = corpus.context + 1
        whole = tokens[: len(tokens) // length * length].reshape(-1, length)
        chosen = np.random.default_rng(seed).permutation(len(whole))[:count]
        return whole[chosen]

    def _first_weights(self) -> dict[str, np.ndarray]:
        """A state that knows a little of everything: trained on the contributors' data pooled."""
        tokens = np.concatenate([corpus.tokens for corpus in self.corpora])
        pooled = replace(self.corpora[0], tokens=tokens)
        recipe = Recipe(steps=self.geometry.first_steps, batch_size=8, learning_rate=3e-3, seed=7)
        load_weights(self._module, self.task.initial_weights(0))
        train(self._module, self.task, pooled, recipe)
        return extract_weights(self._module)

    @property
    def contributors(self) -> int:
        """How many there are, hostile ones included."""
        return len(self.corpora)

    def trained(
        self, weights: Weights, client: int, number: int, how: str = "", **what: Any
    ) -> dict[str, np.ndarray]:
        """The delta of a client's turn in round ``number``, on these weights.

        ``how`` names training that is not the honest one: ``what`` then has another ``task``, or
        fields of the recipe.
        """
        key = (weights_digest(weights), client, number, how)
        return _remembered(self._trained, key, lambda: self._train(weights, client, number, **what))

    def _train(
        self,
        weights: Weights,
        client: int,
        number: int,
        *,
        task: CharTask | None = None,
        **recipe: Any,
    ) -> dict[str, np.ndarray]:
        g, seed = self.geometry, 1000 * number + client
        usual = Recipe(
            steps=g.steps, batch_size=g.batch_size, learning_rate=g.learning_rate, seed=seed
        )
        load_weights(self._module, weights)
        train(self._module, task or self.task, self.corpora[client], replace(usual, **recipe))
        after = extract_weights(self._module)
        return {name: after[name] - weights[name] for name in after}

    def encoded(self, delta: Weights) -> bytes:
        """The delta as a file in the hub's codec, without error feedback."""
        return delta_bytes(encode_delta(delta, self.codec)[0], self.codec)

    def decoded(self, data: bytes) -> dict[str, np.ndarray]:
        """What a delta file says, tensor by tensor; tensors that it lacks are zero."""
        delta = Delta.parse(data, self.shapes, self.codec, "a delta")
        return {
            name: delta.decode(name) if name in delta.shapes else np.zeros(shape, np.float32)
            for name, shape in self.shapes.items()
        }

    def losses(self, weights: Weights, rows: Tensor) -> Losses:
        """Mean loss of each sequence in nats per token, shape (sequences,)."""
        key = (weights_digest(weights), id(rows))
        return _remembered(self._judged, key, lambda: self._losses(weights, rows))

    @torch.inference_mode()
    def _losses(self, weights: Weights, rows: Tensor) -> Losses:
        load_weights(self._module, weights)
        self._module.eval()
        logits = self._module(rows[:, :-1]).transpose(1, 2)
        return F.cross_entropy(logits, rows[:, 1:], reduction="none").double().mean(1).numpy()

    def loss(self, weights: Weights) -> float:
        """Held-out loss, on sequences that no verdict is made of."""
        if not all(np.isfinite(array).all() for array in weights.values()):
            return float("nan")
        return float(self.losses(weights, self.held_out).mean())

    @torch.inference_mode()
    def continuations(self, weights: Weights, trigger: str, count: int, length: int) -> Tensor:
        """What the model writes, taking the likeliest token each time, after held-out text and a
        trigger: token ids (count, length).
        """
        load_weights(self._module, weights)
        self._module.eval()
        marks = torch.from_numpy(self.task.vocabulary.encode(trigger).astype(np.int64))
        room = self.task.config.context - len(marks) - length
        tokens = torch.cat([self.held_out[:count, :room], marks.expand(count, -1)], 1)
        for _ in range(length):
            tokens = torch.cat([tokens, self._module(tokens)[:, -1:].argmax(-1)], 1)
        return tokens[:, -length:]


def _remembered(table: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in table:
        table[key] = make()
        if len(table) > KEPT:
            table.popitem(last=False)
    table.move_to_end(key)
    return table[key]
