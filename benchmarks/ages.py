"""A hub made older: a long history before the same weights.

Its rounds get later numbers, and before them come as many refs as that history would have left.
The older weights and the older part of main are missing: nobody who starts today fetches them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from moshi_fl.history import Refs, read_rounds
from moshi_fl.records import Location, Manifest, Round, digest
from moshi_fl.replica import Replica
from moshi_fl.store import RefUpdate
from moshi_fl.weights import sha256_bytes
from moshi_hub.merge import desk_for
from moshi_hub.publish import author, commit_latest, extend, latest_files


def grow_old(hub: Path, replica: Replica, years: int) -> None:
    """Renumber all rounds of a hub on this machine.

    Args:
        hub: Its bare repository, which nobody else uses.
        replica: A replica of it, whose home holds the hub's keys.
        years: How many rounds it becomes older.
    """
    state = replica.pull().state
    rounds = read_rounds(replica.repo, replica.fetch_main(), 0, state.newest.round)
    older = list(renumbered(rounds, state.refs, years))
    manifest = Manifest(hub=state.newest.hub, rounds=(older[0],))
    for record in older[1:]:
        manifest = extend(manifest, record)
    places = [place for record in older for place in locations(record)]
    before = [
        Location(ref=state.refs.update(n), commit=places[0].commit, files=())
        for n in range(1, years + 1)
    ]
    _set_refs(hub, [*before, *places])
    hubfile = state.hubfile.encode()
    files = latest_files(manifest, hubfile, state.tokenizer)
    desk = desk_for(replica, state, state.config)
    targets = desk.sign_targets(desk.draft_targets(files, manifest.newest.round))
    signed = {**files, **desk.publish(targets)}
    latest = commit_latest(replica.repo, manifest, signed, author("bench"))
    replica.repo.push([RefUpdate(state.refs.latest, latest, state.commit)])


def renumbered(rounds: Sequence[Round], refs: Refs, years: int) -> Iterator[Round]:
    """The same rounds with later numbers, chained anew."""
    previous = sha256_bytes(b"the round before")
    for record in rounds:
        number = record.round + years
        update, keyframe = record.update, record.keyframe
        if update:
            place = msgspec.structs.replace(update.location, ref=refs.update(number))
            update = msgspec.structs.replace(update, location=place)
        if keyframe:
            keyframe = msgspec.structs.replace(keyframe, ref=refs.keyframe(number))
        later = msgspec.structs.replace(
            record, round=number, previous=previous, update=update, keyframe=keyframe
        )
        previous = digest(later)
        yield later


def locations(record: Round) -> list[Location]:
    """Where a round's weights lie."""
    update = [record.update.location] if record.update else []
    return update + ([record.keyframe] if record.keyframe else [])


def _set_refs(hub: Path, places: Sequence[Location]) -> None:
    lines = "".join(f"update {place.ref} {place.commit}\n" for place in places)
    command = ["git", "--git-dir", str(hub), "update-ref", "--stdin"]
    subprocess.run(command, input=lines.encode(), check=True)
