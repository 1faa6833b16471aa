"""What the hub's commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from moshi_fl.config import ensure_home, load_settings
from moshi_fl.errors import ConfigError
from moshi_fl.records import Oid
from moshi_fl.replica import Replica
from moshi_hub.results import Seat

F = TypeVar("F", bound=Callable[..., Any])
PASSPHRASE = "MOSHI_HUB_PASSPHRASE"  # noqa: S105 - a variable's name


class _Spelled(click.ParamType[str]):
    """A word that is spelled as in a record; what would be an abbreviation is refused."""

    def __init__(self, name: str, kind: Any, wanted: str) -> None:
        self.name, self._kind, self._wanted = name, kind, wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(msgspec.convert(value, self._kind))
        except msgspec.ValidationError:
            self.fail(f"not {self._wanted}.", param, ctx)


COMMIT = _Spelled("commit", Oid, "a full commit id (40 or 64 hexadecimal digits)")
SEAT = _Spelled(
    "seat", Seat, "a name of letters, digits, dots, hyphens and underscores, at most 40"
)


def passphrase_option(function: F) -> F:
    """``--passphrase-env``: where the passphrase of this maintainer's keys is."""
    return click.option(
        "--passphrase-env",
        metavar="NAME",
        default=PASSPHRASE,
        help=f"Variable with the passphrase of your keys. [default: {PASSPHRASE}]",
    )(function)


def upstream_option(function: F) -> F:
    """``--upstream``: the hub with which a signer compares a round that is taken of it."""
    return click.option(
        "--upstream", metavar="URL", help="The hub that a taken round is of: compared, then signed."
    )(function)


def passphrase_from(variable: str) -> Callable[[str], bytes]:
    """What gives the passphrase of a key: the variable, or else whoever sits at the terminal."""

    def ask(key: str) -> bytes:
        if value := os.environ.get(variable):
            return value.encode()
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{key} has a passphrase, and nobody is there to ask for it.",
                hint=f"Set {variable}, or name another variable with --passphrase-env NAME.",
            )
        return str(click.prompt(f"Passphrase of {key}", hide_input=True, err=True)).encode()

    return ask


def replica_for(hub: str | None) -> Replica:
    """The hub's copy on this machine; what has expired is accepted, so that it can be renewed.

    Raises:
        ConfigError: No source names a hub.
    """
    settings = load_settings(hub=hub)
    if not settings.hub:
        raise ConfigError(
            "no hub is given.",
            hint="--hub URL, or once and for all: moshi-fl config set hub URL",
        )
    return Replica(settings.hub, ensure_home(), keep_rounds=settings.keep_rounds, even_expired=True)


def maintainer() -> str:
    """The name that a maintainer's commits carry."""
    return load_settings().contributor
