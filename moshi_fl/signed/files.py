"""Files of the signed metadata, the fingerprint of a root, and what a client keeps of them.

Knows nothing of signatures, so that commands which verify nothing new need not load TUF.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.errors import ConfigError
from moshi_fl.weights import write_atomic

TIMESTAMP, SNAPSHOT, TARGETS = "timestamp.json", "snapshot.json", "targets.json"
MAX_ROOTS = 256
MAX_METADATA_BYTES = 1 << 16
"""Of each metadata file; a root with a hundred keys has half of it."""

METADATA_FILES = (
    *(f"{version}.root.json" for version in range(1, MAX_ROOTS + 1)),
    *(TIMESTAMP, SNAPSHOT, TARGETS),
)
"""Names of all files that the signed metadata can have."""

_ROOT = re.compile(r"([1-9]\d{0,3})\.root\.json\Z")
_DIGITS = 32
_GROUP = 4


def root_name(version: int) -> str:
    """File name of a root of that version."""
    return f"{version}.root.json"


def root_versions(names: Iterable[str]) -> list[int]:
    """Versions of the roots among some file names, ascending."""
    return sorted(int(found[1]) for found in map(_ROOT.match, names) if found)


def fingerprint(root: bytes) -> str:
    """What people compare: the first 32 digits of a root's SHA-256, in groups of four."""
    return _grouped(hashlib.sha256(root).hexdigest())


def parse_pin(text: str) -> str:
    """The fingerprint that ``--root`` means: itself, a whole SHA-256, or a file with a root.

    Raises:
        ConfigError: Neither a fingerprint nor a file.
    """
    plain = re.sub(r"[\s:-]", "", text).lower()
    if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", plain):
        return _grouped(plain)
    try:
        return fingerprint(Path(text).expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(
            f"--root: {text!r} is neither a fingerprint of 32 digits nor a file that can be read.",
            hint="moshi-hub keys fingerprint   (a maintainer's command shows it)",
        ) from error


def _grouped(digits: str) -> str:
    return "-".join(digits[start : start + _GROUP] for start in range(0, _DIGITS, _GROUP))


@dataclass(frozen=True)
class Trust:
    """What a verification proved.

    Attributes:
        metadata: The metadata to keep, by file name; empty when nothing new was verified.
        root: Fingerprint of the pinned root.
        first_contact: Whether that root was taken as offered, just now.
        expires: When the first of the metadata expires, in seconds since 1970.
    """

    metadata: Mapping[str, bytes]
    root: str
    first_contact: bool
    expires: int


class TrustFolder:
    """The metadata that this machine verified last, one file each.

    The oldest root is the one that was pinned. Written one file after the other, roots first, then
    timestamp, snapshot, targets: whoever is killed in between leaves a state from which the next
    verification goes on, and nothing that was seen is forgotten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, bytes]:
        """All files; none before the first contact."""
        if not self.path.is_dir():
            return {}
        found = {path.name for path in self.path.iterdir()}.intersection(METADATA_FILES)
        return {name: (self.path / name).read_bytes() for name in sorted(found)}

    def keep(self, files: Mapping[str, bytes]) -> None:
        """Replace what differs."""
        if not files:
            return
        before = self.load()
        roots = [root_name(version) for version in root_versions(files)]
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (*roots, TIMESTAMP, SNAPSHOT, TARGETS):
            if name in files and files[name] != before.get(name):
                write_atomic(self.path / name, files[name])

    def root(self) -> str:
        """Fingerprint of the pinned root; empty before the first contact."""
        return pinned(self.load())

    def knows(self, pin: str) -> bool:
        """Whether one of the trusted roots has this fingerprint."""
        return find_root(self.load(), pin) is not None


def pinned(files: Mapping[str, bytes]) -> str:
    """Fingerprint of the oldest root among these files; empty when there is none."""
    versions = root_versions(files)
    return fingerprint(files[root_name(versions[0])]) if versions else ""


def find_root(files: Mapping[str, bytes], pin: str) -> int | None:
    """Version of the root with this fingerprint."""
    for version in root_versions(files):
        if fingerprint(files[root_name(version)]) == pin:
            return version
    return None
