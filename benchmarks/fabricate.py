"""A real hub whose contributions were never trained: everything but their values is as in life.

A fabricated delta is drawn from Student's t distribution (4 degrees of freedom: heavy tails, as the
deltas of AdamW have them), then goes the way of a trained one: encoded with the hub's codec, sent
by ``moshi_sdk``, judged, merged and published by ``moshi_hub``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.history import DELTA_FILE, HubState
from moshi_fl.hubfile import HubConfig
from moshi_fl.records import Contribution, Metrics, Training, dump
from moshi_fl.replica import Replica
from moshi_fl.rules import Shapes, shapes_of
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, own_signer
from moshi_fl.submit import Sent, delta_location, submit
from moshi_fl.weights import Array, Weights, sha256_bytes
from moshi_hub.create import Plan, create
from moshi_hub.merge import Options, Outcome, merge
from moshi_hub.propose import Evaluator

SCALE = 3e-4  # typical change of a weight after 200 steps at a learning rate of 1e-3


@dataclass(frozen=True)
class Fabricated:
    """A hub in a folder of its own, with the homes of its maintainer and its contributors."""

    folder: Path
    seed: int = 0

    @property
    def url(self) -> str:
        """The hub's address on this machine."""
        return str(self.folder / "hub.git")

    @property
    def maintainer(self) -> Replica:
        """The replica that merges."""
        return Replica(self.url, self.folder / "maintainer")

    @property
    def contributors(self) -> Replica:
        """The replica that contributors share; what it costs them is measured elsewhere."""
        return Replica(self.url, self.folder / "contributors")

    def create(self, preset: str) -> None:
        """Publish round 0 of a char preset."""
        plan = Plan(url=self.url, family="char", preset=preset, name="a fabricated hub")
        create(plan, self.folder / "maintainer")

    def round(self, contributions: int) -> Outcome:
        """One round: so many contributions, then a published merge."""
        sender = self.contributors
        state = sender.look()
        shapes = shapes_of(self.maintainer.pull().load())
        for index in range(contributions):
            contribute(sender, state, shapes, name=f"contributor-{index}", seed=self.seed)
        return merge(self.maintainer, Options(publish=True), evaluator=fabricated_evaluator)


def contribute(sender: Replica, state: HubState, shapes: Shapes, *, name: str, seed: int) -> Sent:
    """Fabricate one contribution to the newest round and send it."""
    delta = fabricated_delta(shapes, [seed, state.newest.round, *name.encode()])
    data = encoded(delta, state.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DELTA_FILE
        path.write_bytes(data)
        signer = own_signer(sender.folder / "people" / name)
        record = fabricated_record(sender, state, data, name, signer.public_key)
        signature = signer.sign(dump(record), CONTRIBUTION_NAMESPACE)
        return submit(sender, state, record, signature, path, sender.repo)


def fabricated_delta(shapes: Shapes, seed: list[int]) -> dict[str, Array]:
    """A delta of heavy-tailed noise; equal seeds give equal deltas.

    All are cut from one long stretch of noise, each from a place of its own: drawing millions of
    such numbers again for every contribution would take longer than all the rest.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    flat = np.roll(_noise(total), int(np.random.default_rng(seed).integers(total)))
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


@cache
def _noise(size: int) -> Array:
    return (SCALE * np.random.default_rng(0).standard_t(4, size)).astype(np.float32)


def encoded(delta: Weights, config: HubConfig) -> bytes:
    """The delta file that the hub prescribes."""
    codec = get_codec(config.delta.codec, config.delta.options)
    return delta_bytes(encode_delta(delta, codec)[0], codec)


def fabricated_record(
    sender: Replica, state: HubState, data: bytes, name: str, key: str
) -> Contribution:
    """The record of a delta, with every field that a trained one has."""
    newest, sha256 = state.newest, sha256_bytes(data)
    loss = np.random.default_rng(list(sha256.encode())).uniform(0.5, 3.0)
    return Contribution(
        hub=newest.hub,
        round=newest.round,
        base=newest.weights,
        family=state.config.family,
        codec=state.config.delta.codec,
        contributor=name,
        key=key,
        delta=delta_location(sender.repo, state.refs, newest.round, data),
        num_examples=1600,
        training=Training(
            steps=200,
            batch_size=8,
            learning_rate=1e-3,
            seed=int(sha256[:8], 16),
            precision="fp32",
        ),
        metrics=Metrics(
            held_out_before=round(float(loss), 6), held_out_after=round(float(loss) * 0.97, 6)
        ),
        software=newest.software,
    )


def fabricated_evaluator(config: HubConfig) -> Evaluator:
    """Losses as long and as unpredictable as measured ones."""

    def evaluate(weights: Weights, _tokenizer: bytes) -> tuple[float, int, str]:
        first = next(iter(weights.values())).reshape(-1)[:64].tobytes()
        loss = np.random.default_rng(list(first)).uniform(0.5, 3.0)
        return float(loss), config.evaluation.sequences, sha256_bytes(b"pool")

    return evaluate


def clone_bytes(folder: Path) -> Mapping[str, int]:
    """Bytes below the ``.git`` of a clone: all of it, and its packs alone."""
    files = [path for path in (folder / ".git").rglob("*") if path.is_file()]
    packs = [path for path in files if path.suffix == ".pack"]
    return {
        "all": sum(path.stat().st_size for path in files),
        "packs": sum(path.stat().st_size for path in packs),
    }
