"""What it means when verification fails, in words: which file, what is wrong, what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root

from moshi_fl.errors import HubError, StaleHub, UntrustedHub
from moshi_fl.signed.files import SNAPSHOT, TARGETS, TIMESTAMP, root_name, root_versions

ADVICE = "ask the hub's maintainer; your cached rounds are untouched"
COMPARE = "ask the hub's maintainer for its fingerprint by another way: moshi-hub keys fingerprint"
_ROLES = ("root", "timestamp", "snapshot", "targets")


@dataclass(frozen=True)
class Case:
    """A verification that failed.

    Attributes:
        hub: The hub's address as shown.
        asked: The metadata file that was read last.
        files: What the hub offered.
        before: What was trusted before.
        known: Roots that were verified, offered ones included.
    """

    hub: str
    asked: str
    files: Mapping[str, bytes]
    before: Mapping[str, bytes]
    known: Mapping[str, bytes]

    @property
    def role(self) -> str:
        """Role of the file that was read last."""
        return self.asked.removesuffix(".json").rpartition(".")[2]


def explain(error: Exception, case: Case) -> HubError:
    """The refusal for what TUF's client says."""
    if isinstance(error, exceptions.ExpiredMetadataError):
        return _expired(str(error), case)
    if isinstance(error, exceptions.DownloadHTTPError):
        return UntrustedHub(f"{case.hub} lacks {case.asked}: it is not signed.", hint=ADVICE)
    if isinstance(error, exceptions.UnsignedMetadataError):
        return _wrong_root(case) if case.role == "root" else _too_few(case)
    moved = (exceptions.BadVersionNumberError, exceptions.LengthOrHashMismatchError)
    if isinstance(error, moved) and case.role != "root":
        return _rollback(case) or (_mixed(case) if _is_mixed(case) else altered(case.asked))
    said = str(error)[:200].rstrip(".")
    return UntrustedHub(f"{case.asked} is no usable signed metadata: {said}.", hint=ADVICE)


def altered(name: str) -> UntrustedHub:
    """Bytes that nobody signed."""
    return UntrustedHub(f"{name} was altered: it is not what was signed.", hint=ADVICE)


def another_root(hub: str, offered: str, wanted: str, forget: str) -> UntrustedHub:
    """A root that is not the pinned one."""
    return UntrustedHub(
        f"{hub} is another hub than before, or somebody has taken it over: "
        f"its root is {offered}, pinned is {wanted}.",
        hint=f"rm -r {forget}   (forgets the old one, if this is what you expect)",
    )


def unpinned(hub: str, offered: str, wanted: str) -> UntrustedHub:
    """A first contact with another root than the user demands."""
    return UntrustedHub(
        f"{hub} has the root {offered}, not the one demanded ({wanted}).", hint=COMPARE
    )


def unsigned(hub: str) -> UntrustedHub:
    """A hub without metadata."""
    return UntrustedHub(
        f"{hub} is not signed: it has no {root_name(1)}.",
        hint="ask its maintainer: moshi-hub init makes hubs whose rounds are signed",
    )


def replayed(name: str) -> UntrustedHub:
    """Metadata of a version that was seen before, but of other content."""
    return UntrustedHub(
        f"{name} is not the one of its version that was verified: it was altered or replaced.",
        hint=ADVICE,
    )


def mixed_files(name: str, offered: int, signed: int) -> UntrustedHub:
    """A well-formed file of another round than the one that was signed."""
    return UntrustedHub(
        f"the hub mixes its states: {name} is of round {offered}, "
        f"what was signed with it is round {signed}.",
        hint=ADVICE,
    )


def _expired(said: str, case: Case) -> StaleHub:
    role = next((role for role in _ROLES if role in said), "timestamp")
    name = (
        root_name(max(root_versions(case.known), default=1)) if role == "root" else f"{role}.json"
    )
    end = expiry(case.known.get(name) or case.files[name])
    days = max(0, (datetime.now(UTC) - end).days)
    return StaleHub(
        f"{case.hub} may be frozen: its {role} expired on {end:%Y-%m-%d at %H:%M} UTC, "
        f"{days} day(s) ago; nobody has confirmed since then what is newest.",
        hint="ask its maintainer: moshi-hub keys refresh   (or check this machine's clock)",
    )


def _wrong_root(case: Case) -> UntrustedHub:
    version = root_versions([case.asked])[0]
    above = case.known.get(root_name(version - 1))
    if above:
        have, need = _signers(above, case)
        if have < need:
            return UntrustedHub(
                f"the hub's root was changed without its old keys: {case.asked} has {have} of the "
                f"{need} signature(s) that {root_name(version - 1)} demands.",
                hint=COMPARE,
            )
    have, need = _signers(case.files[case.asked], case)
    return UntrustedHub(
        f"{case.asked} has too few signatures: {have} valid of the {need} that it demands itself.",
        hint=ADVICE,
    )


def _signers(judge: bytes, case: Case) -> tuple[int, int]:
    """Valid signatures on a root, and the threshold, by another root or by itself."""
    root = Metadata[Root].from_bytes(judge).signed
    return count_signatures(root, "root", case.files[case.asked])


def count_signatures(root: Root, role: str, data: bytes) -> tuple[int, int]:
    """Valid signatures on metadata of a role, and how many the role needs."""
    metadata = Metadata[Any].from_bytes(data)
    found = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return len(found.signed), found.threshold


def _too_few(case: Case) -> UntrustedHub:
    newest = root_name(max(root_versions(case.known)))
    root = Metadata[Root].from_bytes(case.known[newest]).signed
    found, wanted = count_signatures(root, case.role, case.files[case.asked])
    return UntrustedHub(
        f"{case.asked} has too few signatures: {found} valid of the {wanted} that are needed "
        f"by the keys in {newest}.",
        hint=ADVICE,
    )


def _rollback(case: Case) -> UntrustedHub | None:
    for name in (TIMESTAMP, SNAPSHOT, TARGETS):
        if name not in case.before or name not in case.files:
            continue
        offered, seen = _version(case.files[name]), _version(case.before[name])
        if offered < seen:
            return UntrustedHub(
                f"the hub was rewound: it offers version {offered} of {name}, "
                f"but version {seen} was already seen.",
                hint=ADVICE,
            )
    return None


def _is_mixed(case: Case) -> bool:
    return _named_version(case) not in {None, _version(case.files[case.asked])}


def _mixed(case: Case) -> UntrustedHub:
    return UntrustedHub(
        f"the hub mixes its states: {case.asked} is of version {_version(case.files[case.asked])}, "
        f"the signatures demand version {_named_version(case)}.",
        hint=ADVICE,
    )


def _named_version(case: Case) -> int | None:
    """The version that the metadata above names for a file."""
    above = {SNAPSHOT: TIMESTAMP, TARGETS: SNAPSHOT}.get(case.asked)
    if above is None:
        return None
    return int(_signed(case.files[above])["meta"][case.asked]["version"])


def _version(data: bytes) -> int:
    try:
        return int(_signed(data)["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def expiry(data: bytes) -> datetime:
    """When verified metadata expires."""
    return datetime.fromisoformat(_signed(data)["expires"])


def _signed(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)["signed"]
    return found
