"""SyncManager: brings a hub's global weights to this machine, verified, and keeps them current."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moshi_fl.config import home as default_home
from moshi_fl.errors import HubError, UntrustedHub
from moshi_fl.history import read_contributions
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.trusted import check_evaluation, external_attestations


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
        min_attestations: Refuse a round of whose contributions one has fewer agreeing attestations
            of appointed evaluators. The attestations themselves are fetched and checked.

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
        min_attestations: int = 0,
    ) -> None:
        self._min_attestations = min_attestations
        self.replica = Replica(
            hub, home or default_home(), keep_rounds=keep_rounds, timeout=timeout
        )

    def pull(self, number: int | None = None, *, offline: bool = False) -> Snapshot:
        """Bring a round here and return it.

        Args:
            number: The wanted round; the newest when None.
            offline: Do not ask the hub at all.

        Returns:
            The verified round. When the hub does not answer, the newest one on this machine, with
            ``online=False``, the reason in ``problem`` and the time of the last answer in
            ``checked``.

        Raises:
            UntrustedHub: The hub went back, or contradicts its records. Nothing was changed.
            HubError: No answer, and nothing usable on this machine.
        """
        if offline:
            return self._cached(number, HubError("not asked: offline."))
        try:
            if self._min_attestations:
                self._require_attestations(number)
            return self.replica.pull(number)
        except UntrustedHub:
            raise
        except HubError as error:
            return self._cached(number, error)

    def _require_attestations(self, number: int | None) -> None:
        """Check the wanted round before a byte of it is loaded."""
        replica, wanted = self.replica, self._min_attestations
        state = replica.look()
        newest = state.newest.round
        if number == 0 or newest == 0 or (number or 0) > newest:
            return  # random weights have no contributions; what is not there is refused elsewhere
        previous, record = replica.chain(state, (number or newest) - 1)[:2]
        main = replica.fetch_main()
        contributions = read_contributions(replica.repo, main, record)
        with replica.scratch() as scratch, replica.workspace() as files:
            verdicts = check_evaluation(
                replica.repo, scratch, files, main, record, previous, contributions
            )
        if (found := external_attestations(record, verdicts)) < wanted:
            raise UntrustedHub(
                f"round {record.round} rests on {found} agreeing attestations of independent "
                f"evaluators; you want at least {wanted}.",
                hint="moshi-fl config set min_attestations 0   (accepts such rounds), "
                "or sync --round N for an earlier one",
            )

    def _cached(self, number: int | None, error: HubError) -> Snapshot:
        snapshot = self.replica.cached()
        if snapshot is None or (number is not None and number != snapshot.round):
            wanted = "no round" if number is None else f"not round {number}"
            raise HubError(
                f"{error} On this machine there is {wanted} of it either.",
                hint=error.hint or "try again when the hub can be reached",
            ) from error
        return dataclasses.replace(snapshot, online=False, problem=str(error))
