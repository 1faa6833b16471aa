"""Real SSH keys for tests, each made once per session: ssh-keygen costs some milliseconds."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from moshi_fl.signing import Signer


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="moshi-fl-keys-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def key_file(name: str, kind: str = "ed25519", bits: int = 0, passphrase: str = "") -> Path:
    """Somebody's private key; the same one however often it is asked for."""
    path = _folder() / f"{len(list(_folder().iterdir()))}-key"
    size = ["-b", str(bits)] if bits else []
    argv = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", name, "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path


@cache
def signer_of(name: str) -> Signer:
    """Somebody who signs; equal names are the same person."""
    return Signer(key_file(name))


@cache
def _signature(name: str, data: bytes, namespace: str) -> str:
    return signer_of(name).sign(data, namespace)


def signature_by(name: str, data: bytes, namespace: str) -> str:
    """Their signature over these bytes."""
    return _signature(name, data, namespace)
