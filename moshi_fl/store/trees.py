"""What ``ls-tree`` and ``cat-file --batch`` print, taken apart without trust in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moshi_fl.errors import CorruptRecord

LISTING_SLACK = 1 << 16
BYTES_PER_ENTRY = 512  # that a listing may take on average


@dataclass(frozen=True)
class TreeEntry:
    """One line of ``ls-tree``: mode, kind, object id, size in bytes (blobs only), path."""

    mode: str
    kind: str
    oid: str
    size: int | None
    path: str

    @property
    def is_plain_file(self) -> bool:
        """Whether this is a file without execute bit: no link, no folder, no repository."""
        return (self.mode, self.kind) == ("100644", "blob")


def parse_listing(out: bytes) -> list[TreeEntry]:
    """The entries of ``ls-tree -z -l``; names that are not UTF-8 are escaped."""
    return [_entry(line) for line in out.split(b"\0") if line]


def changed(head: bytes, path: bytes) -> TreeEntry:
    """The new side of one pair of fields of ``diff-tree -z --raw``, its size still unknown."""
    mode, oid = head.decode().split()[1:4:2]
    kind = {"160000": "commit", "000000": "none"}.get(mode, "blob")
    return TreeEntry(mode, kind, oid, None, path.decode(errors="backslashreplace"))


def usable(entry: TreeEntry | None, commit: str, path: str, limit: int) -> TreeEntry:
    """The entry itself, if it is a plain file of at most ``limit`` bytes.

    Raises:
        CorruptRecord: It is something else, larger, or not there.
    """
    if entry is None:
        raise CorruptRecord(f"{commit} has no file {path!r}.")
    if not entry.is_plain_file:
        raise CorruptRecord(f"{commit}: {path!r} is no plain file ({entry.mode} {entry.kind}).")
    if entry.size is None:
        raise CorruptRecord(f"{commit}: the content of {path!r} is missing.")
    if entry.size > limit:
        raise CorruptRecord(f"{commit}: {path!r} has {entry.size} bytes, the limit is {limit}.")
    return entry


def split_batch(out: bytes, entries: Sequence[TreeEntry]) -> Iterator[bytes]:
    """Contents that ``cat-file --batch`` printed: a header line, the content, a newline, each."""
    at = 0
    for entry in entries:
        header = f"{entry.oid} blob {entry.size}\n".encode()
        start = at + len(header)
        end = start + (entry.size or 0)
        if out[at:start] != header or out[end : end + 1] != b"\n":
            raise CorruptRecord(f"{entry.path!r}: object {entry.oid} cannot be read back.")
        yield out[start:end]
        at = end + 1


def _entry(line: bytes) -> TreeEntry:
    head, _, name = line.partition(b"\t")
    mode, kind, oid, size = head.decode().split()
    # The size is "-" for what is no blob, and "BAD" for a blob that is not here.
    path = name.decode(errors="backslashreplace")
    return TreeEntry(mode, kind, oid, int(size) if size.isdecimal() else None, path)
