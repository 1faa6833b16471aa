"""What the hub's commands share."""

from __future__ import annotations

from moshi_fl.config import ensure_home, load_settings
from moshi_fl.errors import ConfigError
from moshi_fl.replica import Replica


def replica_for(hub: str | None) -> Replica:
    """The hub's copy on this machine.

    Raises:
        ConfigError: No source names a hub.
    """
    settings = load_settings(hub=hub)
    if not settings.hub:
        raise ConfigError(
            "no hub is given.",
            hint="--hub URL, or once and for all: moshi-fl config set hub URL",
        )
    return Replica(settings.hub, ensure_home(), keep_rounds=settings.keep_rounds)


def maintainer() -> str:
    """The name that a maintainer's commits carry."""
    return load_settings().contributor
