"""What several commands share: settings with flags on top, and the hub they are about."""

from __future__ import annotations

from moshi_fl.config import Settings, ensure_home, load_settings
from moshi_fl.errors import ConfigError
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


def pick_device(name: str) -> str:
    """A torch device for the setting ``device``; ``auto`` takes the fastest there is."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Limit torch to so many CPU threads; 0 leaves its own choice."""
    import torch

    if count:
        torch.set_num_threads(count)
