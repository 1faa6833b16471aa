"""Makes and signs TUF metadata: pure functions of files, keys and a time.

Roles: ``root`` says whose keys count; ``targets`` signs a round's files (both are maintainers',
k of n); ``snapshot`` and ``timestamp`` are the online key's, which says again and again what is
newest. Nothing here reads or writes a repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from moshi_fl.errors import HubError
from moshi_fl.hubfile import TrustRules
from moshi_fl.signed.files import SNAPSHOT, TARGETS, TIMESTAMP, root_name, root_versions
from moshi_hub.keys import KeyStore

Files = Mapping[str, bytes]
TUF_ROLES = {"root": ("root",), "targets": ("targets",), "online": ("snapshot", "timestamp")}
"""Our roles to TUF's."""


class TooFewSignatures(HubError):
    """The threshold of a role is not met by the keys that have signed."""


@dataclass(frozen=True)
class Desk:
    """Where a maintainer signs.

    Attributes:
        metadata: The hub's present metadata, verified, by file name.
        keys: The private keys on this machine.
        rules: How long signatures hold.
        now: The time of signing.
    """

    metadata: Files
    keys: KeyStore
    rules: TrustRules
    now: datetime

    @property
    def root(self) -> Root:
        """The present root."""
        return newest_root(self.metadata)

    @property
    def roots(self) -> dict[str, bytes]:
        """All roots, as they are."""
        names = map(root_name, root_versions(self.metadata))
        return {name: self.metadata[name] for name in names}

    def require_keys(self) -> None:
        """Insist that a round could be published from this machine, before work is put into one.

        Raises:
            TooFewSignatures: Keys are missing.
        """
        for role, hint in (("targets", "moshi-hub merge"), ("timestamp", "moshi-hub keys list")):
            here = sum(bool(self.keys.where(key)) for key in keys_of(self.root, role))
            need = self.root.get_delegated_role(role).threshold
            if here < need:
                raise TooFewSignatures(
                    f"publishing takes {need} {role} key(s), {here} of them on this machine.",
                    hint=f"{hint}   (without --publish a round is proposed, for others to sign)"
                    if role == "targets"
                    else f"{hint}   (shows which keys count)",
                )

    def propose(self, files: Files, number: int) -> dict[str, bytes]:
        """Metadata of a proposed round: targets, signed by those whose keys are here."""
        return {**self.roots, TARGETS: self.sign_targets(self.draft_targets(files, number))}

    def draft_targets(self, files: Files, number: int) -> bytes:
        """Targets metadata of the next version, for these files of a round, not yet signed."""
        version = _version(self.metadata, TARGETS) + 1
        targets = {name: target_file(name, data, number) for name, data in files.items()}
        expires = self.now + timedelta(days=self.rules.metadata_days)
        return _bytes(Metadata(Targets(version=version, expires=expires, targets=targets)))

    def is_next(self, data: bytes, files: Files, number: int) -> bool:
        """Whether targets metadata is of the next version and names exactly these files."""
        try:
            found, wanted = _targets(data), _targets(self.draft_targets(files, number))
        except RepositoryError:  # whoever rules the repository can put anything there
            return False
        return (found.version, found.targets) == (wanted.version, wanted.targets)

    def sign_targets(self, data: bytes, root: Root | None = None) -> bytes:
        """Add the signatures of the targets keys that are here."""
        return add_signatures(data, self.keys.signers(keys_of(root or self.root, "targets")))

    def publish(self, targets: bytes, root: Root | None = None) -> dict[str, bytes]:
        """All metadata for signed targets: with a new snapshot and timestamp.

        Args:
            targets: The signed targets metadata.
            root: The root by which it counts; the present one by default.

        Raises:
            TooFewSignatures: Of the targets, or the online key is not here.
        """
        root = root or self.root
        demand(root, "targets", targets, "moshi-hub sign")
        snapshot = self._snapshot(targets, root)
        timestamp = self._timestamp(snapshot, root)
        return {**self.roots, TARGETS: targets, SNAPSHOT: snapshot, TIMESTAMP: timestamp}

    def refresh(self, *, with_snapshot: bool) -> dict[str, bytes]:
        """The present metadata with a new timestamp, and a new snapshot where wanted or needed."""
        found = dict(self.metadata)
        left = Metadata[Any].from_bytes(found[SNAPSHOT]).signed.expires - self.now
        if with_snapshot or left < timedelta(days=self.rules.timestamp_days):
            found[SNAPSHOT] = self._snapshot(found[TARGETS], self.root)
        return {**found, TIMESTAMP: self._timestamp(found[SNAPSHOT], self.root)}

    def _snapshot(self, targets: bytes, root: Root) -> bytes:
        meta = {TARGETS: _describe(targets)}
        expires = self.now + timedelta(days=self.rules.metadata_days)
        version = _version(self.metadata, SNAPSHOT) + 1
        return self._online(Snapshot(version=version, expires=expires, meta=meta), root)

    def _timestamp(self, snapshot: bytes, root: Root) -> bytes:
        expires = self.now + timedelta(days=self.rules.timestamp_days)
        version = _version(self.metadata, TIMESTAMP) + 1
        made = Timestamp(version=version, expires=expires, snapshot_meta=_describe(snapshot))
        return self._online(made, root)

    def _online(self, signed: Signed, root: Root) -> bytes:
        data = add_signatures(
            _bytes(Metadata(signed)), self.keys.signers(keys_of(root, signed.type))
        )
        demand(root, signed.type, data, "moshi-hub keys list")
        return data


