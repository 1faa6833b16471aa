"""The Merkle tree over the submissions of a session (RFC 6962, section 2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from moshi_fl.evidence import Submission
from moshi_fl.records import dump


def leaf(submission: Submission) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\0" + dump(submission)).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes, in their order."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = _split(len(leaves))
    return _node(merkle_root(leaves[:split]), merkle_root(leaves[split:]))


def merkle_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """What it takes to get from a leaf to the root: hashes of siblings, from the leaf up."""
    if len(leaves) <= 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*merkle_proof(leaves[:split], index), merkle_root(leaves[split:])]
    return [*merkle_proof(leaves[split:], index - split), merkle_root(leaves[:split])]


def is_included(found: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a proof leads from a leaf at this place, of so many, to the root."""
    if not 0 <= index < size:
        return False
    sides: list[bool] = []
    while size > 1:
        split = _split(size)
        sides.append(index < split)
        index, size = (index, split) if index < split else (index - split, size - split)
    if len(sides) != len(proof):
        return False
    for is_left, sibling in zip(reversed(sides), proof, strict=True):
        found = _node(found, sibling) if is_left else _node(sibling, found)
    return found == root


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
