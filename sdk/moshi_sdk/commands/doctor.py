"""``moshi-fl doctor``: what this machine has, what it lacks, and whether the hub answers."""

from __future__ import annotations

import importlib.util
import math
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click

from moshi_fl import __version__
from moshi_fl.checkup import Check, advise, attempt, report, require
from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import ensure_home, home, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import HubError
from moshi_fl.signing import check_ssh_keygen, own_signer
from moshi_fl.store.locking import LOCK_FILE
from moshi_fl.text import Duration, Size

OLDEST_PYTHON = (3, 11)
OLDEST_GIT = (2, 34)
LITTLE_SPACE, TOO_LITTLE_SPACE = 2 * 10**9, 100 * 10**6  # bytes
RELEASED = datetime(2026, 1, 1, tzinfo=UTC)  # a clock that shows less is wrong
CLOCK_TOLERANCE = 60.0  # seconds between the clock and the file system's
STALE_SECONDS = 3600.0
_LEFTOVERS = ("*.lock", ".tmp-*", "tmp_*", ".tmp-*-pack-*")


@click.command()
@hub_option
@output_options
def doctor(console: Console, hub: str | None) -> None:
    """Check this machine and the way to the hub; each line says what to do next."""
    report(console, _checks(hub))


def _checks(hub: str | None) -> Iterator[Check]:
    yield Check("moshi-fl", "ok", __version__)
    yield _python()
    yield Check("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield _git()
    yield attempt("signing", _signing)
    yield from _torch()
    yield _flower()
    yield _speech()
    yield attempt("home", _home)
    yield attempt("disk", _space)
    yield attempt("clock", _clock)
    yield attempt("leftovers", _leftovers)
    yield attempt("hub", lambda: _hub(hub))


def _python() -> Check:
    needed = ".".join(map(str, OLDEST_PYTHON))
    return require(
        sys.version_info >= OLDEST_PYTHON,
        "python",
        f"{platform.python_version()} ({sys.executable})",
        f"Install Python {needed} or newer.",
    )


def _git() -> Check:
    needed = f"Install Git {'.'.join(map(str, OLDEST_GIT))} or newer."
    try:
        answer = subprocess.run(["git", "version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return Check("git", "fail", f"cannot be run: {error}", needed)
    version = re.search(r"(\d+)\.(\d+)[\w.]*", answer.stdout)
    new_enough = version is not None and (int(version[1]), int(version[2])) >= OLDEST_GIT
    found = version[0] if version else answer.stdout.strip()
    return require(new_enough, "git", found, needed)


def _signing() -> Check:
    """Whether ssh-keygen works, and who signs."""
    check_ssh_keygen()
    signer = own_signer(ensure_home(), load_settings().own_key)
    return Check("signing", "ok", f"{signer.fingerprint} ({signer.key_path})")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "fail", f"cannot be imported: {error}", "pip install torch")
        return
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    yield Check("devices", "ok", ", ".join(devices))


def _flower() -> Check:
    try:
        return Check("flower", "ok", metadata.version("flwr"))
    except metadata.PackageNotFoundError:
        return Check("flower", "fail", "not installed", 'pip install "flwr>=1.41,<1.43"')


def _speech() -> Check:
    """Whether models of speech can be trained; nobody else needs it."""
    wanted = ("soundfile", "sentencepiece")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        return Check("speech", "ok", f"not installed: {', '.join(missing)} (moshi-fl[speech])")
    return Check("speech", "ok", ", ".join(f"{n} {metadata.version(n)}" for n in wanted))


def _home() -> Check:
    folder = ensure_home()
    settings = load_settings()
    private = sys.platform == "win32" or not folder.stat().st_mode & 0o077
    found = f"{folder}, contributing as {settings.contributor}"
    return advise(private, "home", found, f"Others can look into it: chmod 700 {folder}")


def _space() -> Check:
    folder = home()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{Size(free)} free in {folder}"
    if free < TOO_LITTLE_SPACE:
        return Check("disk", "fail", found, "Make room, or set MOSHI_FL_HOME to another disk.")
    return advise(free >= LITTLE_SPACE, "disk", found, "Large models may not fit; make room.")


def _clock() -> Check:
    now = time.time()
    with tempfile.NamedTemporaryFile(dir=ensure_home()) as file:
        skew = abs(Path(file.name).stat().st_mtime - now)
    shown = datetime.fromtimestamp(now, UTC)
    sane = shown >= RELEASED and skew <= CLOCK_TOLERANCE
    found = f"{shown:%Y-%m-%d %H:%M} UTC"
    if skew > CLOCK_TOLERANCE:
        found += f", {Duration(skew)} from the file system's"
    return require(sane, "clock", found, "Set the clock: records and certificates carry dates.")


def _leftovers() -> Check:
    """Files that a killed process left; a young one may belong to somebody at work."""
    before = time.time() - STALE_SECONDS
    stale = sorted(path for path in _temporary(home()) if _last_change(path) < before)
    names = " ".join(shlex.quote(str(path)) for path in stale[:5])
    return advise(
        not stale,
        "leftovers",
        f"{len(stale)} stale lock or temporary files" if stale else "none",
        f"When no moshi-fl is running: rm -r {names}{' …' if len(stale) > 5 else ''}",
    )


def _temporary(folder: Path) -> set[Path]:
    found = {path for pattern in _LEFTOVERS for path in folder.rglob(pattern)}
    return {path for path in found if path.name != LOCK_FILE}  # ours stays; only its holder counts


def _last_change(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # whoever made it has finished meanwhile
        return math.inf


def _hub(hub: str | None) -> Check:
    from moshi_fl.store import NO_HUB_THERE, HubRepo

    url = load_settings(hub=hub).hub
    if not url:
        return Check("hub", "warn", "none set", "moshi-fl config set hub URL")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=ensure_home()) as folder:
        refs = HubRepo(Path(folder), url).remote_refs("refs/heads/main")
    if not refs:
        raise HubError("the hub answers, but has no main branch.", hint=NO_HUB_THERE)
    return Check("hub", "ok", f"answered in {Duration(time.monotonic() - start)}")
