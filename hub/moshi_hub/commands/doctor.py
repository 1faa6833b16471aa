"""``moshi-hub doctor``: whether a hub answers, is consistent, and has the settings of a hub."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from moshi_fl.checkup import Check, advise, attempt, report, require
from moshi_fl.cli import output_options
from moshi_fl.console import Console
from moshi_fl.errors import MoshiError
from moshi_fl.history import MAIN, SIGNED_FILES, HubState, fetch_latest, read_latest, read_state
from moshi_fl.records import Location
from moshi_fl.signing import check_ssh_keygen
from moshi_fl.store import HUB_SETTINGS, HubRepo, hub_settings, is_local, local_path
from moshi_fl.text import Duration, Moment, Size

SOON = 14 * 86400.0  # seconds
LITTLE_SPACE = 5 * 10**9  # bytes
_LIMIT = "receive.maxInputSize"


@click.command()
@click.argument("hub", metavar="PATH|URL")
@output_options
def doctor(console: Console, hub: str) -> None:
    """Check a hub: its records, its weights and, for a local one, its repository's settings."""
    with tempfile.TemporaryDirectory(prefix="moshi-hub-doctor-") as folder:
        report(console, _checks(HubRepo(Path(folder) / "git", hub), hub))


def _checks(repo: HubRepo, hub: str) -> Iterator[Check]:
    yield attempt("ssh-keygen", _ssh_keygen)
    start = time.monotonic()
    try:
        refs = repo.remote_refs()
    except MoshiError as error:
        yield Check("hub", "fail", str(error), error.hint)
        return
    yield Check("hub", "ok", f"answered in {Duration(time.monotonic() - start)}")
    if is_local(repo.url):
        folder = local_path(repo.url)
        yield attempt("settings", lambda: _settings(folder))
        yield attempt("disk", lambda: _space(folder))
    yield require(MAIN in refs, "main", refs.get(MAIN, "absent"), f"moshi-hub init {hub}")
    try:
        repo.prepare()
        refs_found, commit = fetch_latest(repo)
        state = read_state(repo, refs_found, commit)
    except MoshiError as error:
        yield Check("rounds", "fail", str(error), error.hint)
        return
    yield _rounds(state)
    yield attempt("signatures", lambda: _signatures(repo, commit))
    yield _weights(state, refs)
    waiting = sum(ref.startswith("refs/heads/contribute/") for ref in refs)
    yield Check("contributions", "ok", f"{waiting} on the hub")


def _ssh_keygen() -> Check:
    check_ssh_keygen()
    return Check("ssh-keygen", "ok", "tells right signatures from wrong ones")


def _settings(folder: Path) -> Check:
    found = hub_settings(folder)
    wrong = {key: v for key, v in HUB_SETTINGS.items() if found.get(key.lower()) != v}
    if _LIMIT.lower() not in found:
        wrong[_LIMIT] = "1g"
    repair = (f"git -C {shlex.quote(str(folder))} config {key} {v}" for key, v in wrong.items())
    shown = f"differ: {', '.join(wrong)}" if wrong else "as they should be"
    return advise(not wrong, "settings", shown, "\n".join(["run", *repair]))


def _space(folder: Path) -> Check:
    used = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Git moves files while we look
            used += path.lstat().st_size
    free = shutil.disk_usage(folder).free
    found = f"{Size(used)} used, {Size(free)} free"
    return advise(free >= LITTLE_SPACE, "disk", found, "Pushes fail on a full disk; make room.")


def _signatures(repo: HubRepo, commit: str) -> Check:
    """Whether a newcomer would take the hub's signatures, and for how long."""
    from moshi_fl.signed.client import Offer, verify

    files = read_latest(repo, commit)
    with tempfile.TemporaryDirectory(dir=repo.path) as folder:
        offer = Offer(repo.shown_url, files, SIGNED_FILES, repo.path)
        trust = verify(offer, {}, Path(folder))
    left = trust.expires - time.time()
    return advise(
        left > SOON,
        "signatures",
        f"root {trust.root}, valid for {Duration(left)}",
        "moshi-hub keys list   (shows what expires; keys refresh and keys renew sign it again)",
    )


def _rounds(state: HubState) -> Check:
    newest = state.newest
    found = f"round {newest.round}, made {Moment(newest.created)}, chain of records intact"
    return Check("rounds", "ok", found)


def _weights(state: HubState, refs: dict[str, str]) -> Check:
    """Every ref that a client may need must be there and be the commit that the manifest names."""
    rounds = state.manifest.rounds
    needed = [round_.keyframe for round_ in rounds]
    needed += [round_.update.location if round_.update else None for round_ in rounds[1:]]
    locations = [location for location in needed if isinstance(location, Location)]
    broken = [place.ref for place in locations if refs.get(place.ref) != place.commit]
    total = Size(sum(place.bytes for place in locations))
    found = f"{len(broken)} of {len(locations)} refs missing or moved: {', '.join(broken[:3])}"
    return require(
        not broken,
        "weights",
        found if broken else f"{len(locations)} refs, {total}, as the manifest says",
        "Restore these refs from a copy, or publish the next round with a keyframe.",
    )
