"""The protocol by which a model family plugs in; the federated core knows no model beyond this.

A ``Family`` is a name, presets and a loader. Loading it with a hub's ``[model]`` table and its
tokenizer file gives a ``Task``: everything that training, evaluation and generation ask for.
See ``examples/`` for a complete family in one short file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl.generate import Sampling as Sampling  # noqa: PLC0414 - families take it from here
from moshi_fl.plot import Chart
from moshi_fl.weights import Weights

if TYPE_CHECKING:
    from moshi_fl.models.speech.lm import LMModel
    from moshi_fl.models.speech.mimi import Mimi

Table = Mapping[str, Any]
Hear = Callable[[float, float], None]
"""Is told how much of something is done, and how much there is, in seconds of sound."""


@dataclass(frozen=True)
class Preset:
    """What ``moshi-hub init --preset`` writes into ``hub.toml``, table by table."""

    model: Table
    training: Table
    delta: Table
    evaluation: Table
    tokenizer: bytes
    server_learning_rate: float = 1.0  # factor on the aggregated delta
    note: str = ""  # what whoever makes a hub of it should know


@dataclass(frozen=True)
class DataSummary:
    """What was taken from the user's paths and what was left, for the user's eyes only."""

    files: int
    bytes: int
    tokens: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reason to number of files, such as ``{"binary": 3, "looks like a secret": 1}``."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Reason to the names of the first few of them."""
    proposed_characters: str = ""
    """Characters in the data that the vocabulary lacks, most frequent first."""


class Corpus(Protocol):
    """A user's data, split into a training and a held-out part that share no file."""

    @property
    def summary(self) -> DataSummary:
        """What was taken."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training data as read; equal data in equal order, equal fingerprint."""
        ...

    @property
    def num_examples(self) -> int:
        """How many training windows one epoch has."""
        ...


