"""What both ``doctor`` commands print: one line per check, each with what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from moshi_fl.console import Console
from moshi_fl.errors import MoshiError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What one check found, and what a person can do about it (empty when all is well)."""

    check: str
    status: Status
    found: str
    next: str = ""


def require(passed: bool, check: str, found: str, otherwise: str) -> Check:
    """A check that passes or fails; ``otherwise`` says what to do when it fails."""
    return Check(check, "ok", found) if passed else Check(check, "fail", found, otherwise)


def advise(passed: bool, check: str, found: str, otherwise: str) -> Check:
    """A check that passes or warns."""
    return Check(check, "ok", found) if passed else Check(check, "warn", found, otherwise)


def attempt(check: str, examine: Callable[[], Check]) -> Check:
    """The check's own result, or a failure with the reason why it could not be made."""
    try:
        return examine()
    except MoshiError as error:
        return Check(check, "fail", str(error), error.hint)
    except OSError as error:
        return Check(check, "fail", str(error))


def report(console: Console, checks: Iterable[Check]) -> None:
    """Print all checks.

    Raises:
        MoshiError: At least one failed.
    """
    found = list(checks)
    console.table(map(asdict, found), ["check", "status", "found"], name="checks")
    for check in found:
        if check.next:
            console.hint(f"{check.check}: {check.next}")
    failed = [check.check for check in found if check.status == "fail"]
    if failed:
        raise MoshiError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}.")
