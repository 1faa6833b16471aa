"""A bare Git object store of our own: blobs, trees, commits and refs, without a checkout.

What is read from it may come from anyone: kinds and sizes are looked at before content, and
nothing is ever written outside the store's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from moshi_fl.errors import CorruptRecord
from moshi_fl.store.failures import disk_errors, local_failure
from moshi_fl.store.folder import StoreFolder
from moshi_fl.store.names import (
    checked_object,
    checked_oid,
    checked_path,
    checked_prefix,
    checked_ref,
)
from moshi_fl.store.process import MAX_OUTPUT, Task, run
from moshi_fl.store.trees import (
    BYTES_PER_ENTRY,
    LISTING_SLACK,
    TreeEntry,
    changed,
    parse_listing,
    split_batch,
    usable,
)

_MAX_FILES = 100_000  # of a tree, when single files of it are asked for
_MAX_ARGUMENTS = 200  # paths on one command line


NOREPLY = "noreply@moshi-fl.invalid"
"""Address of all authors: who somebody is, their keys say."""


@dataclass(frozen=True)
class Author:
    """Who a commit names as its author and committer."""

    name: str
    email: str


class ObjectStore(StoreFolder):
    """The local half of a ``HubRepo``: it never talks to anyone."""

    def resolve(self, ref: str) -> str | None:
        """The object id that a local ref points to; None when there is no such ref or object."""
        name = checked_object(ref) + "^{object}"
        result = self._run(["rev-parse", "--verify", "--quiet", "--end-of-options", name])
        return result.out.decode().strip() if result.status == 0 else None

    def refs(self, prefix: str) -> dict[str, str]:
        """Local refs: the ref of this name, or all in the folder when it ends in a slash."""
        options = ["--format=%(objectname) %(refname)", "--", checked_prefix(prefix)]
        lines = self._git("listing refs", "for-each-ref", *options).lines
        return {ref: oid for oid, _, ref in (line.partition(" ") for line in lines)}

    def set_ref(self, ref: str, oid: str) -> None:
        """Point a local ref to an object, whatever it pointed to."""
        self._update_refs({ref: oid})

    def delete_refs(self, *refs: str) -> None:
        """Delete local refs, all or none; those that do not exist are fine."""
        self._update_refs(dict.fromkeys(refs))

    def entries(self, commit: str, path: str = "", *, limit: int = 10_000) -> list[TreeEntry]:
        """All entries below a path (empty: the root) of a commit's tree, folders resolved.

        Names are as found, hostile ones included; other bytes than UTF-8 are escaped.

        Raises:
            CorruptRecord: More than ``limit`` entries, or no such commit.
        """
        return self._list(commit, [checked_path(path)] if path else [], limit)

    def read(self, commit: str, path: str, *, limit: int) -> bytes:
        """The content of one plain file.

        Raises:
            CorruptRecord: Not there, not a plain file, or larger than ``limit`` bytes; it has not
                been read then.
        """
        return self.read_many(commit, [path], limit=limit)[0]

    def read_many(self, commit: str, paths: Sequence[str], *, limit: int) -> list[bytes]:
        """The contents of several plain files of at most ``limit`` bytes each, in two processes."""
        return self.contents(self._plain_files(commit, paths, limit)) if paths else []

    def read_listed(
        self, commit: str, limits: Mapping[str, int], *, at_most: int
    ) -> dict[str, bytes]:
        """The contents of those files at a tree's root that have a limit, by name.

        Args:
            commit: The commit.
            limits: Name to largest size in bytes; what is not there is left out.
            at_most: How many entries the tree may have.

        Raises:
            CorruptRecord: One of them is no plain file or too large, or there are more entries.
        """
        listed = [entry for entry in self.entries(commit, limit=at_most) if entry.path in limits]
        found = [usable(entry, commit, entry.path, limits[entry.path]) for entry in listed]
        contents = self.contents(found) if found else []
        return {entry.path: data for entry, data in zip(found, contents, strict=True)}

    def contents(self, found: Sequence[TreeEntry]) -> list[bytes]:
        """The contents of plain files that were listed and are not too large, in one process.

        Raises:
            CorruptRecord: One is not here.
        """
        wanted = "".join(entry.oid + "\n" for entry in found).encode()
        total = sum((entry.size or 0) + 128 for entry in found)
        result = self._git(
            "reading", "cat-file", "--batch", stdin=wanted, max_output=max(total, MAX_OUTPUT)
        )
        return list(split_batch(result.out, found))

    def stream(self, commit: str, entry: TreeEntry, out: BinaryIO, *, limit: int) -> int:
        """Copy a plain file of at most ``limit`` bytes to ``out``; returns its size in bytes.

        ``entry`` is what ``entries`` has listed of that commit.

        Raises:
            CorruptRecord: Something else, or larger; nothing has been copied then.
        """
        size = usable(entry, commit, entry.path, limit).size or 0
        with disk_errors(Path(str(getattr(out, "name", "the output"))).parent):
            self._git("reading", "cat-file", "blob", entry.oid, out=out, max_output=size)
        return size

    def put(self, source: Path | bytes) -> str:
        """Store a file's or these bytes as they are; returns the blob's id."""
        with self.lock():
            if isinstance(source, bytes):
                return self._hash(source)
            with source.open("rb") as file:
                return self._hash(file)

    def put_many(self, sources: Sequence[bytes]) -> list[str]:
        """Store many small contents with one process; returns the blobs' ids in the same order."""
        with self.lock(), self._scratch() as scratch:
            files = [scratch / str(number) for number in range(len(sources))]
            for file, source in zip(files, sources, strict=True):
                file.write_bytes(source)
            names = "".join(_quoted(file) + "\n" for file in files).encode()
            argv = ["hash-object", "-w", "--no-filters", "--stdin-paths"]
            return self._git("storing", *argv, stdin=names).lines

    def tree(
        self, files: Mapping[str, str], *, base: str | None = None, remove: Sequence[str] = ()
    ) -> str:
        """Make a tree from paths and blob ids.

        Args:
            files: Path to blob id; all become plain files.
            base: Commit or tree to start from.
            remove: Paths of files of the base that the new tree lacks.

        Returns:
            The tree's id.
        """
        gone = "".join(f"0 {'0' * 40}\t{checked_path(path)}\0" for path in remove)
        new = "".join(
            f"100644 {checked_oid(oid)}\t{checked_path(path)}\0" for path, oid in files.items()
        )
        with self.lock(), self._scratch() as scratch:
            env = {"GIT_INDEX_FILE": str(scratch / "index")}
            if base:
                self._git("building a tree", "read-tree", checked_object(base), env=env)
            lines = (gone + new).encode()
            self._git("building a tree", "update-index", "-z", "--index-info", stdin=lines, env=env)
            return self._git("building a tree", "write-tree", env=env).out.decode().strip()

    def commit(
        self, tree: str, *, parents: Sequence[str] = (), message: str, author: Author, when: int
    ) -> str:
        """Make a commit; the same input gives the same id everywhere.

        Args:
            tree: The tree's id.
            parents: Ids of its parents.
            message: Its text.
            author: Author and committer.
            when: Unix time in seconds, written as UTC.
        """
        env = {
            f"GIT_{role}_{key}": value
            for role in ("AUTHOR", "COMMITTER")
            for key, value in {
                "NAME": _one_line(author.name),
                "EMAIL": _one_line(author.email),
                "DATE": f"@{when} +0000",
            }.items()
        }
        options = [word for parent in parents for word in ("-p", checked_oid(parent))]
        with self.lock():
            result = self._git(
                "committing",
                "commit-tree",
                *options,
                "-F",
                "-",
                checked_oid(tree),
                stdin=message.encode(),
                env=env,
            )
        return result.out.decode().strip()

    def is_ancestor(self, old: str, new: str) -> bool:
        """Whether ``new`` is ``old`` or descends from it."""
        argv = ["merge-base", "--is-ancestor", checked_object(old), checked_object(new)]
        result = self._run(argv)
        if result.status not in {0, 1}:
            raise local_failure(self.path, "comparing commits", result)
        return result.status == 0

    def log(self, ref: str, *, limit: int) -> list[tuple[str, str]]:
        """Ids and subjects of the newest commits along first parents, newest first."""
        options = ["--first-parent", f"--max-count={limit}", "--no-show-signature"]
        options += ["--format=%H %s", "--end-of-options", checked_object(ref)]
        lines = self._git("reading history", "log", *options).lines
        return [(oid, subject) for oid, _, subject in (line.partition(" ") for line in lines)]

    def added(self, ref: str, pattern: str) -> dict[str, str]:
        """Paths of this pattern, each with the commit that added it, along first parents.

        ``pattern`` is one of Git's globs. Where a path was added again, the newest commit counts.
        """
        options = ["--first-parent", "--diff-merges=first-parent", "--diff-filter=A"]
        options += ["--no-renames", "--name-only", "--no-show-signature", "--format=commit %H"]
        options += ["--end-of-options", checked_object(ref), "--", f":(glob){pattern}"]
        found: dict[str, str] = {}
        commit = ""
        env = {"GIT_LITERAL_PATHSPECS": "0"}  # the pattern is ours
        for line in self._git("reading history", "log", *options, env=env).lines:
            if line.startswith("commit "):
                commit = line.removeprefix("commit ")
            elif line:
                found.setdefault(line, commit)
        return found

    def message(self, commit: str) -> str:
        """A commit's message."""
        options = ["--max-count=1", "--no-show-signature", "--format=%B", "--end-of-options"]
        out = self._git("reading history", "log", *options, checked_oid(commit)).out
        return out.decode("utf-8", "replace")

    def parents(self, commit: str) -> list[str]:
        """Parents of a commit, in order.

        Raises:
            CorruptRecord: No such commit here.
        """
        name = checked_object(commit) + "^{commit}"
        result = self._run(["rev-list", "--parents", "--max-count=1", "--end-of-options", name])
        if result.status != 0:
            raise CorruptRecord(f"{commit} is no commit that is here.")
        return result.out.decode().split()[1:]

    def changes(self, old: str, new: str, *, limit: int = 1000) -> list[TreeEntry]:
        """What differs from one commit's tree to another's, as it is in ``new``.

        A deleted path has mode ``000000``. Names are as found, hostile ones included.

        Raises:
            CorruptRecord: More than ``limit`` paths differ.
        """
        argv = ["diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev"]
        argv += ["--end-of-options", checked_object(old), checked_object(new)]
        task = Task(
            argv,
            self._env,
            max_output=limit * BYTES_PER_ENTRY + LISTING_SLACK,
            timeout=self.timeout,
        )
        result = run(self.path, task)
        fields = result.out.split(b"\0")[:-1]
        if result.overflowed or len(fields) > 2 * limit:
            raise CorruptRecord(f"{new}: more than {limit} files differ from {old}.")
        if result.status != 0:
            raise CorruptRecord(f"{new}: cannot be compared ({result.words or result.status}).")
        pairs = zip(fields[::2], fields[1::2], strict=True)
        found = [changed(head, path) for head, path in pairs]
        sizes = self._sizes([entry.oid for entry in found if entry.kind == "blob"])
        return [replace(entry, size=sizes.get(entry.oid)) for entry in found]

    def _sizes(self, oids: Sequence[str]) -> dict[str, int]:
        asked = "".join(oid + "\n" for oid in oids).encode()
        form = "--batch-check=%(objectname) %(objecttype) %(objectsize)"
        lines = self._git("measuring", "cat-file", form, stdin=asked).lines
        fields = [line.split() for line in lines]
        return {line[0]: int(line[2]) for line in fields if len(line) == 3 and line[1] == "blob"}

    def _hash(self, source: bytes | BinaryIO) -> str:
        # Weights do not compress as text does: pushing 43 MB takes 0.6 s instead of 3.9 s.
        argv = ["-c", "pack.compression=0", "hash-object", "-w", "--no-filters", "--stdin"]
        return self._git("storing", *argv, stdin=source).out.decode().strip()

    def _update_refs(self, wanted: Mapping[str, str | None]) -> None:
        lines = "".join(
            f"update {checked_ref(ref)}\0{checked_oid(oid)}\0\0"
            if oid
            else f"delete {checked_ref(ref)}\0\0"
            for ref, oid in wanted.items()
        )
        with self.lock():
            if lines:
                options = ["--no-deref", "--stdin", "-z"]
                self._git("updating refs", "update-ref", *options, stdin=lines.encode())

    def _list(self, commit: str, paths: Sequence[str], limit: int) -> list[TreeEntry]:
        argv = ["ls-tree", "-r", "-z", "-l", "--full-tree", checked_object(commit), "--", *paths]
        longest = limit * BYTES_PER_ENTRY + LISTING_SLACK
        task = Task(argv, self._env, max_output=longest, timeout=self.timeout)
        result = run(self.path, task)
        if result.overflowed:
            raise CorruptRecord(f"{commit}: its listing is too long for {limit} files.")
        if result.status != 0:
            raise CorruptRecord(f"{commit}: no readable tree ({result.words or result.status}).")
        found = parse_listing(result.out)
        if len(found) > limit:
            raise CorruptRecord(f"{commit}: more than {limit} files.")
        return found

    def _plain_files(self, commit: str, paths: Sequence[str], limit: int) -> list[TreeEntry]:
        asked = [checked_path(path) for path in paths]
        listed: dict[str, TreeEntry] = {}
        for start in range(0, len(asked), _MAX_ARGUMENTS):  # all would not fit a command line
            some = asked[start : start + _MAX_ARGUMENTS]
            listed |= {entry.path: entry for entry in self._list(commit, some, _MAX_FILES)}
        return [usable(listed.get(path), commit, path, limit) for path in asked]


def _quoted(path: Path) -> str:
    """A path as ``--stdin-paths`` reads it, whatever characters it has."""
    return '"' + re.sub(r'(["\\])', r"\\\1", str(path)).replace("\n", "\\n") + '"'


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f<>]+", " ", text).strip() or "unknown"
