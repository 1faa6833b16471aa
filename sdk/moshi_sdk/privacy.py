"""What contributions with differential privacy have spent: one ledger for each hub.

Every such run is entered before its first step and stays: whoever drops a run after a look at it,
and makes another, has told something by the choice. A run is entered once, however often it is
resumed, and two processes enter theirs one after the other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from moshi_fl.errors import ConfigError, CorruptRecord, MoshiError
from moshi_fl.records import Count, HubId, Privacy, Record, RoundNumber, dump, load
from moshi_fl.store.locking import FolderLock
from moshi_fl.text import round_up
from moshi_fl.weights import write_atomic

BUDGET = 8.0
LOWEST_NOISE = 0.3
WAIT_SECONDS = 120.0

Positive = Annotated[float, Meta(gt=0)]
RunName = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class PrivacyPlan(Record, frozen=True, kw_only=True):
    """How a run protects its data; part of what the run is."""

    noise_multiplier: Positive
    max_gradient_norm: Positive
    delta: Annotated[float, Meta(gt=0, lt=1)]
    sample_rate: Annotated[float, Meta(gt=0, le=1)]


class Spent(Record, frozen=True, kw_only=True):
    """One run; ``total`` is the epsilon of all runs up to this one, at the smallest delta."""

    run: RunName
    round: RoundNumber
    noise_multiplier: Positive
    sample_rate: Annotated[float, Meta(gt=0, le=1)]
    steps: Count
    delta: Annotated[float, Meta(gt=0, lt=1)]
    epsilon: Annotated[float, Meta(ge=0)]
    total: Annotated[float, Meta(ge=0)]


class Ledger(Record, frozen=True, kw_only=True):
    """All runs for one hub, in order."""

    format: Literal[1] = 1
    kind: Literal["privacy-ledger"] = "privacy-ledger"
    hub: HubId
    runs: tuple[Spent, ...] = ()

    @property
    def total(self) -> float:
        """Epsilon spent so far."""
        return self.runs[-1].total if self.runs else 0.0

    @property
    def delta(self) -> float | None:
        """The delta that it is meant with."""
        return min((run.delta for run in self.runs), default=None)


@dataclass(frozen=True)
class PrivacyOptions:
    """What a contributor may decide.

    Raises:
        ConfigError: A value out of range; names it.
    """

    noise_multiplier: float = 1.0
    max_gradient_norm: float = 1.0
    delta: float = 1e-5
    budget: float = BUDGET

    def __post_init__(self) -> None:
        _require(self.noise_multiplier >= LOWEST_NOISE, f"noise must be at least {LOWEST_NOISE}")
        _require(0 < self.max_gradient_norm < float("inf"), "clip must be above 0")
        _require(0 < self.delta < 1, "delta must be between 0 and 1")
        _require(0 < self.budget < float("inf"), "budget must be above 0")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"differential privacy: {rule}.")


def stated(plan: PrivacyPlan, steps: int) -> Privacy:
    """What the record of a contribution says of it."""
    from moshi_fl.train.private import UNIT, Spend, epsilon

    spend = Spend(plan.noise_multiplier, plan.sample_rate, steps)
    return Privacy(
        mechanism="dp-sgd",
        noise_multiplier=plan.noise_multiplier,
        max_gradient_norm=plan.max_gradient_norm,
        sample_rate=plan.sample_rate,
        steps=steps,
        delta=plan.delta,
        epsilon=round_up(epsilon([spend], plan.delta)),
        accountant="prv",
        unit=UNIT,
    )


class Account:
    """The ledger of one hub in a user's folder."""

    def __init__(self, home: Path, hub: str) -> None:
        self._path, self._hub = home / "privacy" / f"{hub}.json", hub

    def read(self) -> Ledger:
        """What has been spent.

        Raises:
            CorruptRecord: The file is damaged, or another hub's.
        """
        if not self._path.exists():
            return Ledger(hub=self._hub)
        ledger = load(self._path.read_bytes(), Ledger, name=str(self._path))
        if ledger.hub != self._hub:
            raise CorruptRecord(f"{self._path} is the ledger of hub {ledger.hub}.")
        return ledger

    def spend(self, run: str, number: int, asked: Privacy, budget: float) -> Ledger:
        """Enter a run, unless it is there already.

        Args:
            run: Its name, drawn at random.
            number: The round it is based on.
            asked: What it will do.
            budget: Most epsilon for all runs together.

        Raises:
            MoshiError: It would exceed the budget; nothing is entered.
            HubError: Another process holds the ledger.
        """
        lock = FolderLock(self._path.with_suffix(".lock"))
        with lock.held(WAIT_SECONDS):
            ledger = self.read()
            if any(entry.run == run for entry in ledger.runs):
                return ledger
            total = _total(ledger, asked)
            if total > budget:
                raise _refused(ledger, asked, total, budget)
            entry = Spent(
                run=run,
                round=number,
                noise_multiplier=asked.noise_multiplier,
                sample_rate=asked.sample_rate,
                steps=asked.steps,
                delta=asked.delta,
                epsilon=asked.epsilon,
                total=total,
            )
            ledger = Ledger(hub=self._hub, runs=(*ledger.runs, entry))
            write_atomic(self._path, dump(ledger))
            return ledger


def _total(ledger: Ledger, asked: Privacy) -> float:
    from moshi_fl.train.private import Spend, epsilon

    runs: list[Spent | Privacy] = [*ledger.runs, asked]
    spends = [Spend(run.noise_multiplier, run.sample_rate, run.steps) for run in runs]
    return round_up(epsilon(spends, min(run.delta for run in runs)))


def _refused(ledger: Ledger, asked: Privacy, total: float, budget: float) -> MoshiError:
    return MoshiError(
        f"the privacy budget of {budget:g} would be exceeded: epsilon {ledger.total:g} is spent "
        f"in {len(ledger.runs)} run(s), this one asks for {asked.epsilon:g}, together {total:g}.",
        hint="Fewer --steps, a smaller --batch-size or more --dp-noise cost less; --dp-budget N "
        "allows more; --discard drops this run, which has spent nothing.",
    )


def run_name(path: Path) -> str:
    """The name of a run in ledgers, kept in a file; drawn when there is none."""
    if not path.exists():
        write_atomic(path, secrets.token_hex(16).encode())
    return path.read_text()
