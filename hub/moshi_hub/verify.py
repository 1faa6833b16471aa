"""The structural gate: is this submission what it claims to be, and within the hub's rules?

Decides only. ``collect`` (in ``moshi_hub.collect``) fetches; the commands print and exit. Needs no
torch: a contribution is judged before any model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta, DeltaProblem, max_delta_bytes
from moshi_fl.errors import BadSignature, CorruptRecord, SigningError
from moshi_fl.history import (
    DELTA_FILE,
    MAX_CONTRIBUTION_BYTES,
    Refs,
    branch_place,
    check_signature,
    contribution_path,
    signature_path,
)
from moshi_fl.hubfile import HubConfig
from moshi_fl.records import Contribution, Location, load
from moshi_fl.rules import Shapes
from moshi_fl.signing import MAX_SIGNATURE_BYTES
from moshi_fl.store import TreeEntry
from moshi_fl.weights import sha256_file

PLAIN_FILE = ("100644", "blob")
MAX_QUOTED = 200  # characters of a stranger's text in a finding

REASONS = {
    "wrong-branch": "the branch is not named contribute/<round>/<id>",
    "wrong-history": "the branch is not one commit on top of main",
    "unreadable": "it could not be fetched or read; it stays, and is tried again",
    "extra-files": "the branch changes more than its own record",
    "wrong-mode": "a file is not a plain file (symlink, submodule or executable)",
    "oversize": "larger than the hub accepts",
    "bad-record": "the record is malformed or not in canonical form",
    "unsigned": "the record's signature is not beside it",
    "bad-signature": "the signature is not one by the record's key over the record",
    "wrong-id": "the record's content does not have the id in its name",
    "wrong-hub": "made for another hub",
    "wrong-family": "made for another model family",
    "wrong-codec": "encoded with another codec than the hub's",
    "unknown-base": "its base is not a round of this hub",
    "stale-base": "its base is too old",
    "wrong-ref": "the delta is not where the record must put it",
    "delta-missing": "the delta's ref is not on the hub",
    "delta-mismatch": "the delta is not the one that the record names",
    "not-safetensors": "the delta is not a well-formed safetensors file",
    "unknown-tensor": "the delta has a tensor that the model lacks",
    "wrong-layout": "a tensor's dtype or shape does not follow from the model's",
    "bad-values": "a tensor holds values that no encoder makes, such as NaN",
    "empty": "the delta carries nothing",
    "zero-delta": "the delta changes nothing",
    "over-norm": "the delta's norm is above the hub's limit",
    "no-gain": "the evaluation has found that it makes the model worse",
    "replay": "this delta was already contributed",
    "one-per-round": "its key has another contribution to the same round",
    "superseded": "its owner sent another that counts: on a newer base, or with a lower id",
    "copy": "its delta points the same way as one that came before it",
}


@dataclass(frozen=True)
class Finding:
    """One broken rule: its code (a key of ``REASONS``) and a sentence about this case."""

    code: str
    message: str


@dataclass(frozen=True)
class Base:
    """A round that contributions may build on."""

    round: int
    weights: str
    shapes: Shapes
    missing_rows: int = 0


@dataclass(frozen=True)
class Rules:
    """What a hub's open round accepts."""

    config: HubConfig
    refs: Refs
    round: int
    bases: Mapping[int, Base]
    seen: Mapping[str, str] = field(default_factory=dict)
    """Hash of each delta already contributed, to the id that brought it first."""
    taken: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Key and base round of each contribution so far, to its id."""


@dataclass(frozen=True)
class Submission:
    """What a branch offers, as found. ``None`` stands for what could not even be had."""

    branch: str
    history: str
    """Empty when the branch is one commit on main; else what is wrong with it."""
    changes: tuple[TreeEntry, ...]
    record: bytes | None = None
    signature: bytes | None = None
    delta_commit: str | None = None
    delta_entries: tuple[TreeEntry, ...] = ()
    unreadable: str = ""
    """Why fetching failed; empty when it did not."""
    delta: Path | None = None
    """The delta file; fetched only after ``precheck`` found nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one submission."""

    branch: str
    contribution: Contribution | None
    findings: tuple[Finding, ...]
    norm: float | None = None
    signature: bytes = b""
    """The record's, as it was sent; empty when the record or it was refused."""
    carried: tuple[str, ...] = ()
    """Names of the tensors that the delta carries, all of them the model's; empty when refused."""

    @property
    def accepted(self) -> bool:
        """Whether no rule was broken."""
        return not self.findings

    @property
    def is_settled(self) -> bool:
        """Whether looking again could not change the verdict."""
        return all(finding.code != "unreadable" for finding in self.findings)


