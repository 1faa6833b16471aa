"""The ``speech`` family: full-duplex speech, as Moshi models it, for the federated core."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl.config import ensure_home
from moshi_fl.errors import ConfigError
from moshi_fl.models.common import device_of, load_weights
from moshi_fl.models.family import (
    Corpus,
    DataFile,
    DataSummary,
    Family,
    Hear,
    Preset,
    Sampling,
    SpeechParts,
    Table,
)
from moshi_fl.models.speech.corpus import (
    Encoded,
    SpeechCorpus,
    draw,
    make_corpus,
    make_pool,
    pool_file,
    read_pool,
)
from moshi_fl.models.speech.data import (
    ZERO_TOKEN,
    CodeCache,
    Codes,
    encode_dialogue,
    find_dialogues,
)
from moshi_fl.models.speech.dialogues import Dialogue
from moshi_fl.models.speech.evaluation import codebook_chart, summarize
from moshi_fl.models.speech.family_config import SpeechConfig
from moshi_fl.models.speech.lora import fuse_lora
from moshi_fl.models.speech.loss import losses
from moshi_fl.models.speech.metrics import Summary
from moshi_fl.models.speech.mimi import Mimi
from moshi_fl.models.speech.model import CODEC, SpeechModel, make_codec, parts_of
from moshi_fl.models.speech.monologue import monologue
from moshi_fl.models.speech.presets import presets
from moshi_fl.models.speech.start import first_weights
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.plot import Chart
from moshi_fl.weights import Weights, sha256_file

CACHE = "speech-codes"  # folder of encoded sound


@dataclass(frozen=True)
class SpeechTask:
    """A configured speech model.

    Attributes:
        config: Of codec, language model and training.
        text: What the text stream is spelled with.
        mimi: The codec with its weights, where data shall be read; ``reading_with`` gives it.
        hear: Is told, while sound is encoded, how many seconds are done and how many there are.
    """

    config: SpeechConfig
    text: TextStream
    mimi: Mimi | None = field(default=None, repr=False, compare=False)
    hear: Hear | None = field(default=None, repr=False, compare=False)

    @property
    def vocabulary_tensors(self) -> tuple[str, ...]:
        """None: the tokens of a hub are settled when it is made."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What can be trained by itself."""
        return parts_of(self.config)

    def only(self, module: nn.Module, part: str) -> None:
        """Let this part learn, and nothing else."""
        cast("SpeechModel", module).only(part)

    def build(self) -> SpeechModel:
        """An untrained module."""
        return SpeechModel(self.config)

    def initial_weights(self, seed: int) -> Weights:
        """The references' initialisations, from a seed.

        Raises:
            ConfigError: The model is one that starts from a checkpoint.
        """
        return first_weights(self.config, seed)

    def reading_with(self, weights: Weights) -> SpeechTask:
        """The same task with these weights' codec."""
        mimi = make_codec(self.config)
        own = {name.removeprefix(CODEC): weights[name] for name in weights if _of_codec(name)}
        load_weights(mimi, own)
        return replace(self, mimi=mimi)

    def telling(self, hear: Hear) -> SpeechTask:
        """The same task, which tells how far its reading is."""
        return replace(self, hear=hear)

    def files(self, path: Path) -> Sequence[DataFile]:
        """The dialogues under a file or folder."""
        root = path if path.is_dir() else path.parent
        found = [entry.path for entry in find_dialogues([path], seed=0).dialogues]
        return [_data_file(entry, root) for entry in found]

    def read(
        self, paths: Sequence[Path], *, seed: int, max_bytes: int | None = None
    ) -> SpeechCorpus:
        """Read dialogues, and encode those that are not in the cache yet.

        Raises:
            DataError: Nothing usable is there.
        """
        if self.mimi is None:
            raise ConfigError("sound is read with the hub's codec, which this task was not given.")
        found = find_dialogues(paths, seed=seed, max_bytes=max_bytes)
        encoded = list(self._encoded(self.mimi, found.dialogues))
        summary = DataSummary(
            files=len(encoded),
            bytes=found.bytes,
            tokens=sum(self._predicted(entry.codes) for entry in encoded),
            skipped=found.skipped,
            left_out=found.left_out,
        )
        return make_corpus(encoded, self.config.segment_frames, summary, seed=seed)

    def _encoded(self, mimi: Mimi, dialogues: Sequence[Dialogue]) -> Iterator[Encoded]:
        cache = CodeCache(ensure_home() / CACHE)
        done, seconds = 0.0, sum(entry.duration for entry in dialogues)

        def hear(so_far: float) -> None:
            if self.hear:
                self.hear(min(done + so_far, seconds), seconds)

        for entry in dialogues:
            codes = encode_dialogue(entry, mimi, self.text, cache, hear=hear)
            done += entry.duration
            yield Encoded(codes, entry.weight)

    def batches(
        self, corpus: Corpus, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Windows of tokens, (B, n_q + 1, segment_frames), drawn by their dialogues' weights."""
        rows = draw(cast("SpeechCorpus", corpus), batch_size, seed=seed, start=start)
        return map(torch.from_numpy, rows)

    def loss(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of the text and of Moshi's codes, each given all that came before it."""
        return self._losses(module, batch), self._predicted(batch.numpy())

    def pool(self, corpus: Corpus, sequences: int, *, seed: int, held_out: bool) -> bytes:
        """Up to this many held-out (or training) windows as a file."""
        speech = cast("SpeechCorpus", corpus)
        windows = speech.held_out if held_out else speech.training
        return make_pool(windows, sequences, seed=seed)

    def pool_size(self, pool: bytes) -> int:
        """How many windows a pool has."""
        return len(self._windows(pool))

    def pick(self, pool: bytes, sequences: Sequence[int]) -> bytes:
        """A pool of these windows of another, in this order."""
        return pool_file(self._windows(pool)[list(sequences)])

    @torch.inference_mode()
    def evaluate(self, module: nn.Module, pool: bytes, device: torch.device) -> NDArray[np.float64]:
        """The loss of each window, as in training: nats per text token, and per audio token.

        Each runs by itself in the module's own precision, so its loss depends on no other.

        Raises:
            CorruptRecord: Not a pool of this family.
        """
        module.to(device).eval()
        found = [
            float(self._losses(module, torch.from_numpy(window[None].astype(np.int64))))
            for window in self._windows(pool)
        ]
        return np.array(found)

    @torch.inference_mode()
    def figures(self, module: nn.Module, pool: bytes, device: torch.device) -> Mapping[str, float]:
        """Perplexity of text and of the words in it, and the nats of a code of each codebook."""
        found = self._summary(module, pool, device)
        text = {"text perplexity": found.text_perplexity, "word perplexity": found.word_perplexity}
        audio = {f"codebook {n}": nats for n, nats in enumerate(found.audio, 1)}
        return {name: value for name, value in (text | audio).items() if math.isfinite(value)}

    @torch.inference_mode()
    def chart(self, modules: Mapping[str, nn.Module], pool: bytes, device: torch.device) -> Chart:
        """Nats by codebook, a line for each model."""
        found = {name: self._summary(module, pool, device) for name, module in modules.items()}
        return codebook_chart(found)

    def _summary(self, module: nn.Module, pool: bytes, device: torch.device) -> Summary:
        model = cast("SpeechModel", module.to(device).eval())
        return summarize(model.lm, list(self._windows(pool)))

    def generate(self, module: nn.Module, prompt: str, sampling: Sampling) -> Iterator[str]:
        """What the model says to somebody who is silent, word by word as it says it.

        Raises:
            ConfigError: A prompt, which it cannot hear, or a sampling setting that it lacks.
        """
        return monologue(self.speech(module), prompt, sampling)

    def speech(self, module: nn.Module) -> SpeechParts:
        """The parts of a module, ready for use; adapters become part of the layers they adapt."""
        model = cast("SpeechModel", module.eval())
        fuse_lora(model.lm)
        return SpeechParts(model.mimi, model.lm, self.text)

    def _losses(self, module: nn.Module, codes: Tensor) -> Tensor:
        codes, c = codes.to(device_of(module)), self.config
        return losses(
            module(codes),
            codes,
            c.lm,
            first_codebook_weight=c.first_codebook_weight,
            text_padding_weight=c.text_padding_weight,
        ).total

    def _windows(self, pool: bytes) -> Codes:
        return read_pool(pool, self.config.lm, self.config.segment_frames)

    def _predicted(self, codes: NDArray[np.integer]) -> int:
        """How many tokens of (..., rows, T) the model predicts."""
        return int(np.count_nonzero(codes[..., : 1 + self.config.lm.dep_q, :] != ZERO_TOKEN))


def _data_file(path: Path, root: Path) -> DataFile:
    inside = path.is_relative_to(root)  # a list may name files anywhere
    name = path.relative_to(root).as_posix() if inside else path.name
    return DataFile(path, name, bytes.fromhex(sha256_file(path)), path.stat().st_size)


def _of_codec(name: str) -> bool:
    return name.startswith(CODEC)


class SpeechFamily:
    """Speech models of any size."""

    name = "speech"

    @property
    def presets(self) -> Mapping[str, Preset]:
        """``tiny`` for a look at it, ``small``, and Kyutai's ``moshi-7b``."""
        return presets()

    def with_tokenizer(self, preset: Preset, tokenizer: bytes) -> Preset:
        """A preset with another SentencePiece file, and room for its tokens.

        Raises:
            CorruptRecord: It cannot be used.
        """
        size = TextStream(tokenizer).size
        card = max(size, int(preset.model["text_card"]))
        return replace(preset, model={**preset.model, "text_card": card}, tokenizer=tokenizer)

    def load(self, model: Table, tokenizer: bytes) -> SpeechTask:
        """Check the settings and the tokenizer file.

        Raises:
            ConfigError: A setting cannot be used; names the key.
            CorruptRecord: The tokenizer file is no SentencePiece model.
        """
        config = SpeechConfig.from_table(model)
        text = TextStream(
            tokenizer,
            frame_rate=config.mimi.frame_rate,
            padding=config.lm.existing_text_padding_id,
            end_of_padding=config.lm.existing_text_end_padding_id,
        )
        text.require_within(config.lm.text_card)
        return SpeechTask(config, text)


FAMILY: Family = SpeechFamily()
