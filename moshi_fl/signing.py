"""Who somebody is: SSH keys, and signatures made and checked by ``ssh-keygen -Y``.

An identity is a public key. A signature covers bytes and a *namespace*, so that what was signed for
one purpose serves no other. The only place that runs ssh-keygen: with an argument list, an
environment of ours and a time limit; keys, signatures and paths reach it in files that it is given
by absolute path, so nothing from outside can become an option. What strangers sent is taken apart
by ``moshi_fl.sshsig`` before.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moshi_fl.errors import BadSignature, SigningError
from moshi_fl.sshsig import MAX_SIGNATURE_BYTES, parse_key, parse_signature
from moshi_fl.store.failures import disk_errors, disk_full
from moshi_fl.store.locking import LOCK_FILE, FolderLock
from moshi_fl.text import clean

__all__ = [
    "ATTESTATION_NAMESPACE",
    "CONTRIBUTION_NAMESPACE",
    "EVALUATION_NAMESPACE",
    "MAX_SIGNATURE_BYTES",
    "BadSignature",
    "Signer",
    "SigningError",
    "check_ssh_keygen",
    "fingerprint",
    "keys_match",
    "own_signer",
    "verify_signature",
]

CONTRIBUTION_NAMESPACE = "moshi-fl-contribution-v1"
ATTESTATION_NAMESPACE = "moshi-fl-attestation-v1"
EVALUATION_NAMESPACE = "moshi-fl-evaluation-v1"

SSH_KEYGEN = "ssh-keygen"
IDENTITY_FILE = "identity"
PATIENCE = 60.0  # seconds for ssh-keygen when nobody is asked anything
INTERACTIVE_PATIENCE = 600.0  # seconds for a person to type a passphrase or touch a key
_KEPT = (
    "PATH", "HOME", "SSH_AUTH_SOCK", "SSH_SK_PROVIDER", "SSH_SK_HELPER", "SSH_ASKPASS", "DISPLAY",
    "WAYLAND_DISPLAY", "TERM", "TMPDIR", "SYSTEMROOT", "USERPROFILE", "TEMP", "TMP",
)  # fmt: skip
_REFUSED = b"Could not verify signature"  # ssh-keygen's own verdict; other failures are no verdict
_MAX_KEY_FILE = 1 << 16

INSTALL = "Install OpenSSH 8.2 or newer; ssh-keygen must be on the PATH."
_KNOWN = (  # made once, to see whether ssh-keygen is there and tells right from wrong
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINGdJYy553NkxBPe3bVCSdXqJXPNAdeo0pquedDEvvER",
    "moshi-fl-doctor-v1",
    """-----BEGIN SSH SIGNATURE-----