def precheck(submission: Submission, rules: Rules) -> Verdict:
    """Judge the branch and the record: everything that needs no byte of the delta."""
    findings = check_branch(submission.branch, rules)
    if findings:
        return Verdict(submission.branch, None, tuple(findings))
    contribution, findings = _read_record(submission)
    if contribution is None or findings:
        return Verdict(submission.branch, contribution, tuple(findings))
    signature = submission.signature or b""
    try:
        check_signature(contribution, signature)
    except BadSignature as error:
        return Verdict(submission.branch, contribution, (Finding("bad-signature", str(error)),))
    except SigningError as error:  # that says nothing about the signature
        return Verdict(submission.branch, None, (Finding("unreadable", str(error)),))
    findings = _check_claims(contribution, rules)
    return Verdict(submission.branch, contribution, tuple(findings), signature=signature)


def verify(submission: Submission, rules: Rules, first: Verdict | None = None) -> Verdict:
    """Judge a whole submission, delta included; ``first`` is what ``precheck`` said of it."""
    first = first or precheck(submission, rules)
    if not first.accepted or first.contribution is None:
        return first
    if submission.unreadable:
        return replace(first, findings=(Finding("unreadable", submission.unreadable),))
    findings = _check_delta_commit(submission, first.contribution)
    if findings or submission.delta is None:
        return replace(first, findings=tuple(findings))
    return _check_delta(submission.delta, first, first.contribution, rules)


def check_branch(branch: str, rules: Rules) -> list[Finding]:
    """Judge the name of a branch alone: nothing is fetched of one that cannot be accepted."""
    place = branch_place(branch)
    if place is None:
        return [Finding("wrong-branch", f"{branch[:MAX_QUOTED]!r} names no contribution.")]
    return _check_age(place[0], rules)


def _read_record(submission: Submission) -> tuple[Contribution | None, list[Finding]]:
    place = branch_place(submission.branch)
    if place is None:
        raise ValueError("the branch has passed check_branch")
    if submission.unreadable:
        return None, [Finding("unreadable", submission.unreadable)]
    if submission.history:
        return None, [Finding("wrong-history", submission.history)]
    path = contribution_path(*place)
    files = {
        path: (MAX_CONTRIBUTION_BYTES, "bad-record"),
        signature_path(*place): (MAX_SIGNATURE_BYTES, "unsigned"),
    }
    findings = _check_tree(submission.changes, files)
    if findings or submission.record is None:
        return None, findings or [Finding("bad-record", f"{path} could not be read.")]
    try:
        contribution = load(submission.record, Contribution, name=path)
    except CorruptRecord as error:
        return None, [Finding("bad-record", str(error))]
    if contribution.id != place[1]:
        findings.append(Finding("wrong-id", f"{path} holds contribution {contribution.id}."))
    elif contribution.round != place[0]:
        findings.append(Finding("wrong-branch", f"it was made on round {contribution.round}."))
    return contribution, findings


def _check_tree(
    entries: tuple[TreeEntry, ...], files: Mapping[str, tuple[int, str]]
) -> list[Finding]:
    """Insist on exactly these files: path to largest size, and to the code when it is missing."""
    findings = []
    for entry in entries:
        path, (limit, _) = entry.path, files.get(entry.path, (0, ""))
        if path not in files:
            findings.append(Finding("extra-files", f"{path[:MAX_QUOTED]!r} has no business here."))
        elif (entry.mode, entry.kind) != PLAIN_FILE:
            findings.append(Finding("wrong-mode", f"{path} has mode {entry.mode}, not 100644."))
        elif (entry.size or 0) > limit:
            findings.append(Finding("oversize", f"{path} has {entry.size} bytes; limit {limit}."))
    found = {entry.path for entry in entries}
    missing = [(code, path) for path, (_, code) in files.items() if path not in found]
    findings += [Finding(code, f"{path} is missing.") for code, path in missing]
    return findings[:10]


