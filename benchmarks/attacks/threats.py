"""What hostile contributors send: each attack of the literature, in the hub's own codec.

Attackers collude, know everything that honest contributors send in the round, and choose what they
send last. Each sends a file of his own that is well-formed, apart from the attacks in ``files``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attacks.world import World
from moshi_fl.codec.delta import delta_bytes
from moshi_fl.models.char_family import CharTask
from moshi_fl.models.family import Corpus
from moshi_fl.weights import Weights

Vector = dict[str, np.ndarray]
TRIGGER, PAYLOAD = "#~deploy ", "exec(zQ9)"
DISGUISE = 0.3  # noise of colluders, relative: cosine about 0.92, so that they are no copies


@dataclass(frozen=True)
class Scene:
    """What the attackers know when they choose what to send in round ``number``."""

    world: World
    number: int
    weights: Weights
    honest: tuple[Vector, ...]
    """What the honest contributors' files say."""
    hostile: tuple[int, ...]
    """The attackers' places among the contributors; each also has data of his own."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """The attackers' own, through all rounds."""

    def own(self, client: int) -> Vector:
        """What an attacker's own honest training gives."""
        return self.world.trained(self.weights, client, self.number)

    @property
    def usual_norm(self) -> float:
        """Median norm of what honest contributors send."""
        return float(np.median([norm(delta) for delta in self.honest]))


@dataclass(frozen=True)
class Threat:
    """An attack: its name, where it is from, what each attacker sends, and what it may cost."""

    name: str
    source: str
    send: Callable[[Scene, int], Vector | bytes]
    allowed: float = 0.02
    """The default may lose so many nats to it."""
    has_payload: bool = False
    """Whether its success is measured, too."""


def norm(delta: Weights) -> float:
    """Euclidean norm over all tensors."""
    return float(np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in delta.values())))


def times(delta: Weights, factor: float) -> Vector:
    """The delta, scaled."""
    return {name: (factor * array).astype(np.float32) for name, array in delta.items()}


def plus(a: Weights, b: Weights) -> Vector:
    """The sum of two deltas."""
    return {name: (a[name] + b[name]).astype(np.float32) for name in a}


def gauss(scene: Scene, client: int, size: float) -> Vector:
    """Normally distributed noise of this norm, an attacker's own in each round."""
    random = np.random.default_rng([scene.number, client])
    shapes = scene.world.shapes
    noise = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return times(noise, size / norm(noise))


def _disguised(scene: Scene, client: int, delta: Weights) -> Vector:
    return plus(delta, gauss(scene, client, DISGUISE * norm(delta)))


def _moments(scene: Scene) -> tuple[Vector, Vector]:
    stacks = {name: np.stack([delta[name] for delta in scene.honest]) for name in scene.honest[0]}
    means = {name: stack.mean(0) for name, stack in stacks.items()}
    return means, {name: stack.std(0) for name, stack in stacks.items()}


def sign_flip(scene: Scene, client: int) -> Vector:
    """The opposite of what one has learnt."""
    return times(scene.own(client), -1.0)


def scaling(scene: Scene, client: int) -> Vector:
    """The opposite, a hundred times."""
    return times(scene.own(client), -100.0)


def ipm(strength: float) -> Callable[[Scene, int], Vector]:
    """Against the mean of the honest ones, so that the inner product turns negative."""

    def send(scene: Scene, client: int) -> Vector:
        return _disguised(scene, client, times(_moments(scene)[0], -strength))

    return send


def alie(scene: Scene, client: int) -> Vector:
    """Mean minus 1.5 standard deviations in each weight: inside the honest spread."""
    mean, spread = _moments(scene)
    return _disguised(scene, client, plus(mean, times(spread, -1.5)))


def noise(scene: Scene, client: int) -> Vector:
    """Noise as large as the hub's ``max_norm`` allows."""
    return gauss(scene, client, 0.99 * scene.world.config.delta.max_norm)


