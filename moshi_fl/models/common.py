"""What all model families share: weights into a module and out of it, and strict settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_fl.errors import ConfigError, CorruptRecord
from moshi_fl.models.family import Explains, ReadsWithModel, Task, TrainsInParts
from moshi_fl.text import shorten, suggestion
from moshi_fl.weights import Weights

Settings = TypeVar("Settings")
KEYS_LISTED = "hub/README.md, under [model],"  # what tells of all settings of a family
MOST_COUNT = 2**24  # of anything that a model has; more is a slip, or malice
TINY, HUGE = 1e-9, 1e9  # of settings that are numbers
_SHOWN = 10


def weight_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module's weights are, by name: its parameters, and the buffers that it would save.

    Such buffers, a codec's codebooks, are found by other means than gradients; all but floating
    point ones are left out.
    """
    named = dict(module.named_parameters())
    kept = module.state_dict(keep_vars=True)
    buffers = {
        name: buffer
        for name, buffer in module.named_buffers()
        if name in kept and buffer.is_floating_point()
    }
    return named | buffers


def shapes_of_model(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a module that is not made for it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in weight_tensors(build()).items()}


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy weights into a module's parameters and buffers; all names and shapes must agree.

    Names in ``module.computed_tensors`` (tensors that a checkpoint may hold but that the module
    computes) are passed over.

    Raises:
        CorruptRecord: Missing, extra or misshapen tensors; the module is unchanged.
    """
    parameters = weight_tensors(module)
    computed: frozenset[str] = getattr(module, "computed_tensors", frozenset())
    problems = [f"{name} is missing" for name in parameters if name not in weights]
    for name in sorted(weights):
        if name not in parameters and name not in computed:
            problems.append(f"{name} is not in the model")
        elif name in parameters and weights[name].shape != tuple(parameters[name].shape):
            shape, wanted = list(weights[name].shape), list(parameters[name].shape)
            problems.append(f"{name} has shape {shape} instead of {wanted}")
    if problems:
        raise CorruptRecord(f"the weights do not fit the model: {abridged(problems, _SHOWN)}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(weights[name]))


def model_of(task: Task, weights: Weights) -> nn.Module:
    """A task's module with these weights.

    Raises:
        CorruptRecord: They do not fit.
    """
    module = task.build()
    load_weights(module, weights)
    return module


def abridged(problems: list[str], shown: int) -> str:
    """The first of many problems, and how many more there are."""
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "; ".join(problems[:shown] + more)


def extract_weights(
    module: nn.Module, *, only_trained: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of a module's parameters and buffers by name, or of what has trained."""
    return {
        name: np.array(tensor.detach().cpu().float().numpy())
        for name, tensor in weight_tensors(module).items()
        if tensor.requires_grad or not only_trained
    }


def require_part(task: object, part: str) -> None:
    """Whether a task's model can be trained so.

    Raises:
        ConfigError: It cannot; says what can be.
    """
    if isinstance(task, TrainsInParts):
        if part not in task.parts:
            raise ConfigError(
                f"this hub's model has no part {part!r} to train; parts: {', '.join(task.parts)}.",
                hint=f"--trains {' | '.join(task.parts)}",
            )
    elif part != "all":
        raise ConfigError(
            f"models of this family are trained whole; {part!r} alone is asked for.",
            hint="leave out --trains (and [training] trains in hub.toml)",
        )


def train_only(task: object, module: nn.Module, part: str) -> None:
    """Let only this part of a task's module learn; ``all`` is whatever its task builds to learn.

    Raises:
        ConfigError: There is no such part.
    """
    require_part(task, part)
    if isinstance(task, TrainsInParts):
        task.only(module, part)


@dataclass(frozen=True)
class TrainedPart:
    """What of a model a delta changes.

    Attributes:
        name: The smallest part that has all the tensors that it carries.
        tensors: How many they are.
        of: How many tensors of the model can learn.
    """

    name: str
    tensors: int
    of: int

    def __str__(self) -> str:
        return f"{self.name}: {self.tensors:,} of {self.of:,} tensors"