class Task(Protocol):
    """A configured family, ready to build, train, judge and use its model."""

    @property
    def vocabulary_tensors(self) -> tuple[str, ...]:
        """Tensors that gain a row when the vocabulary grows; empty when it cannot."""
        ...

    def build(self) -> nn.Module:
        """An untrained module whose parameter names are the names of the global weights."""
        ...

    def initial_weights(self, seed: int) -> Weights:
        """Float32 weights of round 0; equal seeds give equal weights on one machine."""
        ...

    def read(self, paths: Sequence[Path], *, seed: int, max_bytes: int | None = None) -> Corpus:
        """Read the user's data. Raises ``DataError`` when nothing usable is there."""
        ...

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Any]:
        """Endless training batches; the n-th depends on ``(corpus, batch_size, seed, n)`` alone."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Mean training loss (scalar tensor, nats per token) and the number of tokens it covers."""
        ...

    def pool(self, corpus: Corpus, sequences: int, *, seed: int, held_out: bool) -> bytes:
        """Up to this many evaluation sequences as a self-contained, deterministic file."""
        ...

    def evaluate(self, module: nn.Module, pool: bytes, device: torch.device) -> NDArray[np.float64]:
        """Loss of each sequence of a pool, in nats per token, shape ``(sequences,)``."""
        ...

    def generate(self, module: nn.Module, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Text after the prompt, piece by piece as it is made."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    """How the optimizer treats a parameter."""

    learning_rate_scale: float = 1.0  # times the schedule's rate, at every step
    decays: bool = True
    stays_float32: bool = False  # in training with bfloat16: what is sensitive to rounding


@runtime_checkable
class Grouped(Protocol):
    """A module whose parameters are not all treated alike; any other has one group."""

    def parameter_group(self, name: str) -> ParameterGroup:
        """Group of one of ``named_parameters``."""
        ...


@runtime_checkable
class Observed(Protocol):
    """A module that can tell more about its last training step than the loss."""

    def statistics(self) -> Mapping[str, float]:
        """Figures by name, such as ``{"drop_fraction": 0.02}``; may wait for the device."""
        ...


@runtime_checkable
class Separable(Protocol):
    """A module that prepares itself for gradients of single windows; others are taken as they are.

    Training with differential privacy needs them: what one window adds is bounded by itself.
    """

    def separated(self) -> AbstractContextManager[None]:
        """Inside, every trainable parameter is used by a layer that is called, on all windows.

        The layers may be others than outside; the parameters are the same objects.

        Raises:
            ConfigError: One window of a batch influences the gradient of another; says how.
        """
        ...


@runtime_checkable
class Windowed(Protocol):
    """A task that can cut a corpus into windows of which no two share a token."""

    def window_count(self, corpus: Corpus) -> int:
        """How many there are."""
        ...

    def take(self, corpus: Corpus, numbers: NDArray[np.int64], *, seed: int) -> Any:
        """A batch of these windows, for ``loss``; windows have equal numbers of tokens.

        ``seed`` is of what is random within a window. Each row depends on its window alone.
        """
        ...


@runtime_checkable
class FillsIn(Protocol):
    """A task whose model can write what stands between two texts."""

    def fill_in(
        self, module: nn.Module, prompt: str, suffix: str, sampling: Sampling
    ) -> Iterator[str]:
        """Text between prompt and suffix, piece by piece as it is made."""
        ...


@runtime_checkable
class CutsPools(Protocol):
    """A task that can measure on some sequences of a pool without measuring on all."""

    def pool_size(self, pool: bytes) -> int:
        """How many sequences a pool has."""
        ...

    def pick(self, pool: bytes, sequences: Sequence[int]) -> bytes:
        """A pool of these sequences of another, in this order."""
        ...


@runtime_checkable
class TrainsInParts(Protocol):
    """A task whose model can be trained in part; any other is trained whole."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What ``--trains`` may name, ``all`` among them."""
        ...

    def only(self, module: nn.Module, part: str) -> None:
        """Let this one of ``parts`` learn, and nothing else."""
        ...


@runtime_checkable
class ReadsWithModel(Protocol):
    """A task that reads data with a part of the model that never trains, such as a codec."""

    def reading_with(self, weights: Weights) -> Task:
        """The same task, able to read."""
        ...


@runtime_checkable
class TellsOfReading(Protocol):
    """A task that takes long to read data, and can tell how far it is."""

    def telling(self, hear: Hear) -> Task:
        """The same task, which calls ``hear`` while it reads; not where there is nothing to do."""
        ...


@dataclass(frozen=True)
class DataFile:
    """What is dealt out as a whole when a simulation shares data out.

    Attributes:
        path: What ``Task.read`` takes; files that belong to it lie beside it.
        name: Within the folder that was given.
        digest: SHA-256 of the content; equal ones are taken once.
        bytes: Size of all of it.
    """

    path: Path
    name: str
    digest: bytes
    bytes: int


@runtime_checkable
class FindsFiles(Protocol):
    """A task whose data is not source text: says itself which files can be dealt out."""

    def files(self, path: Path) -> Sequence[DataFile]:
        """All under a file or folder, in order of name.

        Raises:
            DataError: Nothing usable is there.
        """
        ...


@runtime_checkable
class Explains(Protocol):
    """A task that can say more about a model than its loss on a pool."""

    def figures(self, module: nn.Module, pool: bytes, device: torch.device) -> Mapping[str, float]:
        """Means over the pool by name, such as ``{"text perplexity": 12.1}``."""
        ...

    def chart(self, modules: Mapping[str, nn.Module], pool: bytes, device: torch.device) -> Chart:
        """A chart of the same for some models, by what they shall be called."""
        ...


class SpokenText(Protocol):
    """What turns the tokens of a model's text stream into text."""

    def pieces(self, ids: Sequence[int]) -> str:
        """Text of some tokens in a row; padding spells nothing, a word begins with a space."""
        ...


@dataclass(frozen=True)
class SpeechParts:
    """What a conversation needs of a model."""

    mimi: Mimi  # sound to codes and back, with as many codebooks as the model hears
    lm: LMModel
    text: SpokenText


@runtime_checkable
class Speaks(Protocol):
    """A task whose model listens and speaks."""

    def speech(self, module: nn.Module) -> SpeechParts:
        """The parts of a module of this task, ready for use: in evaluation mode."""
        ...


@runtime_checkable
class TakesTokenizer(Protocol):
    """A family whose presets can be had for another tokenizer."""

    def with_tokenizer(self, preset: Preset, tokenizer: bytes) -> Preset:
        """A preset with this tokenizer file.

        Raises:
            CorruptRecord: It cannot be used.
        """
        ...


class Family(Protocol):
    """A kind of model."""

    @property
    def name(self) -> str:
        """Name in ``hub.toml``."""
        ...

    @property
    def presets(self) -> Mapping[str, Preset]:
        """Ready-made settings by name."""
        ...

    def load(self, model: Table, tokenizer: bytes) -> Task:
        """Check the ``[model]`` table (without its ``family`` key) and the tokenizer file.

        Raises:
            ConfigError: A key is unknown, missing or out of range; the message names it.
        """
        ...
