"""Who of many virtual clients gets which file, and what nobody gets: the held-out part.

Deals out whole files; what is in them, the model family reads. Equal trees and seeds give equal
partitions, and no text lies in two parts, not even as a copy under another name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moshi_fl.data import HELD_OUT, read_sources
from moshi_fl.errors import ConfigError, DataError
from moshi_fl.models.family import DataFile

SPLITS = ("iid", "directory")


@dataclass(frozen=True)
class File:
    """A usable file: where it lies, the top-level directory it belongs to, its size in bytes."""

    path: Path
    directory: str
    bytes: int


@dataclass(frozen=True)
class Share:
    """What one client gets; ``name`` says where it comes from."""

    name: str
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files lie."""
        return tuple(file.path for file in self.files)


@dataclass(frozen=True)
class Partition:
    """The shares of all clients, and the held-out files that are in none of them."""

    shares: tuple[Share, ...]
    held_out: Share


Find = Callable[[Path], Sequence[DataFile]]
"""What can be dealt out under a file or folder."""


def source_files(path: Path) -> list[DataFile]:
    """Source texts, by the rules of ``moshi_fl.data``."""
    root, found = path.expanduser().resolve(), []
    for source in read_sources([root]).taken:
        place = root if root.is_file() else root / source.name
        found.append(DataFile(place, source.name, source.digest, len(source.text.encode())))
    return found


def partition(
    paths: Sequence[Path],
    clients: int,
    *,
    how: str,
    seed: int,
    find: Find = source_files,
) -> Partition:
    """Deal the files under ``paths`` out to so many clients.

    Args:
        paths: Files and folders.
        clients: How many shares to make.
        how: ``iid``: files in random order, one client after the other. ``directory``: whole
            top-level directories, the largest first, each to the client that has least.
        seed: Decides the order, and which files are held out.
        find: What files there are; source texts by default.

    Raises:
        ConfigError: There is no such split.
        DataError: Nothing usable is there, or it is too few files or directories for the clients.
    """
    if how not in SPLITS:
        raise ConfigError(f"there is no split {how!r}; known: {', '.join(SPLITS)}.")
    files = find_files(paths, find)
    if len(files) <= clients:
        raise DataError(
            f"{len(files)} usable files are too few for {clients} clients and a held-out part.",
            hint=f"--clients {len(files) - 1}, or more --data"
            if len(files) > 1
            else "give --data a folder with more files",
        )
    order = np.random.default_rng(seed).permutation(len(files))
    shuffled = [files[index] for index in order]
    held_out = _held_out(shuffled, len(files) - clients)
    rest = [file for file in shuffled if file not in set(held_out)]
    deal = _deal_files if how == "iid" else _deal_directories
    return Partition(deal(rest, clients), Share("held out", tuple(held_out)))


def find_files(paths: Sequence[Path], find: Find = source_files) -> list[File]:
    """All usable files in order of name; of equal ones, the first.

    Raises:
        DataError: A path does not exist, or there is nothing usable under one.
    """
    found: dict[bytes, File] = {}
    for path in paths:
        root = path.expanduser().resolve()
        for file in find(root):
            found.setdefault(file.digest, _file(root, file))
    return list(found.values())


def _file(root: Path, file: DataFile) -> File:
    top, slash, _ = file.name.partition("/")
    directory = f"{root.name}/{top}" if slash and not root.is_file() else root.name
    return File(file.path, directory, file.bytes)


def _held_out(files: Sequence[File], most: int) -> list[File]:
    """About a tenth of the bytes, in at most so many files, but not in a single huge one."""
    wanted = HELD_OUT * sum(file.bytes for file in files)
    chosen: list[File] = []
    size = 0
    for file in files:
        if len(chosen) < most and size < wanted and size + file.bytes <= 2 * wanted:
            chosen.append(file)
            size += file.bytes
    return chosen or [min(files, key=lambda file: file.bytes)]


def _deal_files(files: Sequence[File], clients: int) -> tuple[Share, ...]:
    return tuple(
        Share(f"{len(files[start::clients])} files", tuple(files[start::clients]))
        for start in range(clients)
    )


def _deal_directories(files: Sequence[File], clients: int) -> tuple[Share, ...]:
    directories: dict[str, list[File]] = {}
    for file in files:
        directories.setdefault(file.directory, []).append(file)
    if len(directories) < clients:
        raise DataError(
            f"{len(directories)} top-level directories are too few for {clients} clients.",
            hint=f"--clients {len(directories)}, --split iid, or more --data folders",
        )
    shares: list[dict[str, list[File]]] = [{} for _ in range(clients)]
    sizes = [0] * clients
    for name in sorted(directories, key=lambda name: (-_bytes(directories[name]), name)):
        lightest = sizes.index(min(sizes))
        shares[lightest][name] = directories[name]
        sizes[lightest] += _bytes(directories[name])
    return tuple(
        Share(", ".join(sorted(share)), tuple(file for part in share.values() for file in part))
        for share in shares
    )


def _bytes(files: Sequence[File]) -> int:
    return sum(file.bytes for file in files)
