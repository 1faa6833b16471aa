"""Runs: the work of one contribution on this machine's disk, resumable at any instant.

A run is a folder. What is in it says how far it got: ``run.json`` (planned), ``checkpoint``
(training), ``trained.safetensors`` (trained), ``record.json`` (ready to send), ``sent`` (done).
Each appears in one step, so a killed process leaves a run in the state before or after, never
between.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from moshi_fl.errors import CorruptRecord, HubError, MoshiError
from moshi_fl.records import (
    Contribution,
    Count,
    Name,
    PublicKey,
    Record,
    RoundNumber,
    Sha256,
    Text,
    Training,
    dump,
    load,
)
from moshi_fl.replica import Snapshot
from moshi_fl.store.locking import LOCK_FILE, FolderLock
from moshi_fl.weights import sha256_bytes, write_atomic
from moshi_sdk.privacy import PrivacyPlan


class Change(Record, frozen=True, kw_only=False):
    """A figure of the base and of what was trained from it, on the held-out part."""

    before: float
    after: float


class Figures(Record, frozen=True, kw_only=True):
    """What a model's family can tell beside the loss, by name; for its contributor alone."""

    format: Literal[1] = 1
    kind: Literal["figures"] = "figures"
    figures: dict[str, Change]


class RunPlan(Record, frozen=True, kw_only=True):
    """What a run set out to do; equal plans are the same run."""

    format: Literal[1] = 1
    kind: Literal["run"] = "run"
    base_round: RoundNumber
    base: Sha256
    data: tuple[str, ...]
    fingerprint: Sha256
    contributor: Text
    key: PublicKey
    training: Training
    weight_decay: float
    gradient_clip: float
    warmup_fraction: float
    device: Annotated[str, Meta(max_length=40)]
    max_bytes: Count | None = None
    family: Name
    # Absent at their defaults, so that a plan of before these were there is still the same plan.
    accumulation: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    schedule: Name | UnsetType = UNSET
    beta2: float | UnsetType = UNSET
    trains: Name | UnsetType = UNSET
    privacy: PrivacyPlan | UnsetType = UNSET

    @property
    def is_private(self) -> bool:
        """Whether it trains with differential privacy."""
        return not isinstance(self.privacy, UnsetType)

    @property
    def part(self) -> str:
        """What of the model it trains."""
        return "all" if isinstance(self.trains, UnsetType) else self.trains


@dataclass(frozen=True)
class Run:
    """One run's folder and plan."""

    folder: Path
    plan: RunPlan

    @property
    def base(self) -> Path:
        """Weights that training started from; stays when the replica prunes them."""
        return self.folder / "base.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the base: the hub's vocabulary may have grown since."""
        return self.folder / "tokenizer.json"

    @property
    def checkpoint(self) -> Path:
        """Where training continues."""
        return self.folder / "checkpoint"

    @property
    def trained(self) -> Path:
        """What trained, after training; everything else is as in ``base``."""
        return self.folder / "trained.safetensors"

    @property
    def delta(self) -> Path:
        """The encoded delta."""
        return self.folder / "delta.safetensors"

    @property
    def carry(self) -> Path:
        """What the codec could not say of the delta."""
        return self.folder / "carry.safetensors"

    @property
    def record(self) -> Path:
        """The contribution's record, once the delta is encoded."""
        return self.folder / "record.json"

    @property
    def ledger_name(self) -> Path:
        """What this run is called in the ledger of privacy; another run has another name."""
        return self.folder / "ledger-name"

    @property
    def signature(self) -> Path:
        """The record's signature: not every key would make the same one again."""
        return self.folder / "record.sig"

    def keep_figures(self, figures: dict[str, Change]) -> None:
        """Keep what was measured, to tell it again when the run is resumed."""
        write_atomic(self.folder / "figures.json", dump(Figures(figures=figures)))

    def figures(self) -> dict[str, Change]:
        """What was measured; empty where nothing was."""
        path = self.folder / "figures.json"
        if not path.exists():
            return {}
        return load(path.read_bytes(), Figures, name=path.name).figures

    def contribution(self) -> Contribution | None:
        """The record, if the run got that far."""
        if not self.record.exists():
            return None
        return load(self.record.read_bytes(), Contribution, name="record.json")

    @property
    def is_sent(self) -> bool:
        """Whether the contribution has left this machine."""
        return (self.folder / "sent").exists()

    def mark_sent(self) -> None:
        """Finish the run: keep what identifies it, drop the weights."""
        write_atomic(self.folder / "sent", b"")
        self.drop_weights()

    def drop_weights(self) -> None:
        """Remove what only an unfinished run needs."""
        for path in (self.base, self.checkpoint, self.trained, self.delta, self.carry):
            path.unlink(missing_ok=True)

    def at_work(self) -> AbstractContextManager[None]:
        """Keep other processes off this run.

        Raises:
            MoshiError: One is at work on it.
        """
        hint = "wait until it has ended; if it did not send it, --resume will"
        return _only_one(self.folder, "another process is working on this very contribution.", hint)


