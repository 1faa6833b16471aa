"""SyncManager: brings a hub's global weights to this machine, verified, and keeps them current."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moshi_fl.config import home as default_home
from moshi_fl.errors import HubError, UntrustedHub
from moshi_fl.policy import NO_DEMANDS, Policy
from moshi_fl.records import Round
from moshi_fl.replica import Replica, Snapshot


class SyncManager:
    """Cold start and updates of one hub's global weights.

    A pull fetches the smallest set of bytes that leads to the wanted round, checks the chain of
    records and the digest of the weights, and only then puts them under their name. Readers of an
    earlier round are never disturbed.

    Args:
        hub: Path or URL of the hub.
        home: Folder of this user's moshi-fl data; ``MOSHI_FL_HOME`` or ``~/.moshi-fl`` by default.
        keep_rounds: How many rounds' weights to keep on this machine.
        timeout: Seconds after which one Git operation is given up.
        root: Fingerprint that the hub's root of trust must have; empty pins the first one seen.
        policy: What else is demanded of a round.

    Example:
        >>> snapshot = SyncManager("hub.git").pull()
        >>> weights = snapshot.load()          # memory-mapped, digest compared
    """

    def __init__(
        self,
        hub: str,
        *,
        home: Path | None = None,
        keep_rounds: int = 2,
        timeout: float = 600.0,
        root: str = "",
        policy: Policy = NO_DEMANDS,
    ) -> None:
        self.replica = Replica(
            hub,
            home or default_home(),
            keep_rounds=keep_rounds,
            timeout=timeout,
            root=root,
            policy=policy,
            attestations=_attestations,
        )

    def pull(self, number: int | None = None, *, offline: bool = False) -> Snapshot:
        """Bring a round here and return it.

        Args:
            number: The wanted round; the newest when None.
            offline: Do not ask the hub at all.

        Returns:
            The verified round. When the hub does not answer, or its signatures have expired, the
            newest one on this machine, with ``online=False``, the reason in ``problem`` and the
            time of the last good answer in ``checked``.

        Raises:
            UntrustedHub: The hub is not signed by whom this machine trusts, went back, or
                contradicts its records; or the policy demands more. Nothing was changed.
            HubError: No answer, and nothing usable on this machine.
        """
        if offline:
            return self._cached(number, HubError("not asked: offline."))
        try:
            return self.replica.pull(number)
        except UntrustedHub:
            raise
        except HubError as error:
            return self._cached(number, error)

    def _cached(self, number: int | None, error: HubError) -> Snapshot:
        snapshot = self.replica.cached()
        if snapshot is None or (number is not None and number != snapshot.round):
            wanted = "no round" if number is None else f"not round {number}"
            raise HubError(
                f"{error} On this machine there is {wanted} of it either.",
                hint=error.hint or "try again when the hub can be reached",
            ) from error
        return dataclasses.replace(snapshot, online=False, problem=str(error))


def _attestations(replica: Replica, record: Round) -> int:
    from moshi_sdk.audit import count_attestations  # only who demands some pays for counting

    return count_attestations(replica, record)
