"""Small verbs over real stores and hubs, for tests that tell stories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from moshi_fl.store import Author, HubRepo, RefUpdate

WHO = Author("Test", "test@example.org")


def prepared(path: Path, url: str | Path, *, timeout: float = 60.0) -> HubRepo:
    """A store that is ready to use."""
    repo = HubRepo(path, str(url), timeout=timeout)
    repo.prepare()
    return repo


def commit(
    repo: HubRepo, files: Mapping[str, bytes], *, parents: tuple[str, ...] = (), when: int = 1
) -> str:
    """A commit of these files."""
    tree = repo.tree({path: repo.put(content) for path, content in files.items()})
    return repo.commit(tree, parents=parents, message="Test", author=WHO, when=when)


def publish(repo: HubRepo, ref: str, files: Mapping[str, bytes], *, when: int = 1) -> str:
    """A commit of these files, pushed to a new ref."""
    oid = commit(repo, files, when=when)
    repo.push([RefUpdate(ref, oid, None)])
    return oid


def git(repository: Path, *argv: str, stdin: bytes = b"") -> str:
    """Plain Git, as a stranger would use it."""
    command = ["git", "--git-dir", str(repository), *argv]
    return subprocess.run(command, input=stdin, check=True, capture_output=True).stdout.decode()


def files_below(folder: Path) -> set[str]:
    """All names below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def noise(size: int) -> bytes:
    """Bytes that do not compress."""
    return os.urandom(size)
