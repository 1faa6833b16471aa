"""From a user's source tree to texts for training and, apart from them, for evaluation.

Knows files, ``.gitignore`` and the split; what a token is, the model family knows. Nothing is
written, no symbolic link is followed, and equal trees give equal texts in equal order.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pathspec import GitIgnoreSpec

from moshi_fl import screening
from moshi_fl.errors import DataError

MAX_FILE_BYTES = 1 << 20
MAX_TOTAL_BYTES = 256 << 20
NAMED = 3  # files named of those that are left out for one reason
HELD_OUT = 0.1  # share of the files, or of a lone file's text
SMALLEST_TEXT = 200  # characters; less cannot be split into two parts worth having

IGNORED = "in .gitignore"
LINK = "symbolic link"
SPECIAL = "not a regular file"
UNREADABLE = "unreadable"
OVERSIZED = "over the size limit for one file"
OVER_BUDGET = "over the size limit for all files"
DUPLICATE = "same content as another file"


@dataclass(frozen=True)
class Source:
    """One file's text with Unix line ends, and its path within the folder that was read."""

    name: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()


class LeftOut:
    """Files and folders that are passed over: how many, and the first few of them, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Pass one over; ``name`` is its path within what the user named."""
        self._counts[reason] += 1
        names = self._names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    @property
    def counts(self) -> dict[str, int]:
        """Number of each reason, in order of reason."""
        return dict(sorted(self._counts.items()))

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The first few of each reason."""
        return {reason: tuple(self._names[reason]) for reason in self.counts}


def told_left_out(counts: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> str:
    """Such as ``4 clipped sound (a.wav, b.wav, c.wav, …); 1 symbolic link (x.wav)``."""
    told = []
    for reason, count in sorted(counts.items()):
        few = [*names.get(reason, ())]
        few += ["…"] if few and count > len(few) else []
        told.append(f"{count} {reason} ({', '.join(few)})" if few else f"{count} {reason}")
    return "; ".join(told)


@dataclass(frozen=True)
class Sources:
    """What was taken, in order of name, and what was left, by reason: how many, and the first few.

    Files and folders count alike.
    """

    taken: tuple[Source, ...]
    skipped: Mapping[str, int]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """UTF-8 length of all texts."""
        return sum(len(source.text.encode()) for source in self.taken)


@dataclass(frozen=True)
class Split:
    """Two parts that share no file, or the two ends of one file with a gap between them."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the training texts in order, in hex."""
        state = hashlib.sha256()
        for text in self.training:
            data = text.encode()
            state.update(len(data).to_bytes(8, "little") + data)
        return state.hexdigest()


@dataclass(frozen=True)
class _Found:
    path: Path
    name: str
    size: int


@dataclass
class _Walk:
    """One pass over a folder: files that may be read, and what was passed over."""

    max_file_bytes: int
    left: LeftOut = field(default_factory=LeftOut)

    def folder(self, folder: Path, prefix: str, ignores: list[_Ignore]) -> Iterator[_Found]:
        ignores = [*ignores, *_ignores_of(folder)]
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self.left.add(UNREADABLE, prefix.rstrip("/") or folder.name)
            return
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                reason = screening.folder_reason(entry.name)
                if reason is None and _ignored(Path(entry.path), ignores, is_folder=True):
                    reason = IGNORED
                if reason is None:
                    yield from self.folder(Path(entry.path), name + "/", ignores)
                elif reason:
                    self.left.add(reason, name)
            elif _ignored(Path(entry.path), ignores, is_folder=False):
                self.left.add(IGNORED, name)
            else:
                yield from self.file(Path(entry.path), name)

    def file(self, path: Path, name: str) -> Iterator[_Found]:
        reason, size = self._judge(path)
        if reason:
            self.left.add(reason, name)
        else:
            yield _Found(path, name, size)

    def _judge(self, path: Path) -> tuple[str | None, int]:
        try:
            status = path.lstat()
        except OSError:
            return UNREADABLE, 0
        if stat.S_ISLNK(status.st_mode):
            return LINK, 0
        if not stat.S_ISREG(status.st_mode):
            return SPECIAL, 0
        reason = screening.name_reason(path.name)
        if reason is None and status.st_size > self.max_file_bytes:
            reason = OVERSIZED
        return reason, status.st_size


@dataclass(frozen=True)
class _Ignore:
    """The rules of one ``.gitignore`` (or ``info/exclude``) and the folder they are about."""

    folder: Path
    spec: GitIgnoreSpec