def trained_part(task: Task) -> Callable[[Collection[str]], TrainedPart]:
    """What tells, by the names of the tensors that a delta carries, what of the model it changes.

    The model is not made for it.
    """
    with torch.device("meta"):
        module = task.build()
    learning: dict[str, set[str]] = {}
    for part in task.parts if isinstance(task, TrainsInParts) else ("all",):
        train_only(task, module, part)
        learning[part] = {n for n, tensor in weight_tensors(module).items() if tensor.requires_grad}
    smallest_first = sorted(learning, key=lambda part: len(learning[part]))

    def find(carried: Collection[str]) -> TrainedPart:
        fitting = (part for part in smallest_first if learning[part].issuperset(carried))
        return TrainedPart(next(fitting, "all"), len(carried), len(learning["all"]))

    return find


def able_to_read(task: Task, weights: Callable[[], Weights]) -> Task:
    """The task, with what it needs of the model's weights to read data."""
    return task.reading_with(weights()) if isinstance(task, ReadsWithModel) else task


def explained(
    task: Task, module: nn.Module, pool: bytes, device: torch.device
) -> Mapping[str, float]:
    """What a task can tell of a module on a pool beside its loss, by name; mostly nothing."""
    return task.figures(module, pool, device) if isinstance(task, Explains) else {}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie."""
    return next(module.parameters()).device


def quoted(value: object) -> str:
    """A setting, or the name of one, in an error: a stranger's may be of any length."""
    return shorten(repr(value), 200)


def require_known(table: Iterable[str], known: Iterable[str], *, name: str) -> None:
    """Whether a table has only keys that it may have.

    Raises:
        ConfigError: It has others; names the first, and what may be meant.
    """
    known = set(known)
    for key in sorted(set(table) - known):
        ending = suggestion(key, known, listed=KEYS_LISTED)
        raise ConfigError(f"{name}: unknown key {quoted(key)}; {ending}")


def settings_from(kind: type[Settings], table: Mapping[str, Any], *, name: str) -> Settings:
    """A configuration dataclass from a TOML table.

    Raises:
        ConfigError: A key is unknown or missing; the dataclass itself checks the values.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    require_known(table, fields, name=name)
    missing = [key for key, field in fields.items() if key not in table and _required(field)]
    if missing:
        raise ConfigError(f"{name}: {missing[0]!r} is missing.")
    return kind(**table)


def _required(field: dataclasses.Field[Any]) -> bool:
    absent = dataclasses.MISSING
    return field.default is absent and field.default_factory is absent


def given(config: object, *keys: str) -> tuple[str, ...]:
    """Those of the keys that are not None."""
    return tuple(key for key in keys if getattr(config, key) is not None)


def require_counts(config: object, keys: Iterable[str], *, name: str) -> None:
    """Each of these settings must be a whole number of at least one.

    Raises:
        ConfigError: Names the first that is not.
    """
    for key in keys:
        value = getattr(config, key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: {key} = {quoted(value)} must be a whole number above zero.")
        if value > MOST_COUNT:
            raise ConfigError(f"{name}: {key} = {value} must be at most {MOST_COUNT}.")


def require_fractions(config: object, keys: Iterable[str], *, name: str) -> None:
    """Each of these settings must be a number from 0 up to, but not including, 1.

    Raises:
        ConfigError: Names the first that is not.
    """
    for key in keys:
        value = getattr(config, key)
        if type(value) not in {int, float} or not 0 <= value < 1:
            raise ConfigError(
                f"{name}: {key} = {quoted(value)} must be a number from 0 to below 1."
            )


def require_numbers(
    config: object, keys: Iterable[str], *, name: str, above_zero: bool = False
) -> None:
    """Each of these settings must be a number, and of a size that means something.

    Raises:
        ConfigError: Names the first that is not.
    """
    least = TINY if above_zero else -HUGE
    for key in keys:
        value = getattr(config, key)
        if type(value) not in {int, float} or not least <= value <= HUGE:
            rule = f"must be a number from {least:g} to {HUGE:g}"
            raise ConfigError(f"{name}: {key} = {quoted(value)} {rule}.")
