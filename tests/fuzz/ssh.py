"""Signatures without a process for each: a key of our own, and what ssh-keygen would say.

A million runs of ssh-keygen would take days. So its answer is given here by the same arithmetic,
from the same files and the same arguments; all of our own code around it runs as it is.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from moshi_fl.sshsig import Key, armour, parse_key, parse_signature

SECRET = Ed25519PrivateKey.from_private_bytes(b"only for fuzzing, known to all!!")
KIND = "ssh-ed25519"


def string(data: bytes) -> bytes:
    """As SSH writes bytes."""
    return struct.pack(">I", len(data)) + data


def wrap(raw: bytes) -> Key:
    """An SSH key of 32 bytes."""
    return Key(KIND, string(KIND.encode()) + string(raw))


KEY = wrap(SECRET.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def signed_bytes(data: bytes, namespace: bytes) -> bytes:
    """What is really signed (PROTOCOL.sshsig)."""
    digest = string(hashlib.sha512(data).digest())
    return b"SSHSIG" + string(namespace) + string(b"") + string(b"sha512") + digest


def signature_blob(data: bytes, namespace: str) -> bytes:
    """A signature of the key above, not armoured."""
    inner = string(KIND.encode()) + string(SECRET.sign(signed_bytes(data, namespace.encode())))
    parts = (KEY.blob, namespace.encode(), b"", b"sha512", inner)
    return b"SSHSIG" + struct.pack(">I", 1) + b"".join(map(string, parts))


def sign(data: bytes, namespace: str) -> bytes:
    """The armoured signature."""
    return armour(signature_blob(data, namespace)).encode()


def verdict(
    argv: Sequence[str], *, data: bytes = b"", interactive: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """What ``ssh-keygen -Y verify`` with these arguments says, for Ed25519 keys."""
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    key = parse_key(Path(given["-f"]).read_text().strip().partition(" ")[2])
    said = parse_signature(Path(given["-s"]).read_text())
    good = given["-Y"] == "verify" and given["-n"] == said.namespace and key == said.key
    if good and key.kind == KIND:
        try:
            public = Ed25519PublicKey.from_public_bytes(key.blob[-32:])
            public.verify(said.blob[-64:], signed_bytes(data, said.namespace.encode()))
        except (InvalidSignature, ValueError):
            good = False
    out = b"Good signature\n" if good and key.kind == KIND else b"Could not verify signature.\n"
    return subprocess.CompletedProcess(list(argv), int(not good), out, b"")
