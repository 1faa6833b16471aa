"""What the jobs of a CI hand to one another: a verdict, and what evaluators measured.

Small canonical JSON files. Whoever reads them takes them for hostile, although hub jobs wrote them:
the job that reads may write on the forge, and what it reads quotes what strangers sent.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from moshi_fl.errors import CorruptRecord, HubError
from moshi_fl.evidence import LARGEST_LOSS, Outcome, Precision
from moshi_fl.records import (
    Contribution,
    ContributionId,
    Count,
    HubId,
    Oid,
    Record,
    RoundNumber,
    Sha256,
    Text,
    dump,
    load,
)
from moshi_fl.text import clean
from moshi_hub.verify import REASONS, Finding, Verdict

MAX_RESULT_BYTES = 1 << 16
MAX_RESULTS = 32
MAX_BRANCH = 200  # characters; GitHub allows 255 bytes
MAX_MESSAGE = 500
MAX_FINDINGS = 10

Loss = Annotated[int, Meta(ge=0, le=LARGEST_LOSS)]
Change = Annotated[int, Meta(ge=-LARGEST_LOSS, le=LARGEST_LOSS)]
Seat = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z")]


class Broken(Record, frozen=True, kw_only=True):
    """One broken rule, as the gate found it."""

    code: Annotated[str, Meta(pattern=r"\A[a-z][a-z-]{0,39}\Z")]
    message: Annotated[str, Meta(max_length=MAX_MESSAGE)]


class GateResult(Record, frozen=True, kw_only=True):
    """What the gate says of the commit ``head``, and of nothing else."""

    format: Literal[1] = 1
    kind: Literal["verdict"] = "verdict"
    hub: HubId
    round: RoundNumber
    head: Oid
    branch: Annotated[str, Meta(max_length=MAX_BRANCH)]
    pull_request: Count
    findings: Annotated[tuple[Broken, ...], Meta(max_length=MAX_FINDINGS)]
    contribution: Contribution | None = None
    norm: float | None = None
    signed: bool = False
    trained: Text = ""


class Measurement(Record, frozen=True, kw_only=True):
    """What one evaluator measured of it on the sealed pool; losses in micro-nats per token.

    ``losses`` is a digest of the losses before and after on each sequence: they stay secret as the
    pool does, and evaluators who measured the same have the same.
    """

    format: Literal[1] = 1
    kind: Literal["measurement"] = "measurement"
    hub: HubId
    head: Oid
    contribution: ContributionId
    evaluator: Seat
    system: Text
    software: Text
    pool: Sha256
    precision: Precision
    share: Annotated[float, Meta(gt=0, le=1)]
    sequences: Annotated[int, Meta(ge=1, le=100_000)]
    losses: Sha256
    before: Loss
    after: Loss
    gain: Change
    standard_error: Loss
    outcome: Outcome


class _Kind(msgspec.Struct):
    kind: Literal["verdict", "measurement"]


@dataclass(frozen=True)
class Results:
    """All that is known of one head."""

    gate: GateResult
    measured: tuple[Measurement, ...] = ()

    @property
    def agreeing(self) -> tuple[Measurement, ...]:
        """The largest group of evaluators who measured the very same numbers."""
        groups: dict[Measurement, list[Measurement]] = {}
        for entry in self.measured:
            same = msgspec.structs.replace(entry, evaluator="x", system="", software="")
            groups.setdefault(same, []).append(entry)
        largest = max(map(len, groups.values()), default=0)
        return next((tuple(group) for group in groups.values() if len(group) == largest), ())

    @property
    def outcome(self) -> str:
        """``rejected``, ``accepted``, or, once measured, ``credit``, ``neutral``, ``disputed``."""
        if self.gate.findings:
            return "rejected"
        if not self.measured:
            return "accepted"
        found = self.agreeing
        if 2 * len(found) <= len(self.measured):
            return "disputed"
        outcome = found[0].outcome
        return "rejected" if outcome == "reject" else outcome


def gate_result(
    hub: str, number: int, verdict: Verdict, head: str, pull_request: int, trained: str = ""
) -> bytes:
    """A verdict as a file for other jobs; ``trained`` is what of the model the delta changes."""
    record = GateResult(
        hub=hub,
        round=number,
        head=head,
        branch=verdict.branch[:MAX_BRANCH],
        pull_request=pull_request,
        findings=tuple(
            Broken(code=finding.code, message=clean(finding.message)[:MAX_MESSAGE])
            for finding in verdict.findings[:MAX_FINDINGS]
        ),
        contribution=verdict.contribution,
        norm=verdict.norm,
        signed=bool(verdict.signature),
        trained=trained,
    )
    return dump(record)


def verdict_of(result: GateResult) -> Verdict:
    """The verdict that a file states."""
    findings = tuple(Finding(entry.code, entry.message) for entry in result.findings)
    signature = b"checked" if result.signed else b""
    return Verdict(result.branch, result.contribution, findings, result.norm, signature)


def read_gate(path: Path) -> GateResult:
    """The verdict in a file.

    Raises:
        CorruptRecord: It is no verdict.
    """
    return _checked(load(_bounded(path), GateResult, name=path.name), path.name)


def read_results(folder: Path, hub: str) -> Results:
    """All results in a folder.

    Args:
        folder: Where they lie; other files than ``*.json`` are left aside.
        hub: Id of the hub that they must be about.

    Raises:
        CorruptRecord: One of them is not what a job of this hub writes, or they do not belong
            together.
        HubError: There is no verdict.
    """
    paths = sorted(folder.glob("*.json"))
    if len(paths) > MAX_RESULTS:
        raise CorruptRecord(f"{folder}: more than {MAX_RESULTS} results.")
    gates: list[GateResult] = []
    measured: list[Measurement] = []
    for path in paths:
        data, name = _bounded(path), _shown(path)
        if _kind(data, name) == "verdict":
            gates.append(_checked(load(data, GateResult, name=name), name))
        else:
            measured.append(load(data, Measurement, name=name))
    if len(gates) != 1:
        raise HubError(
            f"{folder} holds {len(gates)} verdicts, not one.",
            hint="moshi-hub verify --head COMMIT --out verdict.json   (makes one)",
        )
    _belong(gates[0], measured, hub)
    return Results(gates[0], tuple(measured))


def _shown(path: Path) -> str:
    return clean(path.name)[:MAX_BRANCH]


def _kind(data: bytes, name: str) -> str:
    try:
        return msgspec.json.decode(data, type=_Kind).kind
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptRecord(f"{name}: no result of a job: {str(error)[:MAX_BRANCH]}.") from error


def _bounded(path: Path) -> bytes:
    """A small plain file's content: no link, which could lead anywhere."""
    name = _shown(path)
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CorruptRecord(f"{name} is no plain file.")
    if found.st_size > MAX_RESULT_BYTES:
        limit = MAX_RESULT_BYTES
        raise CorruptRecord(f"{name}: {found.st_size} bytes, the limit for a result is {limit}.")
    return path.read_bytes()


def _checked(result: GateResult, name: str) -> GateResult:
    if unknown := [f.code for f in result.findings if f.code not in REASONS]:
        raise CorruptRecord(f"{name}: {unknown[0]!r} is no reason to reject.")
    if not result.findings and result.contribution is None:
        raise CorruptRecord(f"{name}: it accepts, and names no contribution.")
    return result


def _belong(gate: GateResult, measured: Sequence[Measurement], hub: str) -> None:
    entry = gate.contribution
    wanted = (hub, gate.head, entry.id if entry else "")
    if gate.hub != hub:
        raise CorruptRecord(f"the verdict is about hub {gate.hub}, not {hub}.")
    for found in measured:
        if (found.hub, found.head, found.contribution) != wanted:
            raise CorruptRecord(f"evaluator {found.evaluator} measured something else.")
    if len({found.evaluator for found in measured}) < len(measured):
        raise CorruptRecord("two results are by the same evaluator.")
