"""The SSHSIG format: public keys and signatures taken apart, each accepted in one spelling only.

Decides nothing about whether a signature is right: ``moshi_fl.signing`` asks ssh-keygen that, and
shows it nothing that has not passed here. All of it may come from strangers; every function raises
``ValueError`` with a sentence. Format: OpenSSH's PROTOCOL.sshsig; keys and signatures: RFC 4253,
RFC 5656, RFC 8332, RFC 8709 and OpenSSH's PROTOCOL.u2f.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass

MAX_SIGNATURE_BYTES = 8 << 10
MAX_KEY_CHARACTERS = 1500
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
HASHES = ("sha512", "sha256")

_MAGIC = b"SSHSIG"
_VERSION = 1
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----\n", "-----END SSH SIGNATURE-----\n"
_WIDTH = 70
_CURVES = {"nistp256": 32, "nistp384": 48, "nistp521": 66}  # bytes of a coordinate
_MAX_APPLICATION = 255  # characters of what a hardware key signs for, such as "ssh:"

KEY_TYPES = (
    "ssh-ed25519",
    *(f"ecdsa-sha2-{curve}" for curve in _CURVES),
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)


@dataclass(frozen=True)
class Key:
    """A public key.

    Attributes:
        kind: Its type, one of ``KEY_TYPES``.
        blob: Its bytes, as they stand in base64 in the text form.
        rsa_bytes: Length of the modulus; 0 for keys that are not RSA.
    """

    kind: str
    blob: bytes
    rsa_bytes: int = 0

    @property
    def text(self) -> str:
        """Type and base64, without a comment: how records spell it."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()}"

    @property
    def fingerprint(self) -> str:
        """How people name it, as ``ssh-keygen -l`` prints it: ``SHA256:`` and 43 characters."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")


@dataclass(frozen=True)
class Signature:
    """What an armoured signature says: whose it is, and in which namespace."""

    key: Key
    namespace: str
    blob: bytes


def parse_key(text: str) -> Key:
    """A public key from ``TYPE BASE64``."""
    if len(text) > MAX_KEY_CHARACTERS:
        raise ValueError(f"a key of {len(text)} characters; the limit is {MAX_KEY_CHARACTERS}")
    kind, separator, encoded = text.partition(" ")
    if not separator:
        raise ValueError("a key is its type and its base64, with one space between them")
    key = _key_from(_unbase64(encoded))
    if key.kind != kind:
        raise ValueError(f"the key says {kind[:60]!r} but is of type {key.kind!r}")
    return key


def parse_signature(armoured: str) -> Signature:
    """An armoured signature, spelled as ssh-keygen spells it, to the last byte."""
    if len(armoured) > MAX_SIGNATURE_BYTES:
        raise ValueError(f"a signature of {len(armoured)} bytes; limit {MAX_SIGNATURE_BYTES}")
    if not (armoured.startswith(_BEGIN) and armoured.endswith("\n" + _END)):
        raise ValueError("it is not one armoured SSH signature and nothing else")
    body = armoured[len(_BEGIN) : -len(_END)]
    blob = _unbase64(body.replace("\n", ""))
    if armour(blob) != armoured:
        raise ValueError("its lines are not broken as ssh-keygen breaks them")
    return _signature_from(blob)


def armour(blob: bytes) -> str:
    """The one armoured spelling of a signature's bytes."""
    encoded = base64.b64encode(blob).decode()
    lines = (encoded[start : start + _WIDTH] for start in range(0, len(encoded), _WIDTH))
    return _BEGIN + "".join(f"{line}\n" for line in lines) + _END