U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAg0Z0ljLnnc2TEE97dtUJJ1eolc8
0B16jSmq550MS+8REAAAASbW9zaGktZmwtZG9jdG9yLXYxAAAAAAAAAAZzaGE1MTIAAABT
AAAAC3NzaC1lZDI1NTE5AAAAQAMhorDiT6a+jSRrUdRZ6z0cwUxIepnoTyYoGd7DsO6H/q
hozcBXb7USM3H0YKQqNMJ/H0bpHcwDz5li6CWthw0=
-----END SSH SIGNATURE-----
""",
)


class Signer:
    """Somebody who signs: with a private key in a file, or with one that ssh-agent holds.

    Args:
        key_path: A private key; or the ``.pub`` of a key that ssh-agent or a token holds.
        interactive: Whether ssh-keygen may ask for a passphrase, or a touch, on the terminal.

    Raises:
        SigningError: It cannot be read, or it is of a kind that no hub accepts.
    """

    def __init__(self, key_path: Path, *, interactive: bool = False) -> None:
        self.key_path = key_path.expanduser().absolute()
        self._interactive = interactive
        try:
            self.public_key = parse_key(_first_words(self._read_public())).text
        except ValueError as error:
            hint = "ssh-keygen -t ed25519   (makes a key that hubs accept)"
            raise SigningError(f"{self.key_path} cannot be used: {error}.", hint=hint) from error

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` of the public key."""
        return fingerprint(self.public_key)

    def sign(self, data: bytes, namespace: str) -> str:
        """An armoured signature over some bytes.

        Raises:
            SigningError: ssh-keygen cannot do it, or did it with another key.
        """
        with tempfile.TemporaryDirectory(prefix="moshi-fl-sign-") as folder:
            file = Path(folder) / "data"
            file.write_bytes(data)
            argv = ["-q", "-Y", "sign", "-f", str(self.key_path), "-n", namespace, str(file)]
            _succeed(argv, f"sign with {self.key_path}", interactive=self._interactive)
            armoured = file.with_name("data.sig").read_text(encoding="ascii")
        try:
            verify_signature(data, armoured, self.public_key, namespace)
        except BadSignature as error:
            raise SigningError(
                f"{self.key_path} signs with another key than its public half says: {error}",
                hint=f"Remove or replace the .pub file: ssh-keygen -y -f {self.key_path}",
            ) from error
        return armoured

    def _read_public(self) -> str:
        public = _public_half(self.key_path)
        if public.exists():
            return _read(public)
        if public == self.key_path or not self.key_path.exists():
            raise SigningError(
                f"there is no key at {self.key_path}.",
                hint="moshi-fl config set signing_key PATH   (a private key, or the .pub of one)",
            )
        argv = ["-y", "-f", str(self.key_path)]
        return _succeed(argv, f"read {self.key_path}", interactive=self._interactive).decode()


def own_signer(home: Path, key: Path | None = None, *, interactive: bool = False) -> Signer:
    """The user's signer: the key that they chose, or one made for them on first use.

    Args:
        home: Folder of this user's moshi-fl data.
        key: The user's own SSH key; None uses ``home/identity``.
        interactive: As for ``Signer``.

    Raises:
        SigningError: The key cannot be used, or ssh-keygen is not there.
    """
    if key is None:
        key = home / IDENTITY_FILE
        if not key.exists():
            _make_identity(key)
    return Signer(key, interactive=interactive)


def verify_signature(data: bytes, signature: str, public_key: str, namespace: str) -> None:
    """Insist that the holder of a key signed these bytes for this purpose.

    Args:
        data: What was signed.
        signature: Armoured; hostile until this returns.
        public_key: ``TYPE BASE64``, as records have it.
        namespace: What the signature must be for.

    Raises:
        BadSignature: Another key, other bytes, another namespace, or no well-formed signature.
        SigningError: ssh-keygen could not be asked, so this says nothing about the signature.
    """
    try:
        key, said = parse_key(public_key), parse_signature(signature)
    except ValueError as error:
        raise BadSignature(f"the signature cannot be used: {error}.") from error
    if said.key != key:
        raise BadSignature("the signature was made with another key than the record names.")
    if said.namespace != namespace:
        raise BadSignature(
            f"the signature was made for {said.namespace[:60]!r}, not for {namespace!r}."
        )
    with tempfile.TemporaryDirectory(prefix="moshi-fl-verify-") as folder:
        signers, file = Path(folder) / "signers", Path(folder) / "signature"
        signers.write_text(f"signer {key.text}\n", encoding="ascii")
        file.write_text(signature, encoding="ascii")
        argv = ["-Y", "verify", "-f", str(signers), "-I", "signer", "-n", namespace]
        done = _run([*argv, "-s", str(file)], data=data)
    if done.returncode == 0 and done.stdout.startswith(b"Good "):
        return
    if _REFUSED not in done.stdout:
        raise _failure("check a signature", done)
    raise BadSignature("the signature is not by this key over these bytes.")


def fingerprint(public_key: str) -> str:
    """How people name a key, as ``ssh-keygen -l`` prints it: ``SHA256:`` and 43 characters.

    Raises:
        BadSignature: It is no public key.
    """
    try:
        return parse_key(public_key).fingerprint
    except ValueError as error:
        raise BadSignature(f"the key cannot be used: {error}.") from error


