"""Keys and signatures: what is right is accepted in one spelling, all else is refused in words."""

from __future__ import annotations

import base64
import contextlib
import os
import pty
import struct
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import BadSignature, MoshiError, SigningError
from moshi_fl.records import PublicKey
from moshi_fl.signing import (
    ATTESTATION_NAMESPACE,
    CONTRIBUTION_NAMESPACE,
    MAX_SIGNATURE_BYTES,
    Signer,
    check_ssh_keygen,
    fingerprint,
    keys_match,
    own_signer,
    verify_signature,
)
from moshi_fl.sshsig import armour, parse_key, parse_signature
from moshi_fl.store.locking import LOCK_FILE
from tests.support.keys import key_file, signature_by, signer_of

DATA = b'{"kind": "contribution"}\n'
NAMESPACE = CONTRIBUTION_NAMESPACE
KINDS = [("ed25519", 0), ("ecdsa", 256), ("ecdsa", 384), ("ecdsa", 521), ("rsa", 2048)]


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def blob_of(armoured: str) -> bytes:
    return parse_signature(armoured).blob


@pytest.fixture
def signature() -> str:
    return signature_by("ann", DATA, NAMESPACE)


def refuse(signature: str, words: str, *, data: bytes = DATA, key: str = "") -> None:
    with pytest.raises(BadSignature, match=words):
        verify_signature(data, signature, key or signer_of("ann").public_key, NAMESPACE)


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_a_signature_by_each_kind_of_key_is_accepted(kind: str, bits: int):
    signer = Signer(key_file("ann", kind, bits))
    verify_signature(DATA, signer.sign(DATA, NAMESPACE), signer.public_key, NAMESPACE)
    assert msgspec.convert(signer.public_key, PublicKey) == signer.public_key


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_the_fingerprint_is_the_one_that_ssh_keygen_prints(kind: str, bits: int):
    path = key_file("ann", kind, bits)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", path], check=True, capture_output=True, text=True
    )
    assert (
        shown.stdout.split()[1] == Signer(path).fingerprint == fingerprint(Signer(path).public_key)
    )


def test_a_signature_over_other_bytes_is_refused(signature: str):
    refuse(signature, "not by this key over these bytes", data=DATA + b" ")


def test_a_signature_for_another_purpose_is_refused():
    refuse(signature_by("ann", DATA, ATTESTATION_NAMESPACE), "made for 'moshi-fl-attestation-v1'")


def test_a_signature_by_another_key_is_refused(signature: str):
    refuse(signature, "another key", key=signer_of("ben").public_key)


def test_a_signature_whose_embedded_key_was_exchanged_is_refused(signature: str):
    mine, hers = (parse_key(signer_of(name).public_key).blob for name in ("mallory", "ann"))
    forged = armour(blob_of(signature).replace(hers, mine))
    refuse(forged, "not by this key", key=signer_of("mallory").public_key)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s[:-1],
        lambda s: s + "\n",
        lambda s: "\n" + s,
        lambda s: s + s,
        lambda s: s.replace("\n", "\r\n"),
        lambda s: s.replace("\n", "", 2).replace("-----", "-----\n", 1),
        lambda s: s.replace("SSH SIGNATURE", "SSH  SIGNATURE"),
        lambda s: s.replace("U1NIU0lH", "U1NIU0lH "),
        lambda s: s.replace("U1NIU0lH", "U1NI\nU0lH"),
        lambda s: s[: len(s) // 2],
        lambda _: "",
        lambda _: "\x00" * 300,
        lambda _: armour(b""),
        lambda s: armour(blob_of(s) + b"\x00"),
        lambda s: armour(blob_of(s)[:-1]),
        lambda s: armour(b"SSHSIK" + blob_of(s)[6:]),
        lambda s: armour(b"SSHSIG\x00\x00\x00\x02" + blob_of(s)[10:]),
        lambda s: armour(blob_of(s).replace(b"sha512", b"sha384")),
        lambda s: armour(blob_of(s).replace(string(b""), string(b"reserved"))),
        lambda s: armour(b"SSHSIG\x00\x00\x00\x01\xff\xff\xff\xff" + blob_of(s)[14:]),
        lambda s: armour(blob_of(s) + bytes(MAX_SIGNATURE_BYTES)),
    ],
)
def test_any_other_spelling_of_a_right_signature_is_refused(signature: str, spoil):
    spoiled = spoil(signature)
    assert spoiled != signature
    refuse(spoiled, "signature cannot be used")


