"""Released checkpoints as the weights of a hub's round 0.

They are checked, widened to float32 and written tensor by tensor, so that the memory this takes is
that of the largest tensor, and of new TTT layers where there are some.

What a release does not have, adapters and TTT layers, starts as ``lora`` and ``mixer`` say: the
model computes the same as before where adapters are added, and TTT starts from attention's
projections.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models import get_preset
from moshi_fl.models.common import shapes_of_model, weight_tensors
from moshi_fl.models.folder import CONFIG_FILE, RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from moshi_fl.models.speech.checkpoints import fitted, renamed
from moshi_fl.models.speech.family_config import SpeechConfig, codec_table
from moshi_fl.models.speech.lm import LMModel
from moshi_fl.models.speech.lora import lora_state
from moshi_fl.models.speech.mixer import hybrid_weights
from moshi_fl.models.speech.model import (
    ADAPTERS,
    CODEC,
    LANGUAGE,
    SpeechModel,
    make_codec,
    make_language_model,
)
from moshi_fl.models.speech.released import (
    MappedFile,
    Released,
    map_file,
    open_release,
    said_of,
)
from moshi_fl.models.speech.text_stream import TextStream
from moshi_fl.models.speech.ttt import Ttt
from moshi_fl.weights import atomic_file, header_bytes, write_atomic

DEFAULT_RANK = 64
RECIPE_OF = "moshi-7b"  # the preset whose recipe an imported language model has

Sources = Mapping[str, Tensor | Callable[[], Tensor]]
"""Tensors by name, or what makes them when it is their turn."""


@dataclass(frozen=True)
class Choices:
    """What a maintainer may decide about an import.

    Attributes:
        preset: Take the codec and the tokenizer alone, and this preset's language model, new.
        model: Keys of ``[model]`` to have otherwise, such as ``lora_rank`` and ``ttt_layers``.
        seed: Of what is new.
    """

    preset: str | None = None
    model: Mapping[str, Any] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        folder: Where.
        parameters: How many numbers, float32.
        part: What contributors train unless they say otherwise.
    """

    folder: Path
    parameters: int
    part: str


def import_checkpoint(source: Path, out: Path, choices: Choices) -> Imported:
    """Write released files as a folder that ``moshi-hub init --weights`` takes.

    Args:
        source: Folder with the released files.
        out: Must not exist yet, or be empty.
        choices: What to have otherwise.

    Raises:
        ConfigError: A file is missing, or the configuration cannot be used.
        CorruptRecord: A file is damaged, or its tensors are not those of the configuration.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists.", hint="give another folder with --out")
    released = open_release(source)
    config, tokenizer = _config(released, choices), released.tokenizer()
    text = TextStream(tokenizer)
    with said_of(source / CONFIG_FILE):
        text.require_within(config.lm.text_card)
    files = _map(released, choices)
    sources = _sources(files, config, choices)
    shapes = shapes_of_model(lambda: SpeechModel(config))
    assert sources.keys() == shapes.keys(), "the import makes other tensors than the model has"
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out / WEIGHTS_FILE, sources, shapes, list(files.values()))
    recipe = _recipe(config, choices.preset or RECIPE_OF)
    write_atomic(out / TOKENIZER_FILE, tokenizer)
    write_atomic(out / RECIPE_FILE, _json(recipe))
    write_atomic(out / CONFIG_FILE, _json({"family": "speech", **config.to_table()}))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return Imported(out, parameters, str(recipe["training"]["trains"]))


def _map(released: Released, choices: Choices) -> dict[str, MappedFile]:
    """The files that are used, by what they hold."""
    files = {"codec": map_file(released.codec)}
    if not choices.preset:
        files["language"] = map_file(released.language)
        if released.adapters:
            files["adapters"] = map_file(released.adapters)
    return files


def _sources(files: Mapping[str, MappedFile], config: SpeechConfig, choices: Choices) -> Sources:
    """Everything under the hub's names."""
    codec = fitted(_on_meta(lambda: make_codec(config)), files["codec"].tensors)
    if choices.preset:
        language: Sources = _fresh(config, choices.seed)
    else:
        language = _language(files, config, choices.seed)
    return {f"{CODEC}{name}": value for name, value in codec.items()} | {
        f"{LANGUAGE}{name}": value for name, value in language.items()
    }


