"""Low-rank adapters on every linear layer: train, save, load, and fuse them (Hu et al. 2021).

``X.weight`` becomes ``X.frozen_W.weight``, with ``X.lora_A.weight`` and ``X.lora_B.weight`` beside
it: the names of Kyutai's adapter files, which hold only the last two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from moshi_fl.errors import ConfigError
from moshi_fl.models.speech.checkpoints import load_checkpoint


class LoraLinear(nn.Module):
    """``W x + scaling * B (A x)``, where only A and B learn; B starts at zero."""

    def __init__(self, plain: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.frozen_W = plain
        self.lora_A = nn.Linear(plain.in_features, rank, bias=False).to(plain.weight)
        self.lora_B = nn.Linear(rank, plain.out_features, bias=False).to(plain.weight)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_load_state_dict_pre_hook(_rename_weight)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., in), to (..., out)."""
        update: Tensor = self.lora_B(self.lora_A(x))
        return cast("Tensor", self.frozen_W(x)) + self.scaling * update

    @torch.no_grad()
    def fused(self) -> nn.Linear:
        """One linear layer that does the same."""
        plain = self.frozen_W
        plain.weight += self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return plain


def add_lora(
    model: nn.Module, *, rank: int = 128, scaling: float = 2.0, embeddings: bool = False
) -> None:
    """Give every linear layer of ``model`` an adapter, and freeze all else.

    Args:
        model: Changed in place; must have no adapters yet.
        rank: Of the updates.
        scaling: What they are multiplied by.
        embeddings: Train the embeddings as well.

    Raises:
        ConfigError: A rank below one, or a model that has adapters.
    """
    if rank < 1:
        raise ConfigError(f"lora: rank = {rank} must be above zero.")
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError("lora: the model has adapters already.", hint="fuse them first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = embeddings and "emb" in name
    for parent, name, child in list(_children(model)):
        if isinstance(child, nn.Linear):
            child.requires_grad_(requires_grad=False)  # low_rank, which is a part of an embedding
            setattr(parent, name, LoraLinear(child, rank, scaling))


def fuse_lora(model: nn.Module) -> None:
    """Turn every adapted layer of ``model`` back into a plain one that does the same, in place."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, LoraLinear):
            setattr(parent, name, child.fused())
    for parameter in model.parameters():
        parameter.requires_grad = True


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model, by name: what an adapter file holds."""
    return {name: value for name, value in model.state_dict().items() if _is_adapter(name)}


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter file into a model with adapters of its rank; projections may be stacked.

    Raises:
        CorruptRecord: Missing, unknown or misshapen tensors; nothing has changed.
    """
    rest = {name: value for name, value in model.state_dict().items() if not _is_adapter(name)}
    load_checkpoint(model, rest | dict(tensors))


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _rename_weight(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}{kind}" in state:
            state[f"{prefix}frozen_W.{kind}"] = state.pop(f"{prefix}{kind}")