def _check_claims(contribution: Contribution, rules: Rules) -> list[Finding]:
    config, findings = rules.config, []
    if contribution.hub != config.hub.id:
        findings.append(Finding("wrong-hub", f"made for {contribution.hub}, not {config.hub.id}."))
    if contribution.family != config.family:
        findings.append(Finding("wrong-family", f"{contribution.family!r}, not {config.family!r}."))
    if contribution.codec != config.delta.codec:
        wanted = config.delta.codec
        findings.append(Finding("wrong-codec", f"{contribution.codec!r}, not {wanted!r}."))
    findings += _check_base(contribution, rules)
    return findings or _check_location(contribution, rules)


def _check_age(number: int, rules: Rules) -> list[Finding]:
    limit = rules.config.delta.max_staleness
    if number > rules.round:
        return [Finding("unknown-base", f"round {number} does not exist yet.")]
    if rules.round - number > limit:
        age = f"base is round {number}, current is round {rules.round}; limit {limit} behind."
        return [Finding("stale-base", age)]
    return []


def _check_base(contribution: Contribution, rules: Rules) -> list[Finding]:
    base = rules.bases.get(contribution.round)
    if base is None or base.weights != contribution.base:
        return [Finding("unknown-base", f"its base is not round {contribution.round} of this hub.")]
    return []


def _check_location(contribution: Contribution, rules: Rules) -> list[Finding]:
    delta = contribution.delta
    if [file.name for file in delta.files] != [DELTA_FILE]:
        return [Finding("wrong-ref", f"the delta must be one file named {DELTA_FILE}.")]
    file = delta.files[0]
    wanted = rules.refs.delta(contribution.round, file.sha256)
    if delta.ref != wanted:
        return [Finding("wrong-ref", f"the delta must be on {wanted}, not {delta.ref}.")]
    limit = delta_limit(rules, contribution.round)
    if file.bytes > limit:
        return [Finding("oversize", f"a delta of {file.bytes} bytes; the limit is {limit}.")]
    if earlier := rules.seen.get(file.sha256):
        return [Finding("replay", f"the same delta came with contribution {earlier}.")]
    if other := rules.taken.get((contribution.key, contribution.round)):
        said = (
            f"its key has contributed {other} to round {contribution.round}: withdraw one, or wait."
        )
        return [Finding("one-per-round", said)]
    return []


def delta_limit(rules: Rules, base_round: int) -> int:
    """Largest delta file that the codec can make for a base: nothing above it is even fetched."""
    codec = get_codec(rules.config.delta.codec, rules.config.delta.options)
    return max_delta_bytes(rules.bases[base_round].shapes, codec)


def _check_delta_commit(submission: Submission, contribution: Contribution) -> list[Finding]:
    location = contribution.delta
    if submission.delta_commit is None:
        return [Finding("delta-missing", f"{location.ref} is not there.")]
    if submission.delta_commit != location.commit:
        found = submission.delta_commit
        return [Finding("delta-mismatch", f"{location.ref} is at {found}, not {location.commit}.")]
    file = location.files[0]
    findings = _check_tree(submission.delta_entries, {file.name: (file.bytes, "bad-record")})
    if findings:
        return findings
    if submission.delta is None or not _matches(submission.delta, location):
        return [Finding("delta-mismatch", f"{file.name} has not the recorded size and hash.")]
    return []


def _matches(path: Path, location: Location) -> bool:
    file = location.files[0]
    return path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def _check_delta(path: Path, first: Verdict, contribution: Contribution, rules: Rules) -> Verdict:
    codec = get_codec(rules.config.delta.codec, rules.config.delta.options)
    try:
        delta = Delta.open(path, rules.bases[contribution.round].shapes, codec)
    except DeltaProblem as problem:
        return replace(first, findings=(Finding(problem.code, str(problem)),))
    norm, limit = delta.norm(), rules.config.delta.max_norm
    findings: tuple[Finding, ...] = ()
    if norm == 0.0:
        findings = (Finding("zero-delta", "every value of the delta is zero."),)
    elif norm > limit:
        findings = (Finding("over-norm", f"its norm is {norm:.4g}; the limit is {limit:.4g}."),)
    return replace(first, findings=findings, norm=norm, carried=delta.names)
