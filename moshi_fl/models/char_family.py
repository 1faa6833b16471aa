"""The ``char`` family: source code, character by character, for the federated core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl import data
from moshi_fl.errors import ConfigError
from moshi_fl.generate import Sampler, pieces_of, until_stop
from moshi_fl.models.char import CharConfig, CharTransformer
from moshi_fl.models.char_corpus import (
    CharCorpus,
    make_pool,
    pick_texts,
    read_pool,
    stream,
    take_windows,
    window_length,
    windows,
)
from moshi_fl.models.char_decode import CharDecoder
from moshi_fl.models.common import device_of, extract_weights, settings_from
from moshi_fl.models.family import Corpus, DataSummary, Family, Preset, Sampling, Table
from moshi_fl.tokenizer import CharVocabulary, Decoder
from moshi_fl.weights import Weights

MAX_PROPOSED = 256  # characters


@dataclass(frozen=True)
class CharTask:
    """A configured character model: what training, evaluation and generation ask for."""

    config: CharConfig
    vocabulary: CharVocabulary

    @property
    def vocabulary_tensors(self) -> tuple[str, ...]:
        """Embedding and head: one row for each token."""
        return ("embedding.weight", "fc_out.bias", "fc_out.weight")

    def build(self) -> CharTransformer:
        """An untrained module."""
        return CharTransformer(self.config, self.vocabulary.size)

    def initial_weights(self, seed: int) -> Weights:
        """PyTorch's default initialisation, from a seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return extract_weights(self.build())

    def read(self, paths: Sequence[Path], *, seed: int, max_bytes: int | None = None) -> CharCorpus:
        """Read files and folders. Raises ``DataError`` when nothing usable is there."""
        sources = data.read_sources(paths, seed=seed, max_bytes=max_bytes)
        split = data.split(sources, seed=seed)
        tokens = stream(self.vocabulary, split.training)
        counts = Counter[str]()
        for source in sources.taken:
            counts.update(source.text)
        summary = DataSummary(
            files=len(sources.taken),
            bytes=sources.bytes,
            tokens=len(tokens),
            skipped=sources.skipped,
            left_out=sources.left_out,
            proposed_characters=self.vocabulary.missing(counts)[:MAX_PROPOSED],
        )
        return CharCorpus(split, summary, tokens, self.config.context)

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Random windows of ``context + 1`` tokens, (B, T + 1)."""
        share = self.config.fill_in_middle
        rows = windows(
            cast("CharCorpus", corpus), batch_size, fill_in_middle=share, seed=seed, start=start
        )
        return map(torch.from_numpy, rows)

    def window_count(self, corpus: Corpus) -> int:
        """Windows without a common token; what is left over at the end is in none."""
        chars = cast("CharCorpus", corpus)
        return len(chars.tokens) // window_length(chars)

    def take(self, corpus: Corpus, numbers: NDArray[np.int64], *, seed: int) -> Tensor:
        """These windows, (B, T + 1)."""
        share = self.config.fill_in_middle
        rows = take_windows(cast("CharCorpus", corpus), numbers, fill_in_middle=share, seed=seed)
        return torch.from_numpy(rows)

    def loss(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Mean cross-entropy of each token given those before it in its window."""
        batch = batch.to(device_of(module))
        targets = batch[:, 1:].flatten()
        logits = module(batch[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets), len(targets)

    def pool(self, corpus: Corpus, sequences: int, *, seed: int, held_out: bool) -> bytes:
        """Up to this many pieces of the held-out (or the training) texts as a file."""
        split = cast("CharCorpus", corpus).split
        texts = split.held_out if held_out else split.training
        return make_pool(texts, sequences, context=self.config.context, seed=seed)

    def pool_size(self, pool: bytes) -> int:
        """How many texts a pool has."""
        return len(read_pool(pool))

    def pick(self, pool: bytes, sequences: Sequence[int]) -> bytes:
        """A pool of these texts of another, in this order."""
        return pick_texts(pool, sequences)

    @torch.inference_mode()
    def evaluate(self, module: nn.Module, pool: bytes, device: torch.device) -> NDArray[np.float64]:
        """Mean loss of each text, in nats per token, from its second token on.

        Each text runs by itself in the module's own precision, so its loss depends on no other.

        Raises:
            CorruptRecord: Not a pool file of this family.
        """
        module.to(device).eval()
        return np.array([self._text_loss(module, text) for text in read_pool(pool)])

    def _text_loss(self, module: nn.Module, text: str) -> float:
        ids = self.vocabulary.encode(text)[: self.config.context + 1].astype(np.int64)
        tokens = torch.from_numpy(ids).to(device_of(module))
        logits = module(tokens[None, :-1])[0].double()
        return float(F.cross_entropy(logits, tokens[1:]))

    def generate(
        self, module: nn.Module, prompt: str, sampling: Sampling, *, suffix: str = ""
    ) -> Iterator[str]:
        """Text after the prompt, or between prompt and suffix, piece by piece.

        When the context is full, the model reads the last half of it anew and goes on, as it does
        with a prompt longer than the context; between prompt and suffix it stops instead.

        Raises:
            ConfigError: A sampling setting out of range.
        """
        sampler = Sampler.of(sampling)
        tokens = self._between(prompt, suffix) if suffix else self._after(prompt)
        model = cast("CharTransformer", module.eval())
        decoder = CharDecoder(model, "int8" if sampling.int8 else "float32")
        made = self._continue(decoder, tokens, sampler, sampling.max_tokens, slide=not suffix)
        return until_stop(pieces_of(Decoder(self.vocabulary), made), sampling.stop)

    def fill_in(
        self, module: nn.Module, prompt: str, suffix: str, sampling: Sampling
    ) -> Iterator[str]:
        """Text between prompt and suffix.

        Raises:
            ConfigError: The hub does not train its model for that.
        """
        if not self.config.fill_in_middle:
            raise ConfigError(
                "this hub's model was not trained to write between two texts.",
                hint="Leave out the suffix; a hub trains it with [model] fill_in_middle = 0.25.",
            )
        return self.generate(module, prompt, sampling, suffix=suffix)

    def _after(self, prompt: str) -> list[int]:
        return self.vocabulary.encode(prompt).tolist() or [self.vocabulary.end]

    def _between(self, prompt: str, suffix: str) -> list[int]:
        """The fill-in-the-middle prompt; half of the context is left for the answer."""
        room = self.config.context // 2 - 3
        after: list[int] = self.vocabulary.encode(suffix).tolist()[: room // 3]
        before: list[int] = self.vocabulary.encode(prompt).tolist()[-(room - len(after)) :]
        marks = self.vocabulary
        return [marks.prefix, *before, marks.suffix, *after, marks.middle]

    def _continue(
        self, decoder: CharDecoder, tokens: list[int], sampler: Sampler, limit: int, *, slide: bool
    ) -> Iterator[int]:
        half = self.config.context // 2
        logits = decoder.restart(tokens if len(tokens) <= self.config.context else tokens[-half:])
        for _ in range(limit):
            token = self._pick(sampler, logits, tokens)
            if token == self.vocabulary.end:
                return
            yield token
            tokens.append(token)
            if decoder.length < self.config.context:
                logits = decoder.step(token)
            elif slide:
                logits = decoder.restart(tokens[-half:])
            else:
                return

    @torch.inference_mode()
    def _pick(self, sampler: Sampler, logits: Tensor, before: list[int]) -> int:
        """Any token but the marks, which are not text."""
        logits[self.vocabulary.prefix : self.vocabulary.middle + 1] = -torch.inf
        return sampler.pick(logits, before)


class CharFamily:
    """Character models of any size."""

    name = "char"

    @property
    def presets(self) -> Mapping[str, Preset]:
        """``tiny`` learns visibly in seconds on one core; ``base`` has 8.6 million parameters."""
        tokenizer = CharVocabulary().to_bytes()
        return {
            "tiny": Preset(
                model={
                    "n_layer": 2,
                    "n_head": 4,
                    "d_model": 128,
                    "d_ff": 384,
                    "context": 128,
                    "dropout": 0.0,
                    "fill_in_middle": 0.0,
                    "norm": "post",
                    "final_norm": False,
                },
                training={"steps": 200, "batch_size": 16, "learning_rate": 3e-3},
                # Denser than base, and a longer step: it shall show something after one round.
                delta={"codec": "topk", "options": {"keep": 1024}},
                evaluation={"sequences": 64},
                tokenizer=tokenizer,
                server_learning_rate=1.25,
            ),
            "base": Preset(
                model={
                    "n_layer": 6,
                    "n_head": 8,
                    "d_model": 384,
                    "d_ff": 1024,
                    "context": 384,
                    "dropout": 0.0,
                    "fill_in_middle": 0.0,
                    "norm": "post",
                    "final_norm": False,
                },
                training={"steps": 200, "batch_size": 8, "learning_rate": 1e-3},
                delta={"codec": "topk"},
                evaluation={"sequences": 64},
                tokenizer=tokenizer,
            ),
        }

    def load(self, model: Table, tokenizer: bytes) -> CharTask:
        """Check the settings and the tokenizer file.

        Raises:
            ConfigError: A setting cannot be used; names the key.
            CorruptRecord: The tokenizer file is damaged.
        """
        config = settings_from(CharConfig, model, name="[model]")
        return CharTask(config, CharVocabulary.from_bytes(tokenizer))


FAMILY: Family = CharFamily()