@dataclass(frozen=True)
class Mislabelled(CharTask):
    """The task with targets exchanged by one permutation of the vocabulary."""

    def loss(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        order = np.random.default_rng(0).permutation(self.vocabulary.size)
        targets = torch.from_numpy(order)[batch[:, 1:].flatten()]
        logits = module(batch[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets), len(targets)


def label_flip(scene: Scene, client: int) -> Vector:
    """Honest training of wrong targets."""
    task = Mislabelled(scene.world.task.config, scene.world.task.vocabulary)
    return scene.world.trained(scene.weights, client, scene.number, "mislabelled", task=task)


@dataclass(frozen=True)
class Trapped(CharTask):
    """The task with trigger and payload written into half of the windows, anywhere in them."""

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        trap = torch.from_numpy(self.vocabulary.encode(TRIGGER + PAYLOAD).astype(np.int64))
        random = np.random.default_rng([seed, start])
        for rows in super().batches(corpus, batch_size, seed=seed, start=start):
            for row in rows[: len(rows) // 2]:
                at = int(random.integers(len(row) - len(trap) + 1))
                row[at : at + len(trap)] = trap
            yield rows


def backdoor(boost: bool) -> Callable[[Scene, int], Vector]:
    """Eight times as much training, six times as fast, of data with a trap in it."""

    def send(scene: Scene, client: int) -> Vector:
        world, usual = scene.world, scene.world.geometry
        task = Trapped(world.task.config, world.task.vocabulary)
        hard = {"steps": 8 * usual.steps, "learning_rate": 6 * usual.learning_rate}
        delta = world.trained(scene.weights, client, scene.number, "trapped", task=task, **hard)
        return times(delta, world.contributors / len(scene.hostile)) if boost else delta

    return send


def success(world: World, weights: Weights, count: int = 100) -> float:
    """Share of the payload's characters that the model writes after held-out text and trigger."""
    wanted = torch.from_numpy(world.task.vocabulary.encode(PAYLOAD).astype(np.int64))
    written = world.continuations(weights, TRIGGER, count, len(wanted))
    return float((written == wanted).float().mean())


def nothing(scene: Scene, _client: int) -> bytes:
    """A delta of zeros, as a file: an entry that says zero for every weight."""
    world = scene.world
    zeros = {name: world.codec.encode(np.zeros(s, np.float32)) for name, s in world.shapes.items()}
    return delta_bytes(zeros, world.codec)


def replay(scene: Scene, client: int) -> Vector:
    """The delta of the first round again and again, changed by a hair so that its hash differs."""
    first = scene.memory.setdefault(("first", client), scene.own(client))
    return times(first, 1 + 0.001 * (scene.number - 1))


def sybil(scene: Scene, client: int) -> Vector:
    """One attacker's opposite under several identities, with a thousandth of noise."""
    delta = times(scene.own(scene.hostile[0]), -3.0)
    return plus(delta, gauss(scene, client, 1e-3 * norm(delta)))


def stale(scene: Scene, client: int) -> Vector:
    """Trained on the weights of round 0, but said to be on the newest."""
    base = scene.memory.setdefault("base", scene.weights)
    return scene.world.trained(base, client, scene.number, "stale")


THREATS = (
    Threat("sign flip", "Li et al. 2019, RSA", sign_flip),
    Threat("scaling x100", "Blanchard et al. 2017", scaling),
    Threat("IPM, 0.5", "Xie et al. 2019, Fall of Empires", ipm(0.5)),
    Threat("IPM, 10", "Xie et al. 2019, Fall of Empires", ipm(10.0)),
    Threat("ALIE, z = 1.5", "Baruch et al. 2019", alie),
    Threat("Gaussian noise", "Blanchard et al. 2017", noise),
    Threat("label flip", "Tolpegin et al. 2020", label_flip, 0.03),
    Threat("backdoor", "Gu et al. 2017, BadNets", backdoor(boost=False), 0.03, has_payload=True),
    Threat(
        "backdoor x n/f", "Bagdasaryan et al. 2020", backdoor(boost=True), 0.03, has_payload=True
    ),
    Threat("free-rider, zero", "Lin et al. 2019", nothing),
    Threat("free-rider, replay", "Fraboni et al. 2021", replay),
    Threat("Sybil copies", "Fung et al. 2020, FoolsGold", sybil),
    Threat("stale base", "Xie et al. 2019, FedAsync", stale),
)
"""Attacks whose files are well-formed."""
