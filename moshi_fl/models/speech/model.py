"""The module whose tensors are the weights of a ``speech`` hub: the codec and the language model.

The codec never trains; it is among the weights because whoever speaks, or reads sound to train on,
needs the very same one. What trains is the language model, or a part of it.
"""

from __future__ import annotations

from typing import Self, cast

from torch import Tensor, nn

from moshi_fl.models.family import ParameterGroup
from moshi_fl.models.speech.family_config import SpeechConfig
from moshi_fl.models.speech.lm import LMModel, LMOutput
from moshi_fl.models.speech.lora import add_lora
from moshi_fl.models.speech.mimi import Mimi

CODEC, LANGUAGE = "mimi.", "lm."  # beginnings of the names of tensors
EXACT = tuple(
    f".ttt.{name}"
    for name in (
        *("W1", "b1", "W2", "b2"),
        *("ttt_norm_weight", "ttt_norm_bias", "learnable_token_idx"),
    )
)
ADAPTERS = (".lora_A.weight", ".lora_B.weight")


class SpeechModel(nn.Module):
    """Mimi and Moshi side by side.

    Attributes:
        mimi: With as many codebooks in use as the language model predicts; it does not train.
        lm: With adapters where the configuration has a rank for them.
    """

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.config = config
        self.mimi = make_codec(config)
        self.lm = make_language_model(config)
        self.only("all")

    def forward(self, codes: Tensor) -> LMOutput:
        """What the language model predicts of codes (B, n_q + 1, T)."""
        return cast("LMOutput", self.lm(codes))

    def train(self, mode: bool = True) -> Self:
        """Training mode for the language model; the codec stays as it is, with its codebooks."""
        super().train(mode)
        self.mimi.eval()
        return self

    def only(self, part: str) -> None:
        """Let one part learn: ``all`` of the language model, its adapters, or its TTT layers."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._learns(name, part))

    def _learns(self, name: str, part: str) -> bool:
        if name.startswith(CODEC):
            return False
        if part == "ttt":
            return ".ttt." in name
        if part == "lora":
            embedding = "emb" in name and ".low_rank." not in name
            return name.endswith(ADAPTERS) or (self.config.lora_embeddings and embedding)
        return True

    def parameter_group(self, name: str) -> ParameterGroup:
        """What a TTT layer computes in float32 is kept so; in bfloat16 its weights drift."""
        return ParameterGroup(stays_float32=name.endswith(EXACT))


def parts_of(config: SpeechConfig) -> tuple[str, ...]:
    """What of a model of this configuration can be trained by itself."""
    adapters = ("lora",) if config.lora_rank else ()
    return ("all", *adapters, *(("ttt",) if config.lm.ttt_layers else ()))


def make_language_model(config: SpeechConfig) -> LMModel:
    """An untrained language model, with the adapters that the configuration asks for."""
    lm = LMModel(config.lm)
    if config.lora_rank:
        add_lora(lm, rank=config.lora_rank, scaling=config.lora_scaling)
    return lm


def make_codec(config: SpeechConfig) -> Mimi:
    """The codec as the language model uses it, without its weights."""
    mimi = Mimi(config.mimi)
    mimi.set_num_codebooks(config.lm.dep_q)
    return mimi.eval().requires_grad_(requires_grad=False)
