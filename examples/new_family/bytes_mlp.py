"""A complete model family in one file: a perceptron over bytes (Bengio et al. 2003, JMLR 3).

Each byte is predicted from the ``context`` bytes before it: their embeddings, side by side, go
through one hidden layer. Sliding such a perceptron over a text is a convolution of width
``context``, which is how it is written here. It learns little, but it learns in seconds.

The pieces, in the order in which moshi-fl needs them: settings, module, corpus, task, family.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl import data
from moshi_fl.errors import CorruptRecord
from moshi_fl.generate import Sampler, until_stop
from moshi_fl.models.common import device_of, extract_weights, require_counts, settings_from
from moshi_fl.models.family import Corpus, DataSummary, Family, Preset, Sampling, Table
from moshi_fl.weights import Weights, serialize, tensors_in

TOKENIZER = b'{\n  "kind": "bytes"\n}\n'
"""Bytes need no tokenizer, but every hub has a file for one; here it never changes."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BytesConfig:
    """The ``[model]`` table of a hub.

    Raises:
        ConfigError: A value out of range; names the key.
    """

    context: int = 16  # bytes that the next one is predicted from
    span: int = 64  # bytes that are predicted in one window
    d_embedding: int = 16
    d_hidden: int = 192

    def __post_init__(self) -> None:
        keys = ("context", "span", "d_embedding", "d_hidden")
        require_counts(self, keys, name="[model]")