def utc_now() -> datetime:
    """The present second; TUF's dates have no fractions."""
    return datetime.now(UTC).replace(microsecond=0)


def first_metadata(
    files: Files, signers: Mapping[str, CryptoSigner], keys: KeyStore, rules: TrustRules
) -> dict[str, bytes]:
    """Metadata of a new hub: root version 1, and everything that it takes to publish round 0.

    Args:
        files: The hub's files.
        signers: One key for each of our roles.
        keys: Where these keys are kept.
        rules: How long signatures hold.
    """
    now = utc_now()
    root = Root(
        expires=now + timedelta(days=rules.metadata_days),
        roles={role: Role([], 1) for roles in TUF_ROLES.values() for role in roles},
        consistent_snapshot=False,
    )
    for role, signer in signers.items():
        for name in TUF_ROLES[role]:
            root.add_key(signer.public_key, name)
    signed = add_signatures(_bytes(Metadata(root)), [signers["root"]])
    desk = Desk({root_name(1): signed}, keys, rules, now)
    return desk.publish(desk.sign_targets(desk.draft_targets(files, 0)))


def target_file(name: str, data: bytes, number: int) -> TargetFile:
    """A file's entry among the targets: length, SHA-256, and the round that it belongs to."""
    found = TargetFile.from_data(name, data, ["sha256"])
    found.unrecognized_fields["custom"] = {"round": number}
    return found


def next_root(desk: Desk, change: Callable[[Root], None]) -> bytes:
    """The next root, changed and signed by those of the old and new root keys that are here."""
    old, root = desk.root, desk.root
    root.version = old.version + 1
    root.expires = desk.now + timedelta(days=desk.rules.metadata_days)
    change(root)
    return sign_root(desk, _bytes(Metadata(root)))


def sign_root(desk: Desk, data: bytes) -> bytes:
    """Add the signatures of the root keys, old and new, that are here."""
    new = Metadata[Root].from_bytes(data).signed
    keys = {key.keyid: key for root in (desk.root, new) for key in keys_of(root, "root")}
    return add_signatures(data, desk.keys.signers(keys.values()))


def missing_for_root(desk: Desk, data: bytes) -> int:
    """How many signatures the next root still lacks, by the old root's keys or by its own."""
    new = Metadata[Root].from_bytes(data)
    by = (desk.root, new.signed)
    found = [root.get_verification_result("root", new.signed_bytes, new.signatures) for root in by]
    return max(max(0, result.missing) for result in found)


def counted(root: Root, role: str, data: bytes) -> tuple[int, int]:
    """Valid signatures of a role on metadata, and how many it needs."""
    metadata = Metadata[Any].from_bytes(data)
    found = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return len(found.signed), found.threshold


def demand(root: Root, role: str, data: bytes, hint: str) -> None:
    """Insist that metadata meets its role's threshold.

    Raises:
        TooFewSignatures: It does not.
    """
    have, need = counted(root, role, data)
    if have < need:
        raise TooFewSignatures(
            f"{role}.json has {have} of the {need} signature(s) that it needs; "
            "the other keys are not on this machine.",
            hint=f"{hint}   (on a machine that has a key of this role; moshi-hub keys list)",
        )


def add_signatures(data: bytes, signers: Sequence[CryptoSigner]) -> bytes:
    """The same metadata with these signatures too; equal bytes when nothing is new."""
    metadata = Metadata[Any].from_bytes(data)
    for signer in signers:
        metadata.sign(signer, append=True)
    return _bytes(metadata)


def newest_root(metadata: Files) -> Root:
    """The root of the highest version; a copy of its own each time."""
    data = metadata[root_name(root_versions(metadata)[-1])]
    return Metadata[Root].from_bytes(data).signed


def keys_of(root: Root, role: str) -> list[Key]:
    """Keys of a role of TUF's."""
    return [root.get_key(keyid) for keyid in root.get_delegated_role(role).keyids]


def _describe(data: bytes) -> MetaFile:
    version = Metadata[Any].from_bytes(data).signed.version
    return MetaFile.from_data(version, data, ["sha256"])


def _version(metadata: Files, name: str) -> int:
    """Version of a file; 0 before there is one."""
    return Metadata[Any].from_bytes(metadata[name]).signed.version if name in metadata else 0


def _targets(data: bytes) -> Targets:
    return Metadata[Targets].from_bytes(data).signed


def _bytes(metadata: Metadata[Any]) -> bytes:
    return metadata.to_bytes()
