"""Checks of the options that strategies take; each error names strategy, option and range."""

from __future__ import annotations

import math

from moshi_fl.errors import ConfigError, MoshiError


def number(
    strategy: str, option: str, value: object, low: float, high: float, *, below: bool = False
) -> None:
    """Insist on a number from ``low`` to ``high``, or to below ``high``.

    Raises:
        ConfigError: It is something else.
    """
    if type(value) in (int, float) and math.isfinite(float(str(value))):
        given = float(str(value))
        if low <= given <= high and not (below and given == high):
            return
    to = f"below {high:g}" if below else f"{high:g}"
    raise ConfigError(f"strategy {strategy}: {option} must be from {low:g} to {to}, not {value!r}.")


def whole(strategy: str, option: str, value: object, low: int, high: int) -> None:
    """Insist on an integer from ``low`` to ``high``.

    Raises:
        ConfigError: It is something else.
    """
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"strategy {strategy}: {option} must be an integer from {low} to {high}, not {value!r}."
        )


def tolerated(strategy: str, f: int | None, count: int, *, share: int = 2) -> int:
    """How many of ``count`` updates a strategy takes to be hostile.

    Args:
        strategy: Its name, for an error.
        f: What the hub says; None stands for ``floor((count - 1) / 3)``.
        count: How many updates there are.
        share: The strategy needs more than ``share * f`` updates.

    Raises:
        MoshiError: There are too few updates to tolerate so many.
    """
    if f is None:
        return (count - 1) // 3
    if share * f >= count:
        raise MoshiError(
            f"strategy {strategy} with f = {f} needs at least {share * f + 1} contributions, "
            f"there are {count}.",
            hint="lower f in [aggregation] options of hub.toml, or raise min_contributions.",
        )
    return f