class BytesMLP(nn.Module):
    """Logits of the next byte."""

    def __init__(self, config: BytesConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.d_embedding)
        self.hidden = nn.Conv1d(config.d_embedding, config.d_hidden, config.context)
        self.head = nn.Linear(config.d_hidden, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes (B, T) to logits (B, T - context + 1, 256): one for each full context."""
        x = self.embedding(text).transpose(1, 2)  # (B, E, T)
        x = F.gelu(self.hidden(x)).transpose(1, 2)  # (B, T - context + 1, H)
        return self.head(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BytesCorpus:
    """A user's texts as two streams of bytes, each text after ``context`` zero bytes."""

    summary: DataSummary
    fingerprint: str
    training: Bytes
    held_out: Bytes
    span: int

    @property
    def num_examples(self) -> int:
        """How many windows it takes to cover the training stream once."""
        return math.ceil(len(self.training) / self.span)


@dataclass(frozen=True)
class BytesTask:
    """A configured model: what training, evaluation and generation ask for."""

    config: BytesConfig
    vocabulary_tensors: tuple[str, ...] = ()  # 256 byte values, for ever: nothing grows

    def build(self) -> BytesMLP:
        """An untrained module."""
        return BytesMLP(self.config)

    def initial_weights(self, seed: int) -> Weights:
        """PyTorch's default initialisation, from a seed, without touching the global one."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return extract_weights(self.build())

    def read(
        self, paths: Sequence[Path], *, seed: int, max_bytes: int | None = None
    ) -> BytesCorpus:
        """Read files and folders; ``.gitignore``, secrets and binaries are the core's affair."""
        sources = data.read_sources(paths, seed=seed, max_bytes=max_bytes)
        split = data.split(sources, seed=seed)
        training, held_out = self._stream(split.training), self._stream(split.held_out)
        summary = DataSummary(
            files=len(sources.taken),
            bytes=sources.bytes,
            tokens=len(training),
            skipped=sources.skipped,
            left_out=sources.left_out,
        )
        return BytesCorpus(summary, split.fingerprint, training, held_out, self.config.span)

    def _stream(self, texts: Sequence[str]) -> Bytes:
        padding = bytes(self.config.context)
        return np.frombuffer(b"".join(padding + text.encode() for text in texts), np.uint8)

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Random windows (B, T), endlessly; the n-th batch needs no other, so runs can resume."""
        assert isinstance(corpus, BytesCorpus)
        length = self._window(corpus.training)
        index = start
        while True:
            random = np.random.default_rng([seed, index])
            starts = random.integers(0, len(corpus.training) - length + 1, batch_size)
            windows = corpus.training[starts[:, None] + np.arange(length)]
            yield torch.from_numpy(windows.astype(np.int64))
            index += 1

    def _window(self, stream: Bytes) -> int:
        return min(self.config.context + self.config.span, len(stream))

    def loss(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Mean cross-entropy of each byte given those before it, and the number of bytes."""
        batch = batch.to(device_of(module))
        targets = batch[:, self.config.context :].flatten()
        logits = module(batch[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets), len(targets)

    def pool(self, corpus: Corpus, sequences: int, *, seed: int, held_out: bool) -> bytes:
        """Up to this many windows that do not overlap, as one U8 tensor in a safetensors file."""
        assert isinstance(corpus, BytesCorpus)
        stream = corpus.held_out if held_out else corpus.training
        length = self._window(stream)
        count = len(stream) // length
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[:sequences])
        windows = stream[: count * length].reshape(count, length)[chosen]
        return b"".join(serialize({"windows": windows}))

    @torch.inference_mode()
    def evaluate(self, module: nn.Module, pool: bytes, device: torch.device) -> NDArray[np.float64]:
        """Mean loss of each window, in nats per byte, computed one by one in float64.

        Raises:
            CorruptRecord: Not a pool file of this family.
        """
        windows = tensors_in(pool, name="evaluation pool").get("windows")
        if windows is None or windows.ndim != 2 or windows.shape[1] <= self.config.context:
            raise CorruptRecord("evaluation pool: holds no windows.")
        module.to(device).eval()
        return np.array([self._window_loss(module, row, device) for row in windows])

    def _window_loss(self, module: nn.Module, row: Bytes, device: torch.device) -> float:
        text = torch.tensor(row.astype(np.int64), device=device)
        logits = module(text[None, :-1])[0].double()
        return float(F.cross_entropy(logits, text[self.config.context :]))

    def generate(self, module: nn.Module, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Text after the prompt, piece by piece; a character appears when its bytes are complete.

        Raises:
            ConfigError: A sampling setting out of range.
        """
        sampler = Sampler.of(sampling)
        made = self._continue(module, prompt.encode(), sampler, sampling.max_tokens)
        return until_stop(codecs.iterdecode(made, "utf-8", errors="replace"), sampling.stop)

    def _continue(
        self, module: nn.Module, text: bytes, sampler: Sampler, limit: int
    ) -> Iterator[bytes]:
        context, device = self.config.context, device_of(module)
        window = list((bytes(context) + text)[-context:])
        module.eval()
        for _ in range(limit):
            with torch.inference_mode():
                byte = sampler.pick(module(torch.tensor([window], device=device))[0, -1])
            if not byte:  # a zero ends every text
                return
            yield bytes([byte])
            window = [*window[1:], byte]


class BytesFamily:
    """Perceptrons over bytes."""

    name = "bytes-mlp"

    @property
    def presets(self) -> Mapping[str, Preset]:
        """``tiny``: 104 thousand parameters."""
        return {
            "tiny": Preset(
                model={"context": 16, "span": 64, "d_embedding": 16, "d_hidden": 192},
                training={"steps": 100, "batch_size": 16, "learning_rate": 1e-2},
                delta={"codec": "int8"},
                evaluation={"sequences": 32},
                tokenizer=TOKENIZER,
            )
        }

    def load(self, model: Table, tokenizer: bytes) -> BytesTask:
        """Check the ``[model]`` table and the tokenizer file.

        Raises:
            ConfigError: A setting cannot be used; names the key.
            CorruptRecord: The tokenizer file is not this family's.
        """
        if tokenizer != TOKENIZER:
            raise CorruptRecord("tokenizer.json is not that of the family bytes-mlp.")
        return BytesTask(settings_from(BytesConfig, model, name="[model]"))


FAMILY: Family = BytesFamily()  # a type checker compares it with the protocol here