def test_a_huge_signature_is_refused_without_decoding():
    refuse("A" * (1 << 20), "limit 8192")


def test_a_signature_by_an_old_algorithm_is_refused():
    key = Signer(key_file("ann", "rsa", 2048))
    blob = blob_of(key.sign(DATA, NAMESPACE))
    old = blob.replace(string(b"rsa-sha2-512"), string(b"ssh-rsa"))
    tail = old.rindex(string(b"ssh-rsa"))
    old = old[: tail - 4] + string(old[tail:])
    refuse(armour(old), "made by 'ssh-rsa'", key=key.public_key)


@given(at=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_changed_byte_never_passes(at: int, value: int):
    blob = bytearray(blob_of(signature_by("ann", DATA, NAMESPACE)))
    blob[at % len(blob)] ^= value
    refuse(armour(bytes(blob)), "signature")


@given(text=st.text() | st.binary().map(armour))
def test_rubbish_is_refused_with_one_kind_of_error(text: str):
    refuse(text, "cannot be used")


def test_a_made_up_key_of_each_kind_is_refused_with_words():
    point = string(b"nistp256") + string(b"\x02" + bytes(32))
    small = string(b"\x01\x00\x01") + string(b"\x7f" + bytes(127))
    long_exponent = string(b"\x7f" * 200) + string(b"\x7f" + bytes(300))
    cases = {
        "ssh-dss": string(b"\x00"),
        "ssh-ed25519": string(bytes(31)),
        "ecdsa-sha2-nistp256": point,
        "ssh-rsa": small,
        "sk-ssh-ed25519@openssh.com": string(bytes(32)) + string(b""),
    }
    for kind, rest in [*cases.items(), ("ssh-rsa", long_exponent)]:
        text = f"{kind} {base64.b64encode(string(kind.encode()) + rest).decode()}"
        with pytest.raises(ValueError, match=r"\w"):
            parse_key(text)
        with pytest.raises(BadSignature):
            fingerprint(text)
    with pytest.raises(ValueError, match="of type 'ssh-ed25519'"):
        parse_key(signer_of("ann").public_key.replace("ssh-ed25519", "ssh-rsa", 1))


def test_a_key_has_one_spelling():
    key = signer_of("ann").public_key
    for other in (f"{key} ", f"{key} ann", f" {key}", key + "\n", key[:-1] + "=", key + "===="):
        with pytest.raises(ValueError, match=r"base64|of type|accepted|too early"):
            parse_key(other)
    with pytest.raises(ValueError, match="limit is 1500"):
        parse_key("ssh-rsa " + "A" * 4000)


def test_a_hardware_key_is_accepted_as_a_key():
    kind = "sk-ssh-ed25519@openssh.com"
    blob = string(kind.encode()) + string(bytes(32)) + string(b"ssh:")
    text = f"{kind} {base64.b64encode(blob).decode()}"
    assert parse_key(text).text == msgspec.convert(text, PublicKey)


def test_the_first_use_makes_an_identity_that_stays(tmp_path: Path):
    first = own_signer(tmp_path / "home")
    path = tmp_path / "home" / "identity"
    assert path.stat().st_mode & 0o777 == 0o600
    assert own_signer(tmp_path / "home").public_key == first.public_key
    assert {file.name for file in path.parent.iterdir()} == {"identity", "identity.pub", LOCK_FILE}
    path.with_name("identity.pub").unlink()
    again = own_signer(tmp_path / "home")
    assert again.public_key == first.public_key
    verify_signature(DATA, again.sign(DATA, NAMESPACE), first.public_key, NAMESPACE)


def test_two_first_uses_at_once_agree_on_one_identity(tmp_path: Path):
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(own_signer(tmp_path).public_key))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"identity", "identity.pub", LOCK_FILE}


def test_the_users_own_key_signs_instead(tmp_path: Path):
    own = key_file("carla", "ecdsa", 256)
    assert own_signer(tmp_path, own).public_key == Signer(own).public_key
    assert not (tmp_path / "identity").exists()


def test_a_key_in_an_agent_signs_by_its_public_half(tmp_path: Path, monkeypatch):
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.PIPE
    ) as agent:
        try:
            assert agent.stdout is not None
            agent.stdout.readline()  # it says where it listens once it does
            monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
            private = key_file("dora", "ed25519", passphrase="")
            subprocess.run(["ssh-add", "-q", private], check=True)
            public = tmp_path / "elsewhere.pub"
            public.write_bytes(private.with_name(f"{private.name}.pub").read_bytes())
            signer = Signer(public)
            verify_signature(DATA, signer.sign(DATA, NAMESPACE), signer.public_key, NAMESPACE)
        finally:
            agent.terminate()


