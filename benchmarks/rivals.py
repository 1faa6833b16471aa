"""Other ways to keep a model in Git, measured on the same weights as a hub.

Each rival has a bare repository, an author who commits the weights of every round on main, a reader
who follows, and a contributor who pushes a branch with locally trained weights. Traffic of Git is
counted on the wire. Git LFS stores its objects in a folder; they travel uncompressed, so their
sizes are their traffic. git-theta is given its best case: sparse updates, against weights that the
hub's own codec has made sparse.

git-lfs and git-theta are used from ``benchmarks/.cache``, where ``install_rivals.sh`` puts them, or
from the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.wire import Wire
from moshi_fl.weights import save_weights, weights_digest

CACHE = Path(__file__).parent / ".cache"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Figures:
    """Bytes on the way, and wall seconds where they were taken."""

    clone: int
    cold: int
    warm: int
    contribution: int
    cold_seconds: float
    warm_seconds: float
    note: str = ""
    difference: str = ""
    """What is wrong with the weights that arrived; empty when nothing is."""


@dataclass(frozen=True)
class Rival:
    """A way of storing weights.

    Attributes:
        name: As the table shows it.
        setup: Git commands that prepare a user's settings.
        track: Git command that makes Git treat the model specially; empty for plain Git.
        plain_clone: Environment under which a clone leaves the weights out, where that exists.
        update: Environment of every commit after the first.
    """

    name: str
    setup: tuple[tuple[str, ...], ...] = ()
    track: tuple[str, ...] = ()
    plain_clone: tuple[tuple[str, str], ...] = ()
    update: tuple[tuple[str, str], ...] = ()

    @property
    def slug(self) -> str:
        """Name of its repository."""
        return self.name.split()[-2 if self.track[:1] == ("theta",) else -1].lower()


NAIVE = Rival("weights committed on main")
LFS = Rival(
    "Git LFS",
    setup=(("lfs", "install", "--skip-repo"),),
    track=("lfs", "track", MODEL),
    plain_clone=(("GIT_LFS_SKIP_SMUDGE", "1"),),
)
THETA = Rival(
    "git-theta 0.2.0",
    setup=(("lfs", "install", "--skip-repo"), ("theta", "install")),
    track=("theta", "track", MODEL),
    update=(("GIT_THETA_UPDATE_TYPE", "sparse"),),
)


def missing(rival: Rival) -> str:
    """Why a rival cannot be measured here; empty when it can."""
    if rival.track[:1] == ("lfs",) and not _which("git-lfs"):
        return "git-lfs is not installed"
    if rival.track[:1] == ("theta",) and not (_which("git-theta") and _which("git-lfs")):
        return "git-theta and git-lfs are not installed"
    return ""


def _path() -> str:
    tools = [CACHE / "git-lfs/usr/bin", CACHE / "git-theta/bin"]
    return os.pathsep.join([*map(str, tools), os.environ["PATH"]])


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=_path())


class Bench:
    """One rival's repository and its users, in a folder of their own."""

    def __init__(self, rival: Rival, folder: Path, root: Path, wire: Wire) -> None:
        self.rival, self.folder, self.wire = rival, folder, wire
        self.bare = root / f"{rival.slug}.git"
        self.url = f"{wire.url}/{rival.slug}.git"
        folder.mkdir(parents=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PYTHON"))}
        self.env |= {
            "PATH": _path(),
            "HOME": str(folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_THETA_CHECKPOINT_TYPE": "safetensors",
            # Where git-theta looks for updates made elsewhere; there are none, but it must be.
            "GIT_THETA_UPDATE_DATA_PATH": str(folder / "none.safetensors"),
        }
        save_weights(folder / "none.safetensors", {"none": np.zeros(1, np.float32)})

    def git(self, *argv: str, cwd: Path | None = None, **extra: str) -> str:
        """Run Git as one of the users; returns its output."""
        done = subprocess.run(
            ["git", *argv],
            cwd=cwd or self.folder,
            env=self.env | extra,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{self.rival.name}: git {argv[0]} failed: {done.stderr[-2000:]}")
        return done.stdout

    def measure(self, rounds: Sequence[Path], contribution: Path) -> Figures:
        """Commit the rounds' weights one after the other; measure at the last."""
        author = self._author()
        reader = self.folder / "reader"
        for number, weights in enumerate(rounds):
            if number == len(rounds) - 1:
                self.git("clone", self.url, str(reader))
            self._commit(author, weights, f"Round {number}", first=number == 0)
            self.git("push", "origin", "main", cwd=author)
        warm, warm_seconds = self._received(reader, "pull", "--ff-only", cwd=reader)
        cold, cold_seconds = self._received(
            self.folder / "cold", "clone", self.url, str(self.folder / "cold")
        )
        difference = self._difference(reader / MODEL, rounds[-1])
        clone, note = cold, ""
        if self.rival.plain_clone:
            plain = self.folder / "plain"
            pointers, _ = self._received(
                plain, "clone", self.url, str(plain), cwd=None, **dict(self.rival.plain_clone)
            )
            note = f"theirs brings the weights; {pointers / 1000:.1f} kB without"
        sent = self._contribute(contribution)
        return Figures(clone, cold, warm, sent, cold_seconds, warm_seconds, note, difference)

    def _author(self) -> Path:
        self.git("config", "--global", "user.name", "Bench")
        self.git("config", "--global", "user.email", "bench@example.org")
        self.git("config", "--global", "init.defaultBranch", "main")
        # No SSH, no accounts: the LFS objects lie in the bare repository.
        self.git("config", "--global", "lfs.url", self.bare.as_uri())
        for command in self.rival.setup:
            self.git(*command)
        self.git("init", "--quiet", "--bare", str(self.bare))
        author = self.folder / "author"
        self.git("init", "--quiet", str(author))
        self.git("remote", "add", "origin", self.url, cwd=author)
        if self.rival.track:
            self.git(*self.rival.track, cwd=author)
            self.git("add", ".gitattributes", cwd=author)
            # git-theta can make no sparse update to weights of the very first commit.
            self.git("commit", "--quiet", "-m", "Begin", cwd=author)
        return author

    def _commit(self, where: Path, weights: Path, message: str, *, first: bool) -> None:
        shutil.copyfile(weights, where / MODEL)
        extra = {} if first else dict(self.rival.update)
        self.git("add", MODEL, cwd=where, **extra)
        self.git("commit", "--quiet", "-m", message, cwd=where, **extra)

    def _received(
        self, client: Path, *argv: str, cwd: Path | None = None, **extra: str
    ) -> tuple[int, float]:
        objects = client / ".git/lfs/objects"
        before, started = _size(objects), time.perf_counter()
        self.wire.reset()
        self.git(*argv, cwd=cwd, **extra)
        seconds = time.perf_counter() - started
        return self.wire.received + _size(objects) - before, seconds

    def _difference(self, found: Path, wanted: Path) -> str:
        # git-theta orders tensors its own way, and passes over changes that it takes for noise.
        same = weights_digest(load_file(found)) == weights_digest(load_file(wanted))
        return "" if same else "what arrives is not bit for bit what was committed"

    def _contribute(self, weights: Path) -> int:
        clone = self.folder / "cold"
        if self.rival.track:
            self.git(*self.rival.track, cwd=clone)
        self._commit(clone, weights, "Contribution", first=False)
        store = self.bare / "lfs/objects"
        before = _size(store)
        self.wire.reset()
        # Onto main: git-theta 0.2.0 cannot push a new branch from a clone ("commit … not found").
        self.git("push", "origin", "main", cwd=clone)
        return self.wire.sent + _size(store) - before


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
