"""One contribution measured by itself, outside of a session: for a person, or a job of a CI.

It is the same arithmetic as in an evaluation, on all sequences of the pool, and nobody signs it.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moshi_fl.consensus import Gain, Losses, gain
from moshi_fl.errors import CorruptRecord
from moshi_fl.evidence import pack
from moshi_fl.records import Contribution
from moshi_fl.replica import Replica
from moshi_hub.evaluation import desk_for
from moshi_hub.measure import Meter
from moshi_hub.opened import OpenRound
from moshi_hub.pinned import Pinned
from moshi_hub.propose import software
from moshi_hub.results import Measurement


@dataclass(frozen=True)
class Gauged:
    """Losses in micro-nats, one for each sequence, and what they say."""

    pool: str
    before: Losses
    after: Losses

    @property
    def gain(self) -> Gain:
        """What the contribution is worth."""
        return gain(self.before, self.after)

    @property
    def digest(self) -> str:
        """SHA-256 of all losses: equal where every number is."""
        text = f"{pack(self.before.tolist())}\n{pack(self.after.tolist())}\n"
        return hashlib.sha256(text.encode()).hexdigest()


def gauge(replica: Replica, found: OpenRound, entry: Contribution, folder: Path) -> Gauged:
    """Measure an accepted contribution on the whole pool.

    Args:
        replica: The hub's copy on this machine, with the pool.
        found: The open round.
        entry: The contribution.
        folder: The round's working folder, with the deltas.

    Raises:
        DataError: The pool is not here.
    """
    desk = desk_for(replica, found, folder / "deltas")
    rules = found.rules.config.evaluation
    meter = Meter(desk, rules.precision, rules.share)
    everything = list(range(meter.size()))
    before = np.array(meter.base_losses(entry.round, everything), np.int64)
    after = np.array(meter.after_losses(entry, everything), np.int64)
    return Gauged(desk.pool_digest, before, after)


def measurement(replica: Replica, one: Pinned, seat: str) -> Measurement:
    """What a job says of the contribution under a commit.

    Raises:
        CorruptRecord: The gate does not accept it.
    """
    entry, rules = one.verdict.contribution, one.found.rules.config
    if entry is None or not one.verdict.accepted:
        raise CorruptRecord(f"{one.head[:12]} is not accepted by the gate.")
    result = gauge(replica, one.found, entry, one.folder)
    worth = result.gain
    return Measurement(
        hub=rules.hub.id,
        head=one.head,
        contribution=entry.id,
        evaluator=seat,
        system=f"{platform.system()} {platform.machine()}",
        software=software(),
        pool=result.pool,
        precision=rules.evaluation.precision,
        share=rules.evaluation.share,
        sequences=len(result.before),
        losses=result.digest,
        before=int(result.before.mean()),
        after=int(result.after.mean()),
        gain=worth.mean,
        standard_error=worth.standard_error,
        outcome=worth.outcome,
    )