def _config(released: Released, choices: Choices) -> SpeechConfig:
    changes = dict(choices.model or {})
    if choices.preset:
        mimi = released.mimi_config()
        codec = {"mimi": codec_table(mimi), "card": mimi.quantizer.bins}
        table = get_preset("speech", choices.preset).model
        return SpeechConfig.from_table({**table, **codec, **changes})
    known = {"lora_rank": DEFAULT_RANK, "first_codebook_weight": 100.0}
    if released.adapters:
        known |= {
            k: released.table[k] for k in ("lora_rank", "lora_scaling") if k in released.table
        }
    lm = released.config().to_table()
    return SpeechConfig.from_table({**lm, **known, **changes})


def _language(files: Mapping[str, MappedFile], config: SpeechConfig, seed: int) -> Sources:
    """The released language model under our names, and what makes what it does not have."""
    plain = replace(config.lm, ttt_layers=0)
    weights = fitted(_on_meta(lambda: LMModel(plain)), files["language"].tensors)
    if config.lm.ttt_layers:
        weights = hybrid_weights(weights, _fresh_ttt(config, seed), config.lm)
    if not config.lora_rank:
        return dict(weights)
    model = _on_meta(lambda: make_language_model(config))
    if "adapters" in files:
        given = {**weights, **files["adapters"].tensors}
        return dict(fitted(model, given))
    adapters = {name: tuple(value.shape) for name, value in lora_state(model).items()}
    fresh = {name: _adapter(name, shape, seed) for name, shape in adapters.items()}
    return {**renamed(model, weights), **fresh}


def _fresh(config: SpeechConfig, seed: int) -> dict[str, Tensor]:
    """A new language model."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return dict(weight_tensors(make_language_model(config)))


def _fresh_ttt(config: SpeechConfig, seed: int) -> dict[str, Tensor]:
    """New TTT layers; their projections will be attention's."""
    found, c = {}, config.lm
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for layer in range(c.num_layers - c.ttt_layers, c.num_layers):
            base = f"transformer.layers.{layer}.self_attn.ttt."
            for name, value in Ttt(c.ttt).state_dict().items():
                found[f"{base}{name}"] = value
    return found


def _adapter(name: str, shape: tuple[int, ...], seed: int) -> Callable[[], Tensor]:
    """Of A uniform as ``kaiming_uniform_(a=sqrt(5))``, of B zeros; the same in any order."""

    def make() -> Tensor:
        if name.endswith(ADAPTERS[1]):
            return torch.zeros(shape)
        own = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(own, "big"))
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return make


def _recipe(config: SpeechConfig, preset: str) -> dict[str, dict[str, Any]]:
    """Training, delta and evaluation of the hub."""
    chosen = get_preset("speech", preset)
    part = "lora" if config.lora_rank else "ttt" if config.lm.ttt_layers else "all"
    if "trains" not in chosen.training:
        part = "all"
    return {
        "training": {**chosen.training, "trains": part},
        "delta": dict(chosen.delta),
        "evaluation": dict(chosen.evaluation),
    }


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _write_weights(
    path: Path,
    sources: Sources,
    shapes: Mapping[str, tuple[int, ...]],
    files: Sequence[MappedFile],
) -> None:
    """Float32, in canonical order, one tensor in memory at a time."""
    with atomic_file(path) as file:
        file.write(header_bytes({name: ("F32", shape) for name, shape in shapes.items()}))
        for name in sorted(shapes):
            source = sources[name]
            tensor = (source() if callable(source) else source).detach().float().contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise CorruptRecord(f"{name} holds a number that is not finite.")
            file.write(tensor.numpy().astype("<f4", copy=False).data)
            for mapped in files:
                mapped.release()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