def _signature_from(blob: bytes) -> Signature:
    if blob[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it is not an SSH signature")
    reader = _Reader(blob[len(_MAGIC) :])
    if (version := reader.number()) != _VERSION:
        raise ValueError(f"it has version {version}, not {_VERSION}")
    key = _key_from(reader.string())
    namespace = reader.text()
    if reader.string():
        raise ValueError("it uses a field that is reserved")
    if (hashed := reader.text()) not in HASHES:
        raise ValueError(f"it is made with {hashed[:20]!r}, not with {' or '.join(HASHES)}")
    _check_inner(_Reader(reader.string()), key)
    reader.end()
    return Signature(key, namespace, blob)


def _check_inner(reader: _Reader, key: Key) -> None:
    """The signature proper: the algorithm of the key's type, numbers of the right length."""
    algorithm = reader.text()
    wanted = ("rsa-sha2-512", "rsa-sha2-256") if key.rsa_bytes else (key.kind,)
    if algorithm not in wanted:
        raise ValueError(f"it is made by {algorithm[:40]!r}, not by {' or '.join(wanted)}")
    numbers = reader.string()
    if "ecdsa" in key.kind:
        pair = _Reader(numbers)
        pair.positive()
        pair.positive()
        pair.end()
    elif len(numbers) != (key.rsa_bytes or 64):
        raise ValueError("its length is not that of a signature by such a key")
    if key.kind.startswith("sk-"):
        reader.take(5)  # flags, counter
    reader.end()


def _key_from(blob: bytes) -> Key:
    reader = _Reader(blob)
    kind = reader.text()
    if kind not in KEY_TYPES:
        raise ValueError(f"keys of type {kind[:60]!r} are not accepted")
    rsa_bytes = 0
    if kind == "ssh-rsa":
        rsa_bytes = _rsa_bytes(reader)
    elif "ecdsa" in kind:
        _check_point(reader, re.sub(r"@.*", "", kind).rsplit("-", 1)[1])
    elif len(reader.string()) != 32:
        raise ValueError("an Ed25519 key has 32 bytes")
    if kind.startswith("sk-") and not 0 < len(reader.text()) <= _MAX_APPLICATION:
        raise ValueError("a hardware key names what it signs for")
    reader.end()
    return Key(kind, blob, rsa_bytes)


def _rsa_bytes(reader: _Reader) -> int:
    exponent, modulus = reader.positive(), reader.positive()
    bits = modulus.bit_length()
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        raise ValueError(f"an RSA key of {bits} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are needed")
    if exponent.bit_length() > 64:
        raise ValueError("an RSA key with an exponent that is only there to cost time")
    return -(-bits // 8)


def _check_point(reader: _Reader, curve: str) -> None:
    named, point = reader.text(), reader.string()
    if named != curve or len(point) != 1 + 2 * _CURVES[curve] or point[0] != 4:
        raise ValueError(f"it is not an uncompressed point of {curve}")


def _unbase64(encoded: str) -> bytes:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError("it is not base64") from error
    if base64.b64encode(data).decode() != encoded:
        raise ValueError("its base64 is not in canonical form")
    return data


class _Reader:
    """Reads SSH's wire format (RFC 4251, section 5); nothing beyond the end, no second spelling."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._data) - self._at:
            raise ValueError("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        """An unsigned number of 32 bits."""
        return int(struct.unpack(">I", self.take(4))[0])

    def string(self) -> bytes:
        """Bytes with their length before them."""
        return self.take(self.number())

    def text(self) -> str:
        """A string of printable ASCII."""
        try:
            text = self.string().decode("ascii")
        except UnicodeDecodeError as error:
            raise ValueError("a name in it is not ASCII") from error
        if text and not text.isprintable():
            raise ValueError("a name in it is not printable")
        return text

    def positive(self) -> int:
        """A whole number above zero, in its shortest form."""
        data = self.string()
        number = int.from_bytes(data, "big")
        if not number or data != number.to_bytes(number.bit_length() // 8 + 1, "big"):
            raise ValueError("a number in it is not in canonical form")
        return number

    def end(self) -> None:
        """Insist that nothing follows."""
        if self._at != len(self._data):
            raise ValueError("something follows its end")
