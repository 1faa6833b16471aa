"""What several commands share: settings with flags on top, and the hub they are about."""

from __future__ import annotations

import shlex
from pathlib import Path

from moshi_fl.config import Settings, ensure_home, load_settings
from moshi_fl.errors import ConfigError
from moshi_fl.store import redact
from moshi_sdk.sync import SyncManager


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


def sync_manager(settings: Settings) -> SyncManager:
    """The hub's copy on this machine."""
    return SyncManager(settings.hub, home=ensure_home(), keep_rounds=settings.keep_rounds)


def signing_key(settings: Settings) -> Path | None:
    """The user's own SSH key; None when moshi-fl shall use the one it made for them."""
    return Path(settings.signing_key).expanduser() if settings.signing_key else None


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
