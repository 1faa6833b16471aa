"""TUF's client workflow on one commit: python-tuf verifies, this module feeds it and translates.

The order and the rules are TUF's own (specification 1.0, section 5): root by root from the pinned
one, then timestamp, snapshot and targets, each by signature, version and expiry; then the hub's
files by length and hash. Nothing is written but in the working folder that the caller gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    RepositoryError,
)
from tuf.ngclient import FetcherInterface, TargetFile, Updater, UpdaterConfig

from moshi_fl.errors import UntrustedHub
from moshi_fl.signed import refusals
from moshi_fl.signed.files import (
    MAX_METADATA_BYTES,
    MAX_ROOTS,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    Trust,
    find_root,
    fingerprint,
    pinned,
    root_name,
    root_versions,
)

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_HISTORY = "root_history"  # where python-tuf keeps its roots


@dataclass(frozen=True)
class Offer:
    """What is to be verified.

    Attributes:
        hub: The hub's address, for messages.
        files: All files of the offered commit that matter, within their limits.
        targets: Names of those that must be signed.
        replica: The folder to remove for whoever wants to forget the hub.
        pin: Fingerprint of a root that must be in the chain; empty to trust on first use.
        even_expired: For maintainers, who renew what has expired.
    """

    hub: str
    files: Mapping[str, bytes]
    targets: tuple[str, ...]
    replica: Path
    pin: str = ""
    even_expired: bool = False


class CommitFetcher(FetcherInterface):
    """Hands python-tuf the files of a commit; what is not there is a 404."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.asked = root_name(1)

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.asked = url.rpartition("/")[2]
        if self.asked not in self.files:
            raise DownloadHTTPError(f"no {self.asked}", 404)
        return iter([self.files[self.asked]])

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The same, without a temporary file in between."""
        data = b"".join(self.fetch(url))
        if len(data) > max_length:
            raise DownloadLengthMismatchError(f"{len(data)} bytes, at most {max_length} expected")
        return data


def verify(offer: Offer, before: Mapping[str, bytes], folder: Path) -> Trust:
    """Verify a hub's offer against what was trusted before.

    Args:
        offer: What the hub offers.
        before: Metadata that this machine verified last; empty at the first contact.
        folder: An empty working folder.

    Raises:
        StaleHub: The metadata has expired: the hub may be frozen, or nobody looks after it.
        UntrustedHub: Anything else that is wrong; nothing is to be kept.
    """
    bootstrap = _bootstrap(offer, before)
    _insist_on_ed25519(offer.files)
    _lay_out(before, folder)
    fetcher = CommitFetcher(offer.files)
    try:
        updater = _updater(folder, fetcher, bootstrap)
        if offer.even_expired:
            # No public way to say at which time to judge; python-tuf's own tests mock the clock.
            updater._trusted_set.reference_time = _LONG_AGO  # noqa: SLF001
        updater.refresh()
        signed = {name: updater.get_targetinfo(name) for name in offer.targets}
    except (RepositoryError, DownloadError) as error:
        known = _roots(folder)
        case = refusals.Case(offer.hub, fetcher.asked, offer.files, before, known)
        raise refusals.explain(error, case) from error
    metadata = _result(folder, offer)
    for name, info in signed.items():
        _compare(name, info, offer.files)
    if offer.pin and find_root(metadata, offer.pin) is None:
        raise refusals.unpinned(offer.hub, pinned(metadata), offer.pin)
    expires = min(int(refusals.expiry(data).timestamp()) for data in _newest(metadata))
    return Trust(metadata, pinned(metadata), not before, expires)


def _bootstrap(offer: Offer, before: Mapping[str, bytes]) -> bytes:
    """The root that all else is judged by: the pinned one, or at first contact the offer's."""
    if not root_versions(offer.files):
        raise refusals.unsigned(offer.hub)
    if root_versions(before):
        first = root_versions(before)[0]
        offered = offer.files.get(root_name(first))
        if offered is not None and offered != before[root_name(first)]:
            raise refusals.another_root(
                offer.hub, fingerprint(offered), pinned(before), str(offer.replica)
            )
        return before[root_name(first)]
    version = find_root(offer.files, offer.pin) if offer.pin else 1
    if version is None:
        raise refusals.unpinned(offer.hub, pinned(offer.files), offer.pin)
    if root_name(version) not in offer.files:
        raise refusals.unsigned(offer.hub)
    return offer.files[root_name(version)]


def _insist_on_ed25519(files: Mapping[str, bytes]) -> None:
    """Refuse roots with other keys: some kinds would make the library start programs."""
    for version in root_versions(files):
        try:
            keys = json.loads(files[root_name(version)])["signed"]["keys"].values()
            kinds = {(key["keytype"], key["scheme"]) for key in keys}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            kinds = set()
        if kinds != {("ed25519", "ed25519")}:
            raise UntrustedHub(
                f"{root_name(version)} is no root with ed25519 keys.", hint=refusals.ADVICE
            )


def _updater(folder: Path, fetcher: CommitFetcher, bootstrap: bytes) -> Updater:
    config = UpdaterConfig(
        max_root_rotations=MAX_ROOTS,
        root_max_length=MAX_METADATA_BYTES,
        snapshot_max_length=MAX_METADATA_BYTES,
        targets_max_length=MAX_METADATA_BYTES,
    )
    return Updater(str(folder), "commit:/", fetcher=fetcher, config=config, bootstrap=bootstrap)


def _lay_out(before: Mapping[str, bytes], folder: Path) -> None:
    """Put what was trusted where python-tuf looks for it."""
    (folder / _HISTORY).mkdir(parents=True)
    for name, data in before.items():
        (folder / _HISTORY if name.endswith(".root.json") else folder).joinpath(name).write_bytes(
            data
        )


def _roots(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / _HISTORY).glob("*.root.json")}


def _result(folder: Path, offer: Offer) -> dict[str, bytes]:
    """What was verified, provided that it is what the commit holds."""
    found = _roots(folder)
    for name in (TIMESTAMP, SNAPSHOT, TARGETS):
        found[name] = (folder / name).read_bytes()
    for name, data in found.items():
        if offer.files.get(name, data) != data:
            raise refusals.replayed(name)
    return found


def _newest(metadata: Mapping[str, bytes]) -> list[bytes]:
    names = (root_name(root_versions(metadata)[-1]), TIMESTAMP, SNAPSHOT, TARGETS)
    return [metadata[name] for name in names]


def _compare(name: str, info: TargetFile | None, files: Mapping[str, bytes]) -> None:
    if info is None:
        raise UntrustedHub(f"{name} is not among the signed files.", hint=refusals.ADVICE)
    try:
        info.verify_length_and_hashes(files[name])
    except RepositoryError as error:
        raise _wrong_file(name, info, files[name]) from error


def _wrong_file(name: str, info: TargetFile, data: bytes) -> UntrustedHub:
    """Of another state of the hub, where the file tells its round; else altered."""
    try:
        offered, signed = json.loads(data)["rounds"][-1]["round"], info.custom["round"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return refusals.altered(name)
    if type(offered) is int and type(signed) is int and offered != signed:
        return refusals.mixed_files(name, offered, signed)
    return refusals.altered(name)
