"""Private keys of one hub on this machine: ed25519 in PEM files that only their owner can read.

They lie under the user's own folder, never in a repository. The online key and a targets key may
come from variables instead, for CI. A passphrase is asked for only when a key that needs one is
used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from moshi_fl.errors import ConfigError
from moshi_fl.store.failures import disk_errors
from moshi_hub.options import PASSPHRASE

ROLES = ("root", "targets", "online")
VARIABLES = {"targets": "MOSHI_HUB_TARGETS_KEY", "online": "MOSHI_HUB_ONLINE_KEY"}
"""Role to the variable that may hold a key of it, as PEM."""
MAX_KEY_BYTES = 1 << 16
_ENCRYPTED = b"ENCRYPTED PRIVATE KEY"
_SHOWN = 16  # digits of a key's id in its file's name

Passphrase = Callable[[str], bytes]
"""Gives the passphrase of the key in the file of that name."""


def passphrase_from_environment(name: str) -> bytes:
    """The passphrase in ``MOSHI_HUB_PASSPHRASE``.

    Raises:
        ConfigError: It is not set.
    """
    if not (value := os.environ.get(PASSPHRASE)):
        raise ConfigError(
            f"{name} has a passphrase, and nobody is there to ask for it.",
            hint=f"Set {PASSPHRASE}, or name another variable with --passphrase-env NAME.",
        )
    return value.encode()


@dataclass(frozen=True)
class StoredKey:
    """A private key's file: the role that it was made for, and the beginning of its id."""

    role: str
    start: str
    path: Path


class KeyStore:
    """The keys of one hub.

    Args:
        home: Folder of this user's moshi-fl data.
        hub: The hub's id.
        passphrase: Gives the passphrase of a key that has one.
    """

    def __init__(
        self, home: Path, hub: str, *, passphrase: Passphrase = passphrase_from_environment
    ) -> None:
        self.folder = home / "keys" / hub
        self._passphrase = passphrase

    def stored(self) -> list[StoredKey]:
        """Keys in files."""
        parts = [(path, *path.stem.partition("-")) for path in sorted(self.folder.glob("*-*.pem"))]
        return [StoredKey(role, start, path) for path, role, _, start in parts]

    def create(self, role: str, passphrase: bytes = b"") -> CryptoSigner:
        """Make a key and keep it in a file of mode 0600."""
        private = Ed25519PrivateKey.generate()
        how: KeySerializationEncryption = NoEncryption()
        if passphrase:
            how = BestAvailableEncryption(passphrase)
        signer = CryptoSigner(private)
        data = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
        with disk_errors(self.folder):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            path = self.folder / f"{role}-{signer.public_key.keyid[:_SHOWN]}.pem"
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(opened, "wb") as file:
                file.write(data)
        return signer

    def passphrase_for_new(self) -> bytes:
        """What a new key is to be locked with: as those that are here, or not at all."""
        locked = any(_ENCRYPTED in stored.path.read_bytes() for stored in self.stored())
        return self._passphrase("the new key") if locked else b""

    def where(self, key: Key) -> str:
        """Where the private half of a key is on this machine; empty when it is not."""
        for stored in self.stored():
            if key.keyid.startswith(stored.start):
                return str(stored.path)
        return next((f"${name}" for name, _ in self._from_environment(key)), "")

    def signers(self, keys: Iterable[Key]) -> list[CryptoSigner]:
        """Those of these keys that can sign here, in order of their ids."""
        found = (self.signer(key) for key in sorted(keys, key=lambda key: key.keyid))
        return [signer for signer in found if signer]

    def signer(self, key: Key) -> CryptoSigner | None:
        """The private half of a key, if it is here.

        Raises:
            ConfigError: Its file is not what its name says, or the passphrase is wrong.
        """
        for stored in self.stored():
            if key.keyid.startswith(stored.start):
                signer = self.load(stored)
                if signer.public_key.keyid != key.keyid:
                    raise ConfigError(f"{stored.path} is not the key that its name says.")
                return signer
        return next((signer for _, signer in self._from_environment(key)), None)

    def load(self, stored: StoredKey) -> CryptoSigner:
        """The key in a file."""
        with disk_errors(stored.path):
            data = stored.path.read_bytes()
        return self._parse(data, str(stored.path))

    def _from_environment(self, key: Key) -> Iterator[tuple[str, CryptoSigner]]:
        for name in VARIABLES.values():
            if text := os.environ.get(name, "").strip():
                signer = self._parse(text.encode() + b"\n", f"${name}")
                if signer.public_key.keyid == key.keyid:
                    yield name, signer

    def _parse(self, data: bytes, name: str) -> CryptoSigner:
        passphrase = self._passphrase(name) if _ENCRYPTED in data else None
        try:
            private = load_pem_private_key(data, passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            what = "its passphrase is another" if passphrase else "it is no private key in PEM"
            raise ConfigError(f"{name} cannot be used: {what}.") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"{name} is no ed25519 key.", hint="moshi-hub keys new ROLE")
        return CryptoSigner(private)


def private_pem(signer: CryptoSigner) -> str:
    """A private key as text without a passphrase, for the secrets of a CI."""
    return signer.private_bytes.decode()


def public_pem(key: Key) -> str:
    """A public key as text, to give to another maintainer."""
    number = bytes.fromhex(key.keyval["public"])
    public = Ed25519PublicKey.from_public_bytes(number)
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public(path: Path) -> Key:
    """The public key in a file.

    Raises:
        ConfigError: There is none, or it is of another kind than ed25519.
    """
    with disk_errors(path):
        data = path.read_bytes()[:MAX_KEY_BYTES]
    try:
        public = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} holds no public key in PEM.", hint="moshi-hub keys export-public ROLE"
        ) from error
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError(f"{path} is no ed25519 key.", hint="moshi-hub keys new ROLE")
    return cast("Key", SSlibKey.from_crypto(public))


def is_private(folder: Path) -> bool:
    """Whether nobody else can read what is in a folder of keys."""
    if sys.platform == "win32" or not folder.is_dir():
        return True
    return not any(path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir()))