def read_sources(
    paths: Sequence[Path],
    *,
    seed: int = 0,
    max_bytes: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Sources:
    """Read the texts under files and folders.

    A file or folder that is named by the caller is read even where a ``.gitignore`` above it
    says no; what lies below a named folder obeys the rules. Secrets, binaries and oversized
    files always stay out.

    Args:
        paths: Files and folders.
        seed: Decides which files are kept when they exceed ``max_bytes``.
        max_bytes: Limit for all files together, in bytes.
        max_file_bytes: Limit for one file, in bytes.

    Raises:
        DataError: A path does not exist, or nothing usable is left.
    """
    walk = _Walk(max_file_bytes)
    found: dict[Path, _Found] = {}
    for path in paths:
        for file in _find(path, walk):
            found.setdefault(file.path, file)
    limit = MAX_TOTAL_BYTES if max_bytes is None else max_bytes
    kept = _within_budget(list(found.values()), limit, seed)
    within_budget = {file.path for file in kept}
    for file in found.values():
        if file.path not in within_budget:
            walk.left.add(OVER_BUDGET, file.name)
    texts: dict[bytes, Source] = {}
    for file in kept:
        source = _read(file, walk)
        if source and source.digest in texts:
            walk.left.add(DUPLICATE, source.name)
        elif source:
            texts[source.digest] = source
    taken = tuple(texts.values())
    left = walk.left
    if not taken:
        raise DataError(f"No usable text under {_listed(paths)}.", hint=_why_nothing(left))
    return Sources(taken, left.counts, left.names)


def _find(path: Path, walk: _Walk) -> Iterator[_Found]:
    root = path.expanduser().resolve()
    if root.is_dir():
        yield from walk.folder(root, "", _ignores_above(root))
    elif root.exists():
        yield from walk.file(root, root.name)
    else:
        raise DataError(f"{path} does not exist.", hint="Give files or folders that are there.")


def _ignores_above(root: Path) -> list[_Ignore]:
    """Rules that the enclosing repository has for ``root``; none if they exclude it as a whole."""
    ignores: list[_Ignore] = []
    home = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    ignores += _ignores_of(home, Path(".git/info/exclude"))
    between = [folder for folder in root.parents if folder.is_relative_to(home)]
    for folder in reversed(between):
        ignores += _ignores_of(folder)
    inside = [folder for folder in (root, *between) if folder != home]
    if any(_ignored(folder, ignores, is_folder=True) for folder in inside):
        return []
    return ignores


def _ignores_of(folder: Path, name: Path = Path(".gitignore")) -> list[_Ignore]:
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [_Ignore(folder, GitIgnoreSpec.from_lines(filter(_understood, lines)))]


def _understood(line: str) -> bool:
    """Whether a line is a pattern; Git passes over those that are not."""
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def _ignored(path: Path, ignores: list[_Ignore], *, is_folder: bool) -> bool:
    """The last rule that matches decides, and a folder's own rules come after those above it."""
    for ignore in reversed(ignores):
        if path == ignore.folder:
            continue
        name = path.relative_to(ignore.folder).as_posix() + ("/" if is_folder else "")
        verdict = ignore.spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _within_budget(found: list[_Found], limit: int, seed: int) -> list[_Found]:
    """As many files as fit, drawn by a hash of their names; in order of name."""
    sizes = [(file.name, file.size) for file in found]
    kept = [found[place] for place in within(sizes, limit, seed)]
    return sorted(kept, key=lambda file: (file.name, str(file.path)))


def within(files: Sequence[tuple[str, int]], limit: int, seed: int) -> list[int]:
    """Places of as many files, of these names and sizes, as fit, drawn by a hash of their names."""
    if sum(size for _, size in files) <= limit:
        return list(range(len(files)))
    kept = []
    for place in sorted(range(len(files)), key=lambda i: rank(seed, files[i][0].encode())):
        if files[place][1] <= limit:
            limit -= files[place][1]
            kept.append(place)
    return sorted(kept)


def _read(file: _Found, walk: _Walk) -> Source | None:
    try:
        with file.path.open("rb") as stream:
            data = stream.read(walk.max_file_bytes + 1)
    except OSError:
        walk.left.add(UNREADABLE, file.name)
        return None
    reason = OVERSIZED if len(data) > walk.max_file_bytes else screening.content_reason(data)
    if reason:
        walk.left.add(reason, file.name)
        return None
    return Source(file.name, data.decode("utf-8-sig").replace("\r\n", "\n"))


def split(sources: Sources, *, seed: int) -> Split:
    """Hold out about a tenth of the files, chosen by a hash of their content.

    So a new file moves no other to the other side, except where a small tree would have an empty
    side. The text of a lone file is cut in two, with a gap between them.

    Raises:
        DataError: A lone file too short to cut.
    """
    if len(sources.taken) == 1:
        return _cut(sources.taken[0].text)
    chosen = choose_held_out([source.digest for source in sources.taken], seed)
    return Split(
        training=tuple(source.text for source in sources.taken if source.digest not in chosen),
        held_out=tuple(source.text for source in sources.taken if source.digest in chosen),
    )


def choose_held_out(digests: Sequence[bytes], seed: int) -> set[bytes]:
    """About a tenth of several, by their hashes: at least one, and not all."""
    ranked = sorted(digests, key=lambda digest: rank(seed, digest))
    count = sum(rank(seed, digest) < HELD_OUT for digest in ranked)
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


def _cut(text: str) -> Split:
    if len(text) < SMALLEST_TEXT:
        raise DataError(
            f"Only {len(text)} characters of text; at least {SMALLEST_TEXT} are needed.",
            hint="Give --data a folder with more source files.",
        )
    held_out, gap = int(len(text) * HELD_OUT), int(len(text) * HELD_OUT / 10)
    return Split((text[: -held_out - gap],), (text[-held_out:],))


def rank(seed: int, data: bytes) -> float:
    """A number in [0, 1) that depends on the seed and the data alone."""
    state = hashlib.sha256(seed.to_bytes(8, "little") + data)
    return int.from_bytes(state.digest()[:6], "big") / 2**48


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths)) or "(no path given)"


def _why_nothing(left: LeftOut) -> str:
    if not left.counts:
        return "The folder is empty; give files or folders with source code."
    reasons = told_left_out(left.counts, left.names)
    return f"Left out: {reasons}. Give files or folders with source code."
