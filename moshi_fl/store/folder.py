"""The folder of a store: its lock, its settings, running Git in it, cleaning up in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from moshi_fl.store.failures import disk_errors, local_failure
from moshi_fl.store.leftovers import SCRATCH, clean_store
from moshi_fl.store.locking import LOCK_FILE, FolderLock
from moshi_fl.store.process import MAX_OUTPUT, Result, Task, run
from moshi_fl.store.settings import CLIENT_SETTINGS, config_text, environment, user_settings

LOCK_WAIT = 30.0  # seconds until another process's hold on the store becomes an error


class StoreFolder:
    """A bare repository that is ours alone, and the one way to run Git in it."""

    def __init__(self, path: Path, *, timeout: float = 600.0) -> None:
        """A store in the folder ``path``; ``timeout`` is in seconds per Git command."""
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow links)
        self.timeout = timeout
        self._env = environment(self.path)
        self._lock = FolderLock(self.path / LOCK_FILE)
        self._user: list[tuple[str, str]] | None = None

    def prepare(self) -> None:
        """Create the store if absent, renew its settings, clear what killed processes left."""
        with self.lock():
            self.recover()
            settings = self.path / "client.gitconfig"
            if not settings.exists():
                # No template: its hooks and excludes are not ours.
                options = ["--quiet", "--bare", "--template=", "--initial-branch=main"]
                env = {"GIT_DIR": str(self.path), "GIT_DEFAULT_HASH": "sha1"}
                self._git("preparing", "init", *options, env=env)
            safe = [value for key, value in self._user_settings() if key == "safe.directory"]
            self._write_settings(settings, config_text(CLIENT_SETTINGS, safe=safe))

    def lock(self, *, wait: float = LOCK_WAIT) -> AbstractContextManager[None]:
        """Hold the store for writing, against other threads and processes; reentrant.

        Raises:
            HubError: Another one still held it after ``wait`` seconds.
        """
        return self._lock.held(wait)

    def recover(self) -> None:
        """Remove what killed processes left behind: stale locks, half packs, scratch files."""
        with self.lock():
            clean_store(self.path)

    def drop(self) -> None:
        """Delete the whole store."""
        with self.lock():
            shutil.rmtree(self.path)

    def _run(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Result:
        return run(self.path, Task(argv, self._env | dict(env or {}), timeout=self.timeout))

    def _git(
        self,
        action: str,
        *argv: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes | BinaryIO | None = None,
        out: BinaryIO | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> Result:
        merged = self._env | dict(env or {})
        with self._input(stdin) as file:
            task = Task(argv, merged, file, out, max_output, timeout=self.timeout)
            result = run(self.path, task)
        if result.status != 0:
            raise local_failure(self.path, action, result)
        return result

    @contextmanager
    def _input(self, stdin: bytes | BinaryIO | None) -> Iterator[BinaryIO | None]:
        if not isinstance(stdin, bytes):
            yield stdin
            return
        # A file, not a pipe: nobody has to feed it, and Git streams big objects from files only.
        with disk_errors(self.path), tempfile.TemporaryFile(dir=self.path) as file:
            file.write(stdin)
            file.seek(0)
            yield file

    def _user_settings(self) -> list[tuple[str, str]]:
        if self._user is None:
            self._user = user_settings(self.path)
        return self._user

    def _write_settings(self, file: Path, text: str) -> None:
        if file.exists() and file.read_text() == text:
            return
        with self._scratch() as scratch:
            (scratch / "settings").write_text(text)
            (scratch / "settings").replace(file)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for writers, under the lock; gone afterwards, or when ``recover`` finds it."""
        with disk_errors(self.path):
            parent = self.path / SCRATCH
            parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                yield Path(folder)
