"""The model that a command uses: a hub's, at some round, or one that was trained without a hub."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moshi_fl.cli import hub_option
from moshi_fl.config import Settings, load_settings
from moshi_sdk.options import pick_device, settings_for, sync_manager, use_threads

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Task
    from moshi_fl.weights import Weights

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OPTIONS = (
    hub_option,
    click.option("--round", "number", type=click.IntRange(0), help="Use this round."),
    click.option("--device", help="auto, cpu, mps, cuda or cuda:N."),
    click.option("--offline", is_flag=True, help="Use the round on this machine; ask no hub."),
    click.option(
        "--weights",
        type=FOLDER,
        help="Use no hub, but what python -m moshi_fl.train left here (its folder best or final), "
        "or import-checkpoint.",
    ),
    click.option(
        "--tokenizer",
        type=FILE,
        help="With --weights: what its data were made with. [default: the folder's own, or bytes]",
    ),
)


@dataclass(frozen=True)
class ChosenModel:
    """A model, ready to use on its device.

    Attributes:
        task: What can be asked of it.
        module: The model itself.
        round: Of the hub that it is from; None where it is from none.
    """

    task: Task
    module: nn.Module
    round: int | None


@dataclass(frozen=True)
class Choice:
    """What ``model_options`` read.

    Raises:
        UsageError: Options that contradict one another.
    """

    hub: str | None
    number: int | None
    device: str | None
    offline: bool
    weights: Path | None
    tokenizer: Path | None

    def __post_init__(self) -> None:
        if self.weights and (self.hub or self.offline or self.number is not None):
            raise click.UsageError(
                "--weights takes no hub: leave out --hub, --round and --offline."
            )
        if self.tokenizer and not self.weights:
            raise click.UsageError("--tokenizer goes with --weights; a hub has its own.")

    def load(self) -> ChosenModel:
        """The model that the options name.

        Raises:
            MoshiError: It cannot be had, or not be used.
        """
        if self.weights:
            from moshi_sdk.trained import load_trained

            settings, number = load_settings(device=self.device), None
            task, values = load_trained(self.weights, self.tokenizer)
        else:
            settings = settings_for(hub=self.hub, device=self.device)
            task, values, number = _from_hub(settings, self.number, offline=self.offline)
        return ChosenModel(task, _module(task, values, settings), number)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """``--hub``, ``--round``, ``--weights`` and so on; the function gets a ``choice``."""

    @functools.wraps(function)
    def choosing(*args: Any, **options: Any) -> None:
        chosen = {field.name: options.pop(field.name) for field in fields(Choice)}
        function(*args, choice=Choice(**chosen), **options)

    for option in reversed(OPTIONS):
        choosing = option(choosing)
    return choosing


def _from_hub(
    settings: Settings, number: int | None, *, offline: bool
) -> tuple[Task, Weights, int]:
    snapshot = sync_manager(settings).pull(number, offline=offline)
    from moshi_sdk.contribute import load_task

    return load_task(snapshot.state), snapshot.load(), snapshot.round


def _module(task: Task, weights: Weights, settings: Settings) -> nn.Module:
    from moshi_fl.models.common import model_of

    use_threads(settings.threads)
    return model_of(task, weights).to(pick_device(settings.device))