class Runs:
    """All runs for one hub."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, plan: RunPlan) -> Run:
        """The run of this plan, whether it has begun or not."""
        return Run(self._folder / sha256_bytes(dump(plan))[:16], plan)

    def start(self, plan: RunPlan, snapshot: Snapshot) -> Run:
        """The run of this plan: the one that is already there, or a new one.

        Raises:
            CorruptRecord: It could not be read again, say because a number is too large.
        """
        load(dump(plan), RunPlan, name="what was asked for")
        run = self.of(plan)
        with run.at_work():
            self._sweep()
            if not (run.folder / "run.json").exists():
                run.base.unlink(missing_ok=True)
                _link(snapshot.path, run.base)
                write_atomic(run.tokenizer, snapshot.state.tokenizer)
                write_atomic(run.folder / "run.json", dump(plan))
            os.utime(run.folder / "run.json")
        return run

    def sending(self, key: str, number: int) -> AbstractContextManager[None]:
        """Keep other processes from making another contribution of a key to a round meanwhile.

        Raises:
            MoshiError: One is at it, whose work this one would overtake, or be overtaken by.
        """
        folder = self._folder / f"round-{number}-{sha256_bytes(key.encode())[:16]}"
        return _only_one(
            folder,
            f"another process is working on a contribution of this key to round {number}; "
            "a hub takes one per key and round.",
            "wait until it has ended, or end it by Ctrl-C: its work stays, and --resume goes on",
        )

    def _sweep(self) -> None:
        """Remove what killed processes left: weights of runs never begun or sent, and locks."""
        for run in self:
            if run.is_sent:
                run.drop_weights()
        for folder in self._folder.glob("*/"):
            if not (folder / "run.json").exists():
                with suppress(MoshiError), _only_one(folder, "it is at work"):
                    shutil.rmtree(folder, ignore_errors=True)

    def sent(self) -> list[RunPlan]:
        """Plans of what has left this machine, the newest first."""
        return [run.plan for run in self if run.is_sent]

    def unfinished(self) -> Run | None:
        """The run that was worked on last and has not been sent."""
        return next((run for run in self if not run.is_sent), None)

    def resume(self) -> Run:
        """Like ``unfinished``.

        Raises:
            MoshiError: There is none.
        """
        if run := self.unfinished():
            return run
        raise MoshiError(
            "there is no unfinished contribution for this hub on this machine.",
            hint="moshi-fl contribute --data PATH   (starts one)",
        )

    def discard(self) -> Run:
        """Remove the run that ``resume`` would continue, with all its work.

        Raises:
            MoshiError: There is none, or a process is working on it.
        """
        run = self.resume()
        with run.at_work():
            (run.folder / "run.json").unlink()  # from here on it is no run
            shutil.rmtree(run.folder, ignore_errors=True)
        return run

    def __iter__(self) -> Iterator[Run]:
        """All runs, the one worked on last first."""
        plans = sorted(
            self._folder.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        for path in plans:
            yield Run(path.parent, _plan_in(path))


def _plan_in(path: Path) -> RunPlan:
    try:
        return load(path.read_bytes(), RunPlan, name=str(path))
    except CorruptRecord as error:
        hint = f"remove the folder {path.parent}: without its plan, that work cannot go on"
        raise CorruptRecord(str(error), hint=hint) from error


@contextmanager
def _only_one(folder: Path, busy: str, hint: str = "") -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(FolderLock(folder / LOCK_FILE).held(0))
        except HubError as error:
            raise MoshiError(busy, hint=hint) from error
        yield


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
