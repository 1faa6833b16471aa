"""What several commands share: settings with flags on top, and the hub they are about."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click

from moshi_fl.config import Settings, ensure_home, load_settings
from moshi_fl.errors import ConfigError
from moshi_fl.policy import Policy
from moshi_fl.store import redact
from moshi_sdk.sync import SyncManager

F = TypeVar("F", bound=Callable[..., Any])


def root_option(function: F) -> F:
    """``--root``: which root of trust the hub must have; its fingerprint, or empty."""

    def parse(_: click.Context, __: click.Parameter, value: str | None) -> str:
        from moshi_fl.signed.files import parse_pin

        return parse_pin(value) if value else ""

    return click.option(
        "--root",
        metavar="FINGERPRINT|FILE",
        callback=parse,
        help="Take the hub only under this root of trust. [default: the first one seen]",
    )(function)


def attestations_option(function: F) -> F:
    """``--min-attestations``: how many independent evaluators must agree on a round."""
    return click.option(
        "--min-attestations",
        type=click.IntRange(0, 100),
        help="Take only rounds with so many agreeing attestations of others than the hub.",
    )(function)


def settings_for(**flags: object) -> Settings:
    """Settings, with a hub.

    Raises:
        ConfigError: No source names a hub.
    """
    settings = load_settings(**flags)
    if not settings.hub:
        raise ConfigError(
            "no hub is given.",
            hint="--hub URL, or once and for all: moshi-fl config set hub URL",
        )
    return settings


def sync_manager(settings: Settings, root: str = "") -> SyncManager:
    """The hub's copy on this machine."""
    return SyncManager(
        settings.hub,
        home=ensure_home(),
        keep_rounds=settings.keep_rounds,
        root=root,
        policy=Policy(min_attestations=settings.min_attestations),
    )


FIRST_CONTACT = (
    "First contact: from now on this hub must be signed under the root below. "
    "Compare it with what its maintainer says; --root FINGERPRINT demands one."
)


def pick_device(name: str) -> str:
    """A torch device for the setting ``device``; ``auto`` takes the fastest there is.

    Raises:
        ConfigError: This machine, or this build of torch, does not have it.
    """
    import torch

    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there = ["cuda", *there] if there else []
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        return there[0]
    if name not in there:
        raise ConfigError(
            f"device {name} is not usable on this machine; there is {', '.join(there)}.",
            hint="--device auto   (takes the fastest there is; moshi-fl doctor shows them)",
        )
    return name


def hub_flag(settings: Settings) -> str:
    """What a suggested command needs to reach the same hub: ``--hub URL``, or nothing if set."""
    given = settings.origin("hub") == "--hub"
    return f" --hub {shlex.quote(redact(settings.hub))}" if given else ""


def use_threads(count: int) -> None:
    """Limit torch to so many CPU threads; 0 leaves its own choice."""
    import torch

    if count:
        torch.set_num_threads(count)
