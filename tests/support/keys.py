"""Real SSH keys for tests, each made once per session: ssh-keygen costs some milliseconds."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

from moshi_fl.signing import Signer

_folder = Path(tempfile.mkdtemp(prefix="moshi-fl-keys-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
_one_at_a_time = threading.Lock()


def key_file(name: str, kind: str = "ed25519", bits: int = 0, passphrase: str = "") -> Path:
    """Somebody's private key; the same one however often it is asked for."""
    told = f"{name}/{kind}/{bits}/{passphrase}"
    path = _folder / hashlib.sha256(told.encode()).hexdigest()[:20]
    size = ["-b", str(bits)] if bits else []
    argv = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", name, "-f", str(path)]
    with _one_at_a_time:
        if not path.exists():
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
