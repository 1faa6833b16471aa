"""The ``moc`` family: Lunaris MoC on sub-word tokens, for the federated core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from moshi_fl.models.char_corpus import make_pool, pick_texts, read_pool, stream
from moshi_fl.models.common import device_of, extract_weights, settings_from
from moshi_fl.models.family import Corpus, DataSummary, Family, Preset, Sampling, Table
from moshi_fl.models.moc import Moc
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.moc_decode import MocDecoder
from moshi_fl.models.token_corpus import (
    TokenArray,
    TokenCorpus,
    take_windows,
    token_windows,
    window_count,
)
from moshi_fl.subwords import SPECIALS, Subwords
from moshi_fl.weights import Weights

BYTES_PER_TOKEN = 4  # at most, on average; what a piece of evaluation text is cut to
ROUND_VOCABULARY_TO = 64


@dataclass(frozen=True)
class MocTask:
    """A configured MoC: what training, evaluation and generation ask for.

    Raises:
        ConfigError: The vocabulary has no room for the tokenizer's tokens.
    """

    config: MocConfig
    subwords: Subwords

    def __post_init__(self) -> None:
        if self.subwords.size > self.config.vocab_size:
            raise ConfigError(
                f"[model]: vocab_size = {self.config.vocab_size} has no room for the tokenizer's "
                f"{self.subwords.size} tokens."
            )

    @property
    def vocabulary_tensors(self) -> tuple[str, ...]:
        """None: sub-words of a hub are settled when it is made, and bytes spell all others."""
        return ()

    def build(self) -> Moc:
        """An untrained module."""
        return Moc(self.config)

    def initial_weights(self, seed: int) -> Weights:
        """The reference's initialisation, from a seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return extract_weights(self.build())

    def read(
        self, paths: Sequence[Path], *, seed: int, max_bytes: int | None = None
    ) -> TokenCorpus:
        """Read files and folders. Raises ``DataError`` when nothing usable is there."""
        sources = data.read_sources(paths, seed=seed, max_bytes=max_bytes)
        split = data.split(sources, seed=seed)
        tokens = TokenArray(stream(self.subwords, split.training))
        summary = DataSummary(
            files=len(sources.taken),
            bytes=sources.bytes,
            tokens=len(tokens),
            skipped=sources.skipped,
            left_out=sources.left_out,
        )
        return TokenCorpus(tokens, self.config.max_seq_len, summary, split)

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Windows of ``max_seq_len + 1`` tokens, (B, T + 1); all of them once an epoch."""
        rows = token_windows(cast("TokenCorpus", corpus), batch_size, seed=seed, start=start)
        return map(torch.from_numpy, rows)

    def window_count(self, corpus: Corpus) -> int:
        """Windows without a common token; what is left over at the end is in none."""
        return window_count(cast("TokenCorpus", corpus))

    def take(self, corpus: Corpus, numbers: NDArray[np.int64], *, seed: int) -> Tensor:
        """These windows, (B, T + 1); nothing in them is random."""
        return torch.from_numpy(take_windows(cast("TokenCorpus", corpus), numbers))

    def loss(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of each token given those before it, and the router's terms."""
        batch = batch.to(device_of(module))
        targets = batch[:, 1:]
        return module(batch[:, :-1], targets).loss.total, targets.numel()

    def pool(self, corpus: Corpus, sequences: int, *, seed: int, held_out: bool) -> bytes:
        """Up to this many pieces of the held-out (or the training) texts as a file."""
        split = cast("TokenCorpus", corpus).split
        assert split is not None, "this corpus was not read from texts"
        texts = split.held_out if held_out else split.training
        size = BYTES_PER_TOKEN * self.config.max_seq_len
        return make_pool(texts, sequences, context=size, seed=seed)

    def pool_size(self, pool: bytes) -> int:
        """How many texts a pool has."""
        return len(read_pool(pool))

    def pick(self, pool: bytes, sequences: Sequence[int]) -> bytes:
        """A pool of these texts of another, in this order."""
        return pick_texts(pool, sequences)

    @torch.inference_mode()
    def evaluate(self, module: nn.Module, pool: bytes, device: torch.device) -> NDArray[np.float64]:
        """Mean loss of each text, in nats per token, from its second token on; no router terms.

        Each text runs by itself in the module's own precision, so its loss depends on no other.

        Raises:
            CorruptRecord: Not a pool file of texts.
        """
        module.to(device).eval()
        return np.array([self._text_loss(module, text) for text in read_pool(pool)])

    def _text_loss(self, module: nn.Module, text: str) -> float:
        ids = [self.subwords.end, *self.subwords.encode(text)[: self.config.max_seq_len].tolist()]
        tokens = torch.tensor(ids, device=device_of(module))
        logits = module(tokens[None, :-1], tokens[None, 1:]).logits[0].double()
        return float(F.cross_entropy(logits, tokens[1:]))

    def generate(self, module: nn.Module, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Text after the prompt, piece by piece.

        Of a prompt longer than the context the end is read. Past the context the oldest tokens are
        forgotten one by one; nothing is read again.

        Raises:
            ConfigError: A sampling setting out of range.
        """
        sampler = Sampler.of(sampling)
        tokens = self.subwords.encode(prompt).tolist() or [self.subwords.end]
        made = self._continue(cast("Moc", module), tokens, sampler, sampling)
        return until_stop(pieces_of(self.subwords.stream(), made), sampling.stop)

    def _continue(
        self, module: Moc, tokens: list[int], sampler: Sampler, sampling: Sampling
    ) -> Iterator[int]:
        decoder = MocDecoder(module, storage="int8" if sampling.int8 else "float32")
        device = device_of(module)
        logits = decoder.restart(torch.tensor([tokens], device=device))
        for _ in range(sampling.max_tokens):
            token = sampler.pick(self._sayable(logits[0]), tokens)
            if token == self.subwords.end:
                return
            yield token
            tokens.append(token)
            logits = decoder.step(torch.tensor([token], device=device))

    @torch.inference_mode()
    def _sayable(self, logits: Tensor) -> Tensor:
        """Without ids that the tokenizer lacks, and without marks, which are not text."""
        logits[self.subwords.size :] = -torch.inf
        logits[self._marks] = -torch.inf
        return logits

    @cached_property
    def _marks(self) -> list[int]:
        """Special tokens but the end, which are not text."""
        specials = self.subwords.specials
        return [specials[mark] for mark in SPECIALS[1:] if mark in specials]


class MocFamily:
    """Mixtures of collaborating experts of any size."""

    name = "moc"

    @property
    def presets(self) -> Mapping[str, Preset]:
        """``tiny`` learns visibly in seconds on one core; ``base`` has 21.8 million parameters."""
        tokenizer = Subwords.bytes_only()
        shared: Table = {
            "vocab_size": _rounded(tokenizer.size),
            "top_k": 2,
            "capacity_factor": 1.25,
            "capacity_rounding": "none",
            "grad_ckpt_policy": "none",
            "n_reasoning_steps": 2,
        }
        tiny: Table = {
            "d_model": 96,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "multiple_of": 32,
        }
        tiny = {**tiny, "max_seq_len": 128, "n_experts": 4, "ffn_hidden_multiplier": 2.0}
        base = {"d_model": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "n_experts": 8}
        base["max_seq_len"] = 256
        return {
            "tiny": Preset(
                model={**shared, **tiny},
                training={"steps": 200, "batch_size": 16, "learning_rate": 3e-3},
                # Denser than base, and a longer step: it shall show something after one round.
                delta={"codec": "topk", "options": {"keep": 1024}},
                evaluation={"sequences": 64},
                tokenizer=tokenizer.to_bytes(),
                server_learning_rate=1.25,
            ),
            "base": Preset(
                model={**shared, **base},
                training={"steps": 200, "batch_size": 8, "learning_rate": 1e-3},
                delta={"codec": "topk"},
                evaluation={"sequences": 64},
                tokenizer=tokenizer.to_bytes(),
            ),
        }

    def with_tokenizer(self, preset: Preset, tokenizer: bytes) -> Preset:
        """A preset for another tokenizer: with room for its tokens.

        Raises:
            CorruptRecord: It cannot be used.
        """
        size = _rounded(Subwords.from_bytes(tokenizer).size)
        return replace(preset, model={**preset.model, "vocab_size": size}, tokenizer=tokenizer)

    def load(self, model: Table, tokenizer: bytes) -> MocTask:
        """Check the settings and the tokenizer file.

        Raises:
            ConfigError: A setting cannot be used; names the key.
            CorruptRecord: The tokenizer file is damaged.
        """
        config = settings_from(MocConfig, model, name="[model]")
        return MocTask(config, Subwords.from_bytes(tokenizer))


def _rounded(size: int) -> int:
    return -(-size // ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO


FAMILY: Family = MocFamily()
