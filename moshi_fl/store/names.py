"""Names that may reach a Git command line: refs, object ids and paths, strictly spelled."""

from __future__ import annotations

import re

from moshi_fl.errors import CorruptRecord

MAX_NAME = 250

_OID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_REF = re.compile(r"refs/[A-Za-z0-9_+@=-][A-Za-z0-9._/+@=-]*\Z")
_FORBIDDEN = re.compile(r"\.\.|//|/\.|@\{|\.lock(?:/|\Z)|\.(?:/|\Z)|/\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_ref(name: str) -> bool:
    """Whether this is a full ref name that Git and every file system take, in plain ASCII."""
    return len(name) <= MAX_NAME and bool(_REF.match(name)) and not _FORBIDDEN.search(name)


def checked_ref(name: str) -> str:
    """The name itself.

    Raises:
        CorruptRecord: It is not a full, plain ref name.
    """
    if not is_ref(name):
        raise CorruptRecord(f"{name!r} is not a usable ref name (refs/…, plain ASCII).")
    return name


def checked_oid(oid: str) -> str:
    """The full object id itself.

    Raises:
        CorruptRecord: It is not one; abbreviations and expressions are not accepted.
    """
    if not _OID.match(oid):
        raise CorruptRecord(f"{oid!r} is not a full object id.")
    return oid


def checked_object(name: str) -> str:
    """A full object id or a full ref name: what our commands take where Git takes a revision."""
    return name if _OID.match(name) else checked_ref(name)


def checked_prefix(prefix: str) -> str:
    """A ref name or a folder of refs that ends in a slash."""
    checked_ref(prefix.removesuffix("/") if prefix != "refs/" else "refs/all")
    return prefix


def checked_path(path: str) -> str:
    """A path inside a tree.

    Raises:
        CorruptRecord: A part is empty, ``.``, ``..`` or ``.git``, or holds control characters.
    """
    parts = path.split("/")
    if _CONTROL.search(path) or any(p in {"", ".", ".."} or p.lower() == ".git" for p in parts):
        raise CorruptRecord(f"{path!r} is not a usable path in a tree.")
    return path


def matches(ref: str, pattern: str) -> bool:
    """Whether a pattern means a ref: its exact name, or a prefix that ends in ``*`` or ``/``."""
    if pattern.endswith(("*", "/")):
        return ref.startswith(pattern.removesuffix("*"))
    return ref == pattern
