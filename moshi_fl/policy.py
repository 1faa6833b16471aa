"""What a user demands of a round beyond what every client checks: pure, given its evidence."""

from __future__ import annotations

from dataclasses import dataclass

from moshi_fl.errors import UntrustedHub
from moshi_fl.records import Round


@dataclass(frozen=True)
class Policy:
    """A user's demands; the defaults demand nothing.

    Attributes:
        min_attestations: How many agreeing attestations a round needs of evaluators who are not
            the hub itself.
    """

    min_attestations: int = 0

    @property
    def asks_evidence(self) -> bool:
        """Whether evidence has to be looked at, at all."""
        return self.min_attestations > 0

    def check(self, record: Round, attestations: int) -> None:
        """Insist on what is demanded. Round 0 is random weights, and has nothing to attest.

        Args:
            record: The round.
            attestations: Agreeing external attestations of it.

        Raises:
            UntrustedHub: It has fewer than demanded.
        """
        if record.round and attestations < self.min_attestations:
            raise UntrustedHub(
                f"round {record.round} has {attestations} agreeing attestation(s) of others than "
                f"the hub; you demand {self.min_attestations}.",
                hint="wait for evaluators, or lower it: --min-attestations N",
            )


NO_DEMANDS = Policy()
