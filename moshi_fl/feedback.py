"""Error feedback on the contributor's disk: what a codec could not say yet is said next time.

The carry belongs to a chain of contributions. When one of them never made it into a round, what it
sent is not lost to the model alone: the carry from before it is used again.

A carry is *private* when all that went into it had differential privacy. Then it is no more than a
function of what that has given away, and so is what is made of it. No other carry may enter a delta
with differential privacy: it would bring in what was never accounted for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from moshi_fl.records import ContributionId, Record, RoundNumber, dump, load
from moshi_fl.weights import Weights, open_weights, read_header, save_weights, write_atomic

PRIVATE = {"privacy": "dp-sgd"}

Merged = Callable[[str, int], bool | None]
"""Whether a contribution (id, base round) is part of a round; None while that is still open."""


class Carried(Record, frozen=True, kw_only=True):
    """The last contribution sent from here, and the one whose carry it started from."""

    format: Literal[1] = 1
    kind: Literal["carried"] = "carried"
    id: ContributionId
    round: RoundNumber
    before: ContributionId | None = None


class Feedback:
    """The carries of one hub, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def base(self, merged: Merged) -> str | None:
        """Id of the contribution whose carry the next one starts from, or None."""
        last = self._last()
        if last is None:
            return None
        return last.before if merged(last.id, last.round) is False else last.id

    def load(self, contribution_id: str | None) -> Weights | None:
        """The carry that a contribution left behind, if it is still here."""
        if contribution_id is None or not self._path(contribution_id).exists():
            return None
        return open_weights(self._path(contribution_id))

    def is_private(self, contribution_id: str | None) -> bool:
        """Whether there is no carry, or one that came of differential privacy alone."""
        if contribution_id is None or not self._path(contribution_id).exists():
            return True
        return read_header(self._path(contribution_id)).metadata == PRIVATE

    def sent(
        self,
        contribution_id: str,
        number: int,
        carry: Weights,
        before: str | None,
        *,
        private: bool = False,
    ) -> None:
        """Remember the carry of a contribution that has just left this machine.

        ``private``: it came of differential privacy alone.
        """
        save_weights(self._path(contribution_id), carry, PRIVATE if private else None)
        record = Carried(id=contribution_id, round=number, before=before)
        write_atomic(self._folder / "last.json", dump(record))
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in {contribution_id, before}:
                path.unlink(missing_ok=True)

    def _last(self) -> Carried | None:
        path = self._folder / "last.json"
        return load(path.read_bytes(), Carried, name="last.json") if path.exists() else None

    def _path(self, contribution_id: str) -> Path:
        return self._folder / f"{contribution_id}.safetensors"
