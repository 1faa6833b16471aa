"""One tree of errors; each belongs to the person who can fix it.

A message says what happened and to which thing; the hint says what to do next.
Only the commands' ``main()`` catches these. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit status of both commands."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REJECTED = 3
    MORE_ATTESTATIONS = 4
    INTERRUPTED = 130


class MoshiError(Exception):
    """Root of all errors that a person can act on.

    Args:
        message: What happened, and to which thing.
        hint: What to do next; empty when there is nothing sensible to say.
    """

    exit_code: Exit = Exit.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def in_full(self) -> str:
        """Message and hint on one line, for who goes on and tells it later."""
        return f"{self} {self.hint}".strip()


class HubError(MoshiError):
    """The hub, or the way to it, failed: unreachable, too slow, refusing, or not a hub."""


class UntrustedHub(HubError):
    """The hub's bytes contradict its records or what this client has seen before."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint or "ask the hub's maintainer; nothing was changed here")


class StaleHub(HubError):
    """The hub's signed metadata has expired: it may be frozen, so what it offers is not taken."""


class CorruptRecord(MoshiError):
    """Bytes that are not what they claim to be."""


class BadSignature(CorruptRecord):
    """A signature that is not by the key, over the bytes, and for the purpose that it should be."""


class SigningError(MoshiError):
    """Signing, or checking a signature, could not be done on this machine."""


class ConfigError(MoshiError):
    """A setting that cannot be used; names the key and, for files, the line."""


class WrongOption(ConfigError):
    """An option of the command line whose value cannot be used."""

    exit_code = Exit.USAGE


class DataError(MoshiError):
    """Training or evaluation data that cannot be used."""


class TrainingError(MoshiError):
    """Training cannot go on (for example: the loss is not finite)."""


class Rejected(MoshiError):
    """A contribution failed a rule of its hub."""

    exit_code = Exit.REJECTED
