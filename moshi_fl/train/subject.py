"""What the trainer trains: a module over tokens, its loss, and batches of token windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.common import device_of
from moshi_fl.models.family import DataSummary
from moshi_fl.train.engine import Loss

if TYPE_CHECKING:
    from moshi_fl.models.token_corpus import TokenCorpus
    from moshi_fl.shards import TokenSource


@dataclass(frozen=True)
class Subject:
    """A model over tokens.

    Attributes:
        build: Makes an untrained module.
        loss: Training loss of a batch (B, context + 1).
        held_out_loss: The part of it that says how good the predictions are.
        context: Tokens that the module reads at once.
        vocabulary: How many tokens there are.
        config: Its settings, complete.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    held_out_loss: Loss
    context: int
    vocabulary: int
    config: Mapping[str, Any]


def subject(family: str, table: Mapping[str, Any]) -> Subject:
    """The model that the ``family`` and ``model`` keys describe.

    Raises:
        ConfigError: A setting cannot be used; names the key.
    """
    if family == "moc":
        return _moc(table)
    if family == "char":
        return _char(table)
    raise ConfigError(f"family = {family!r} must be moc or char.")


def _moc(table: Mapping[str, Any]) -> Subject:
    from moshi_fl.models.moc import Moc
    from moshi_fl.models.moc_config import MocConfig

    def losses(module: nn.Module, batch: Tensor) -> tuple[Any, int]:
        inputs, targets = _pair(module, batch)
        return module(inputs, targets)[1], targets.numel()

    def total(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        loss, count = losses(module, batch)
        return loss[0], count

    def main(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        loss, count = losses(module, batch)
        return loss[1], count

    config = MocConfig.from_reference(table)
    fields = dataclasses.asdict(config)
    return Subject(lambda: Moc(config), total, main, config.max_seq_len, config.vocab_size, fields)


def _char(table: Mapping[str, Any]) -> Subject:
    from moshi_fl.models.char import CharConfig, CharTransformer
    from moshi_fl.models.common import settings_from

    def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        inputs, targets = _pair(module, batch)
        logits = module(inputs).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten()), targets.numel()

    own = {key: value for key, value in table.items() if key != "vocab_size"}
    vocabulary = table.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ConfigError(f"model: vocab_size = {vocabulary!r} must be a whole number above zero.")
    config = settings_from(CharConfig, own, name="model")
    fields = {**dataclasses.asdict(config), "vocab_size": vocabulary}
    build = lambda: CharTransformer(config, vocabulary)  # noqa: E731 - as above
    return Subject(build, loss, loss, config.context, vocabulary, fields)


def _pair(module: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    batch = batch.to(device_of(module), non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


@dataclass(frozen=True)
class Part:
    """So many tokens of a source, from one on."""

    source: TokenSource
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, count: int) -> NDArray[np.uint16]:
        """Tokens by their place in the part."""
        return self.source.read(self.start + start, count)

    @property
    def fingerprint(self) -> str:
        """The source's, and which part it is."""
        return f"{self.source.fingerprint}[{self.start}+{self.count}]"


@dataclass(frozen=True)
class Data:
    """Tokens to train on, and those held out."""

    training: TokenCorpus
    held_out: TokenCorpus | None


def read_data(data_dir: Path, val_dir: Path | None, share: float, what: Subject) -> Data:
    """Open the shards.

    Raises:
        DataError: A folder has no shards, or too few tokens for one window.
        CorruptRecord: A shard is damaged.
    """
    from moshi_fl.shards import TokenShards

    tokens: TokenSource = _opened(TokenShards, data_dir, what)
    held_out: TokenSource | None = None
    if val_dir is not None:
        held_out = _opened(TokenShards, val_dir, what)
    elif share:
        count = round(len(tokens) * share)
        held_out = Part(tokens, len(tokens) - count, count)
        tokens = Part(tokens, 0, len(tokens) - count)
    validation = _corpus(held_out, what, "held out") if held_out is not None else None
    return Data(_corpus(tokens, what, f"in {data_dir}"), validation)


def _opened(kind: Any, folder: Path, what: Subject) -> Any:
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder} with .npy shards.",
            hint="moshi-fl tokenize makes them; data_dir says where they are (--set data_dir=…).",
        )
    return kind.open(folder, vocab_size=what.vocabulary)


def _corpus(tokens: TokenSource, what: Subject, where: str) -> TokenCorpus:
    from moshi_fl.models.token_corpus import TokenCorpus

    if len(tokens) <= what.context:
        raise DataError(
            f"{len(tokens):,} tokens {where}; one window takes {what.context + 1:,}.",
            hint="Give more data, or the model a shorter context.",
        )
    summary = DataSummary(files=0, bytes=2 * len(tokens), tokens=len(tokens))
    return TokenCorpus(split=None, summary=summary, tokens=tokens, context=what.context)


def windows(corpus: TokenCorpus, batch: int, *, seed: int, start: int) -> Iterator[Tensor]:
    """Batches (batch, context + 1) from one on."""
    from moshi_fl.models.token_corpus import token_windows

    return map(torch.from_numpy, token_windows(corpus, batch, seed=seed, start=start))


def shares(batch: Tensor, size: int, rank: int, processes: int) -> list[Tensor]:
    """What one process takes of a step's batch, in pieces of ``size`` rows.

    Pieces go round, so that the same rows make up a step however many processes share them.
    """
    return list(torch.split(batch, size))[rank::processes]