def keys_match(login_keys_text: str, public_key: str) -> bool:
    """Whether a key is among those that a forge publishes for a login.

    Args:
        login_keys_text: What ``https://github.com/LOGIN.keys`` answers: a key a line, with or
            without a comment. Lines that are no keys count for nothing.
        public_key: ``TYPE BASE64``.
    """
    lines = (line for line in login_keys_text.splitlines() if line.strip())
    return any(_first_words(line) == public_key for line in lines)


def check_ssh_keygen() -> None:
    """Insist that ssh-keygen runs, accepts a right signature and refuses a wrong one.

    Raises:
        SigningError: It does not; says what to do.
    """
    key, namespace, signature = _KNOWN
    try:
        verify_signature(b"moshi-fl", signature, key, namespace)
    except BadSignature as error:
        problem = "ssh-keygen refuses a signature that is right."
        raise SigningError(problem, hint=INSTALL) from error
    try:
        verify_signature(b"moshi-fI", signature, key, namespace)
    except BadSignature:
        return
    raise SigningError("ssh-keygen accepts a signature that is wrong.", hint=INSTALL)


def _make_identity(path: Path) -> None:
    """An Ed25519 key without a passphrase; of two first runs at the same moment, one makes it."""
    folder, fresh = path.parent, path.with_name(".new-identity")
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FolderLock(folder / LOCK_FILE).held(PATIENCE), disk_errors(folder):
        if path.exists():
            return
        try:
            fresh.unlink(missing_ok=True)  # of a process that was killed
            argv = ["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(fresh)]
            _succeed(argv, f"make {path}")
            _public_half(fresh).replace(_public_half(path))
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
            _public_half(fresh).unlink(missing_ok=True)


def _public_half(path: Path) -> Path:
    return path if path.suffix == ".pub" else path.with_name(f"{path.name}.pub")


def _first_words(line: str) -> str:
    """Type and base64 of a key's line, without its comment."""
    return " ".join(line.split()[:2])


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_FILE).decode("utf-8", "replace")
    except OSError as error:
        raise SigningError(f"cannot read {path}: {error.strerror}.") from error


def _succeed(argv: Sequence[str], action: str, *, interactive: bool = False) -> bytes:
    done = _run(argv, interactive=interactive)
    if done.returncode != 0:
        raise _failure(action, done)
    return done.stdout


def _run(
    argv: Sequence[str], *, data: bytes = b"", interactive: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen; without a person at the terminal it has none to ask on."""
    env = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"LC_ALL": "C"}
    if not interactive:
        env["SSH_ASKPASS_REQUIRE"] = "never"
    patience = INTERACTIVE_PATIENCE if interactive else PATIENCE
    try:
        return subprocess.run(
            [SSH_KEYGEN, *argv],
            input=None if interactive else data,
            stdout=subprocess.PIPE,
            stderr=None if interactive else subprocess.PIPE,
            env=env,
            timeout=patience,
            start_new_session=not interactive,
            check=False,
        )
    except OSError as error:
        raise SigningError(f"ssh-keygen cannot be run: {error.strerror}.", hint=INSTALL) from error
    except subprocess.TimeoutExpired as error:
        raise SigningError(f"ssh-keygen did not end within {patience:.0f} s.") from error


def _failure(action: str, done: subprocess.CompletedProcess[bytes]) -> SigningError:
    words = clean((done.stderr or b"").decode(errors="replace").strip())[-500:]
    hint = "moshi-fl doctor   (tells what is wrong with ssh-keygen or the key)"
    if disk_full(words):
        hint = "Make room there and do the same again."
    elif "passphrase" in words:
        hint = "ssh-add KEY   (unlocks it for this session), or run this on a terminal"
    return SigningError(f"ssh-keygen cannot {action}: {words or 'it gave no reason'}", hint=hint)