def test_a_key_with_a_passphrase_does_not_wait_for_nobody():
    locked = key_file("ann", "ed25519", passphrase="secret")
    with pytest.raises(SigningError, match="incorrect passphrase") as caught:
        Signer(locked).sign(DATA, NAMESPACE)
    assert "ssh-add" in caught.value.hint


def test_a_passphrase_is_asked_on_the_terminal_when_there_is_a_person(tmp_path: Path):
    locked = key_file("ann", "ed25519", passphrase="secret")
    program = (
        "import sys; from pathlib import Path; from moshi_fl.signing import Signer;"
        "Path(sys.argv[2]).write_text("
        "Signer(Path(sys.argv[1]), interactive=True).sign(b'hello', 'test'))"
    )
    argv = [sys.executable, "-c", program, str(locked), str(tmp_path / "signature")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, argv, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    said = b""
    while b"passphrase" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"secret\n")
    with contextlib.suppress(OSError):  # how a terminal says that nobody is there any more
        while os.read(terminal, 1000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    signature = (tmp_path / "signature").read_text()
    verify_signature(b"hello", signature, Signer(locked).public_key, "test")


def test_a_public_half_of_another_key_is_noticed(tmp_path: Path):
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_bytes(key_file("ann").read_bytes())
    (tmp_path / "key.pub").write_text(signer_of("ben").public_key)
    with pytest.raises(SigningError, match="key"):
        Signer(key).sign(DATA, NAMESPACE)


def test_a_file_that_is_no_key_is_refused_in_words(tmp_path: Path):
    for name, content in {"a.pub": "hello", "b": "hello", "c.pub": "ssh-dss AAAA"}.items():
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_text(content)
        with pytest.raises(SigningError, match=name):
            Signer(path)
    with pytest.raises(SigningError, match="there is no key") as caught:
        Signer(tmp_path / "absent")
    assert "signing_key" in caught.value.hint


def test_a_name_that_looks_like_an_option_is_a_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-Y").touch(mode=0o600)
    Path("-Y").write_bytes(key_file("ann").read_bytes())
    assert Signer(Path("-Y")).public_key == signer_of("ann").public_key


def test_without_ssh_keygen_the_error_says_what_to_install(signature: str, monkeypatch):
    signer = signer_of("ann")
    monkeypatch.setenv("PATH", os.devnull)
    for act in (
        lambda: signer.sign(DATA, NAMESPACE),
        lambda: verify_signature(DATA, signature, signer.public_key, NAMESPACE),
        check_ssh_keygen,
    ):
        with pytest.raises(SigningError, match="cannot be run") as caught:
            act()
        assert "Install OpenSSH" in caught.value.hint


def test_an_ssh_keygen_that_breaks_is_no_verdict(signature: str, tmp_path: Path, monkeypatch):
    """Else a broken machine would reject, and then delete, everybody's work."""
    broken = tmp_path / "ssh-keygen"
    broken.write_text("#!/bin/sh\necho 'No user exists for uid 12345' >&2\nexit 255\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SigningError, match="No user exists"):
        verify_signature(DATA, signature, signer_of("ann").public_key, NAMESPACE)


def test_an_ssh_keygen_that_always_agrees_is_noticed(tmp_path: Path, monkeypatch):
    check_ssh_keygen()
    liar = tmp_path / "ssh-keygen"
    liar.write_text("#!/bin/sh\necho 'Good signature'\n")
    liar.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SigningError, match="accepts a signature that is wrong"):
        check_ssh_keygen()


def test_errors_of_signing_belong_to_the_tree():
    assert issubclass(BadSignature, MoshiError)
    assert issubclass(SigningError, MoshiError)


def test_a_logins_published_keys_are_compared_key_by_key():
    ann, ben = signer_of("ann").public_key, signer_of("ben").public_key
    published = f"\r\n{ben} work laptop\r\nnot a key\n\n  {ann}\n"
    assert keys_match(published, ann)
    assert keys_match(published, ben)
    assert not keys_match(published, signer_of("carla").public_key)
    assert not keys_match("", ann)
    assert not keys_match(ann[:-4], ann)
    assert not keys_match(f"# {ann}", ann)
