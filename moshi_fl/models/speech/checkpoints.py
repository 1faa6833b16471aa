"""Kyutai's released files into our modules, strictly: what does not fit is listed by kind.

Released files stack some projections (``in_proj_weight``); the modules' load hooks split them, so
both forms load. ``released_state`` is the other direction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moshi_fl.errors import CorruptRecord

SHOWN = 10


def load_checkpoint(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint into a module; all names and shapes must agree.

    Raises:
        CorruptRecord: Missing, unknown or misshapen tensors, the first ten of each; nothing has
            changed.
    """
    found = fitted(module, tensors)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(found[name])


def fitted(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint under the module's own names; nothing is copied, the module may be on meta.

    Raises:
        CorruptRecord: Missing, unknown or misshapen tensors, the first ten of each.
    """
    found, own = renamed(module, tensors), module.state_dict()
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    ]
    problems = [
        *_listed("missing", [name for name in own if name not in found]),
        *_listed("unknown", [name for name in found if name not in own]),
        *_listed("misshapen", shapes),
    ]
    if problems:
        raise CorruptRecord(
            f"the checkpoint does not fit {type(module).__name__}: {'; '.join(problems)}.",
            hint="check that checkpoint and configuration belong together",
        )
    return {name: found[name] for name in own}


def released_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module under the names of the released files: projections stacked."""
    state: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, value in module.state_dict().items():
        listed = re.fullmatch(r"(.*(?:in|out)_proj)s\.\d+\.(.+)", name)
        if listed is None:
            state[name] = value
            continue
        whole = f"{listed[1]}.{listed[2]}"
        if whole.endswith("in_proj.weight"):
            whole = f"{listed[1]}_weight"
        stacks.setdefault(whole, []).append(value)
    return state | {name: torch.cat(parts) for name, parts in stacks.items()}


def renamed(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the module's own names: what its load hooks make of them."""
    state = dict(tensors)
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for hook in part._load_state_dict_pre_hooks.values():  # noqa: SLF001
            hook(state, prefix, {}, True, [], [], [])
    return state


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"]
