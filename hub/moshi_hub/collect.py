"""Fetches what contributors offer, without trusting it: the edge around ``moshi_hub.verify``.

Nothing is checked out. A branch is fetched under a size cap and compared entry by entry with main;
the delta is fetched only when its record passed, and never more of it than the codec can make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moshi_fl.errors import CorruptRecord, HubError, MoshiError
from moshi_fl.history import (
    DELTA_FILE,
    MAX_CONTRIBUTION_BYTES,
    Refs,
    branch_place,
    contribution_path,
    read_contributions,
    read_rounds,
    signature_path,
)
from moshi_fl.hubfile import HubConfig
from moshi_fl.records import Location, Round
from moshi_fl.replica import Replica
from moshi_fl.rules import Shapes, grown_rows, shapes_before_growth
from moshi_fl.signing import MAX_SIGNATURE_BYTES
from moshi_fl.store import HubRepo
from moshi_fl.weights import write_atomic
from moshi_hub.offers import Place
from moshi_hub.verify import (
    Base,
    Rules,
    Submission,
    Verdict,
    check_branch,
    delta_limit,
    precheck,
    verify,
)

MAX_BRANCH_PACK = 1 << 20
PACK_OVERHEAD = 1 << 16
BRANCH_BYTES = 1 << 15  # of a pack, where several come at once


def make_rules(
    config: HubConfig,
    refs: Refs,
    rounds: list[Round],
    shapes: Shapes,
    seen: Mapping[str, str],
    taken: Mapping[tuple[str, int], str],
) -> Rules:
    """Rules of the open round.

    Args:
        config: The hub's settings.
        refs: Names of the hub's refs.
        rounds: Records from the oldest acceptable base to the newest round, in order.
        shapes: Shapes of the newest round's tensors.
        seen: Hash of each delta contributed so far, to its contribution id.
        taken: Key and base round of each contribution to one of these rounds, to its id.
    """
    newest, bases, missing = rounds[-1], {}, 0
    for record in reversed(rounds):
        own = shapes_before_growth(shapes, newest.vocabulary_tensors, missing)
        bases[record.round] = Base(record.round, record.weights, own, missing)
        missing += grown_rows([record])
    return Rules(config, refs, newest.round, bases, seen, taken)


def judge(
    places: Mapping[str, Place],
    scratch: HubRepo,
    main: str,
    rules: Rules,
    out: Path,
    order: Sequence[str],
) -> Iterator[Verdict]:
    """Collect and verify each open contribution, one after the other.

    Args:
        places: Branch to the repository that has it, and that one's refs, listed before main was
            fetched: whoever pushed one of these branches knew no newer main. Their stores are the
            replica's, which holds main.
        scratch: A throw-away store for deltas.
        main: Commit of main.
        rules: What the open round accepts.
        out: Folder for the delta files, one per contribution.
        order: The branches, the one seen first first: of equal deltas, and of contributions by one
            key to one round, the first stays.
    """
    seen, taken = dict(rules.seen), dict(rules.taken)
    scratch.prepare()
    for branch in order:
        now, place = replace(rules, seen=seen, taken=taken), places[branch]
        commit = place.refs[branch]
        submission = Submission(branch, "", ())
        if not check_branch(branch, now):
            submission = _fetch_branch(place.repo, main, branch, commit)
        verdict = precheck(submission, now)
        if verdict.accepted and verdict.contribution:
            target = out / f"{verdict.contribution.id}.safetensors"
            limit = delta_limit(now, verdict.contribution.round)
            delta = verdict.contribution.delta
            submission = replace(submission, delta_commit=place.refs.get(delta.ref))
            submission = _fetch_delta(place.beside(scratch), submission, delta, limit, target)
            verdict = verify(submission, now, verdict)
        record = verdict.contribution
        # What could not be fetched this time keeps its place: a copy must not win by that.
        if record and (verdict.accepted or not verdict.is_settled):
            seen[record.delta.files[0].sha256] = record.id
            taken[record.key, record.round] = record.id
        yield verdict


def rivals(
    places: Mapping[str, Place], main: str, rules: Rules, branch: str, order: Sequence[str]
) -> list[str]:
    """Branches of the same repository that came before one, by the same key and to the same round.

    Args:
        places: As for ``judge``.
        main: Commit of main.
        rules: What the open round accepts.
        branch: The one; what the gate refuses by itself has no rivals.
        order: The branches, the one seen first first.
    """
    if branch_place(branch) is None or check_branch(branch, rules):
        return []
    here, start = places[branch], f"{branch.rpartition('/')[0]}/"
    names = [
        name
        for name in order[: order.index(branch) + 1]
        if name.startswith(start) and branch_place(name) and places[name].repo.url == here.repo.url
    ]
    found = _fetch_branches(here.repo, main, {name: places[name].refs[name] for name in names})
    signed = {name: precheck(submission, rules) for name, submission in found.items()}
    keys = {
        name: v.contribution.key for name, v in signed.items() if v.signature and v.contribution
    }
    own = keys.pop(branch, "")
    return [name for name in names if keys.get(name) == own]


def _fetch_branches(repo: HubRepo, main: str, branches: Mapping[str, str]) -> dict[str, Submission]:
    """Several at once; where one of them is not small, or gone, each by itself."""
    local = {branch: branch.replace("refs/heads/", "refs/moshi-fl/", 1) for branch in branches}
    limit = MAX_BRANCH_PACK + len(branches) * BRANCH_BYTES
    try:
        repo.fetch(local, max_bytes=limit, expect=branches)
        return {name: _read_branch(repo, main, name, at) for name, at in branches.items()}
    except MoshiError:
        return {name: _fetch_branch(repo, main, name, at) for name, at in branches.items()}
    finally:
        repo.delete_refs(*local.values())


def _fetch_branch(repo: HubRepo, main: str, branch: str, commit: str) -> Submission:
    local = branch.replace("refs/heads/", "refs/moshi-fl/", 1)
    try:
        repo.fetch({branch: local}, max_bytes=MAX_BRANCH_PACK, expect={branch: commit})
        return _read_branch(repo, main, branch, commit)
    except MoshiError as error:
        return Submission(branch, "", (), unreadable=str(error))
    finally:
        repo.delete_refs(local)


def _read_branch(repo: HubRepo, main: str, branch: str, commit: str) -> Submission:
    parents = repo.parents(commit)
    if parents != [main] and (len(parents) != 1 or not repo.is_ancestor(parents[0], main)):
        return Submission(branch, "the branch is not one commit on top of main.", ())
    changes = tuple(repo.changes(parents[0], commit))
    place = branch_place(branch)
    if place is None:
        return Submission(branch, "", changes)
    files = {
        contribution_path(*place): MAX_CONTRIBUTION_BYTES,
        signature_path(*place): MAX_SIGNATURE_BYTES,
    }
    found = {entry.path: entry for entry in changes if entry.is_plain_file}
    if found.keys() != files.keys() or any((found[path].size or 0) > files[path] for path in files):
        return Submission(branch, "", changes)
    record, signature = repo.contents([found[path] for path in files])
    return Submission(branch, "", changes, record, signature)


def _fetch_delta(
    scratch: HubRepo, submission: Submission, location: Location, limit: int, target: Path
) -> Submission:
    commit = location.commit
    if submission.delta_commit != commit:
        return submission
    local, expect = f"refs/moshi-fl/delta/{target.stem}", {location.ref: commit}
    try:
        scratch.fetch({location.ref: local}, max_bytes=limit + PACK_OVERHEAD, expect=expect)
        entries = tuple(scratch.entries(commit))
        plain = [(entry.path, entry.mode) for entry in entries] == [(DELTA_FILE, "100644")]
        if plain and (entries[0].size or 0) <= limit:
            with target.open("wb") as file:
                scratch.stream(commit, entries[0], file, limit=limit)
            return replace(submission, delta_entries=entries, delta=target)
    except HubError as error:
        return replace(submission, unreadable=str(error))
    except CorruptRecord:  # what was fetched is no commit, or its tree is endless: it holds no file
        return submission
    return replace(submission, delta_entries=entries)


def known_keys(replica: Replica, main: str, rounds: Sequence[Round]) -> dict[tuple[str, int], str]:
    """Key and base round of each contribution that these rounds took, to its id."""
    return {
        (contribution.key, contribution.round): contribution.id
        for contribution in read_contributions(replica.repo, main, *rounds).values()
    }


def known_deltas(replica: Replica, main: str, newest: Round) -> dict[str, str]:
    """Hash of each delta that main's records name, to the contribution that brought it.

    Kept in the replica's folder and extended by new rounds only: main never goes back.
    """
    path = replica.folder / "known-deltas.json"
    table: dict[str, str] = {}
    known = 0
    if path.exists():
        stored = json.loads(path.read_text())
        table, known = stored["deltas"], stored["round"]
    for record in read_rounds(replica.repo, main, known + 1, newest.round):
        for contribution in read_contributions(replica.repo, main, record).values():
            table[contribution.delta.files[0].sha256] = contribution.id
    write_atomic(path, json.dumps({"round": newest.round, "deltas": table}).encode())
    return table
