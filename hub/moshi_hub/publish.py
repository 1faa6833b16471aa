"""Puts rounds on the hub: orphan commits for weights, one commit on main, one atomic push.

Until that push the hub does not change; afterwards all of it has. Branches of contributions are
cleaned up in a second push, which may fail without harm: the next merge repeats it.
"""

from __future__ import annotations

from calendar import timegm
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strptime

import msgspec

from moshi_fl.errors import HubError
from moshi_fl.history import (
    EVALUATORS_FILE,
    HUB_FILE,
    MAIN,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    HubState,
    Refs,
    accepted_path,
    accepted_signature_path,
    ledger_path,
    round_branch,
    round_folder,
    round_path,
    signature_beside,
    verdicts_path,
)
from moshi_fl.ledger import ledger_of
from moshi_fl.records import File, Location, Manifest, Round, Update, digest, dump
from moshi_fl.store import NOREPLY, Author, HubRepo, PushRejected, RefUpdate
from moshi_fl.trusted import read_evaluators
from moshi_fl.upstream import origin_of
from moshi_fl.weights import sha256_file
from moshi_hub.judging import Decided, with_anchor
from moshi_hub.propose import Proposal
from moshi_hub.proposed import ACCEPTED, LEFT_OUT, Proposed, has_round


@dataclass(frozen=True)
class Built:
    """A round as commits in the local store, not yet pushed."""

    record: Round
    main: str
    parent: str | None
    latest: str
    weights: Mapping[str, str]
    """Ref to commit of everything that holds weights."""


def author(name: str) -> Author:
    """The author of commits made in a maintainer's name."""
    return Author(name, NOREPLY)


Sign = Callable[[Mapping[str, bytes], int], Mapping[str, bytes]]
"""Gives the signed metadata for the files of a round of that number."""


def build_round(
    repo: HubRepo,
    state: HubState,
    main: str,
    proposal: Proposal,
    texts: Mapping[str, bytes],
    by: Author,
    signatures: Mapping[str, bytes],
    sign: Sign,
) -> Built:
    """Write a proposal into the local store as commits.

    Args:
        repo: The replica's store.
        state: The hub as it stands.
        main: Commit that the round is built on.
        proposal: The round.
        texts: What is for people, by name: ``report.md`` and the like, beside the record.
        by: Who makes the commits.
        signatures: Signature of each contribution's record, by id.
        sign: Makes the signed metadata.
    """
    record, weights = _locate(repo, state.refs, proposal, by)
    decided = proposal.decided
    verdicts = decided.verdicts if decided else None
    ledger = ledger_of(record, state.newest.ledger, proposal.contributions, verdicts)
    record = msgspec.structs.replace(
        record, ledger=digest(ledger), verdicts=digest(verdicts) if verdicts else None
    )
    manifest = extend(state.manifest, record)
    hubfile = repo.read(main, HUB_FILE, limit=1 << 18)
    signed = latest_files(manifest, hubfile, proposal.tokenizer)
    latest = commit_latest(repo, manifest, {**signed, **sign(signed, record.round)}, by)
    files = {
        round_path(record.round): dump(record),
        ledger_path(record.round): dump(ledger),
    }
    files |= {f"{round_folder(record.round)}/{name}": data for name, data in texts.items()}
    for contribution_id, contribution in proposal.contributions.items():
        files[accepted_path(record.round, contribution_id)] = dump(contribution)
        signature = signatures[contribution_id]
        files[accepted_signature_path(record.round, contribution_id)] = signature
    if decided:
        files |= _evaluation_files(repo, main, decided)
        weights[decided.verdicts.evidence.ref] = decided.verdicts.evidence.commit
    if proposal.tokenizer != state.tokenizer:
        files[TOKENIZER_FILE] = proposal.tokenizer
    tree = repo.tree(put_all(repo, files), base=main)
    message = f"{title(record)}{_losses(record)}\n"
    message += _decisions(proposal)
    commit = repo.commit(
        tree, parents=(main,), message=message, author=by, when=seconds(record.created)
    )
    return Built(record, commit, main, latest, weights)


def _decisions(proposal: Proposal) -> str:
    """What a maintainer has decided about it: left out, or taken though disputed."""
    judged = proposal.decided.verdicts.judged if proposal.decided else ()
    disputed = sorted(entry.submission for entry in judged if entry.outcome == "disputed")
    lines = [f"{LEFT_OUT}{entry}\n" for entry in proposal.left_out]
    lines += [f"{ACCEPTED}{entry}\n" for entry in disputed if entry in proposal.contributions]
    return "\n" + "".join(lines) if lines else ""


def _evaluation_files(repo: HubRepo, main: str, decided: Decided) -> dict[str, bytes]:
    """What main keeps of an evaluation. Its evidence lies on a ref of its own."""
    verdicts, path = decided.verdicts, verdicts_path(decided.verdicts.round)
    files = {
        path: decided.signed.record,
        signature_beside(path): decided.signed.signature.encode(),
    }
    if verdicts.mode == "local":
        listed = with_anchor(read_evaluators(repo, main), verdicts.hub, verdicts.anchor)
        files[EVALUATORS_FILE] = dump(listed)
    return files


def put_all(repo: HubRepo, files: Mapping[str, bytes]) -> dict[str, str]:
    """Store small files; path to blob."""
    return dict(zip(files, repo.put_many(list(files.values())), strict=True))


def seconds(created: str) -> int:
    """A record's time in seconds since 1970."""
    return timegm(strptime(created, "%Y-%m-%dT%H:%M:%SZ"))


def title(record: Round) -> str:
    """What a round is made of, in one line."""
    count = len(record.contributions)
    text = f"{count} contribution{'' if count == 1 else 's'}"
    if origin := origin_of(record):
        text = f"round {origin.round} of hub {origin.hub}"
    return f"Round {record.round}: {text}"


def _losses(record: Round) -> str:
    found = record.evaluation
    return f", held-out loss {found.before:.4f} to {found.after:.4f}" if found else ""


def _locate(
    repo: HubRepo, refs: Refs, proposal: Proposal, by: Author
) -> tuple[Round, dict[str, str]]:
    record = proposal.record
    if record.update is None:
        raise ValueError("a proposal always has an update")
    number, when = record.round, seconds(record.created)
    update = commit_files(repo, refs.update(number), proposal.update_files, by, when)
    places = [update]
    archive = keyframe = None
    if record.update.kind == "step" and record.contributions:
        archive = commit_files(repo, refs.archive(number), proposal.delta_files, by, when)
        places.append(archive)
    if proposal.keyframe_files:
        keyframe = commit_files(repo, refs.keyframe(number), proposal.keyframe_files, by, when)
        places.append(keyframe)
    located: Update = msgspec.structs.replace(record.update, location=update)
    record = msgspec.structs.replace(record, update=located, archive=archive, keyframe=keyframe)
    return record, {place.ref: place.commit for place in places}


def commit_files(repo: HubRepo, ref: str, paths: Sequence[Path], by: Author, when: int) -> Location:
    """Make an orphan commit of files, all at its root."""
    blobs = {path.name: repo.put(path) for path in sorted(paths)}
    commit = repo.commit(repo.tree(blobs), message=f"{ref}\n", author=by, when=when)
    files = tuple(
        File(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(paths)
    )
    return Location(ref=ref, commit=commit, files=files)


def latest_files(manifest: Manifest, hubfile: bytes, tokenizer: bytes) -> dict[str, bytes]:
    """The files of ``latest`` that are signed."""
    return {MANIFEST_FILE: dump(manifest), HUB_FILE: hubfile, TOKENIZER_FILE: tokenizer}


def commit_latest(repo: HubRepo, manifest: Manifest, files: Mapping[str, bytes], by: Author) -> str:
    """Make the orphan commit that ``latest`` points to: all that a client needs to start."""
    number, when = manifest.newest.round, seconds(manifest.newest.created)
    tree = repo.tree(put_all(repo, files))
    return repo.commit(tree, message=f"Latest: round {number}\n", author=by, when=when)


def extend(manifest: Manifest, record: Round) -> Manifest:
    """The manifest with one more round, from the last but one keyframe on.

    With two keyframes in it, whoever was a few rounds behind a new keyframe still finds the small
    updates that lead past it.
    """
    rounds = [*manifest.rounds, record]
    keyframes = [index for index, entry in enumerate(rounds) if entry.keyframe]
    start = keyframes[-2] if len(keyframes) > 1 else 0
    return Manifest(hub=manifest.hub, rounds=tuple(rounds[start:]))


def push_published(
    repo: HubRepo, state: HubState, built: Built, present: Mapping[str, str]
) -> None:
    """Publish a round at once: main, ``latest`` and all weights, or nothing.

    Args:
        repo: The store that holds the built round.
        state: The hub as it was when the round was made.
        built: The round.
        present: The hub's refs as they were then; a ref that moved since makes the push fail.

    Raises:
        PushRejected: Someone else published first; nothing changed.
    """
    updates = [
        RefUpdate(MAIN, built.main, built.parent),
        RefUpdate(state.refs.latest, built.latest, state.commit),
        *_weights(built, present),
    ]
    _push(repo, updates, built.record.round)


def push_proposed(repo: HubRepo, state: HubState, built: Built, present: Mapping[str, str]) -> None:
    """Offer a round for review on its own branch; main and ``latest`` stay as they are.

    Raises:
        PushRejected: The round of this number was published or proposed anew meanwhile.
    """
    number = built.record.round
    branch, prepared = round_branch(number), state.refs.next(number)
    updates = [
        # Does not move it, but demands that it has not moved: the weights' refs may be published.
        RefUpdate(state.refs.latest, state.commit, state.commit),
        RefUpdate(branch, built.main, present.get(branch)),
        RefUpdate(prepared, built.latest, present.get(prepared)),
        *_weights(built, present),
    ]
    _push(repo, updates, number)


def _weights(built: Built, present: Mapping[str, str]) -> list[RefUpdate]:
    return [RefUpdate(ref, new, present.get(ref)) for ref, new in built.weights.items()]


def _push(repo: HubRepo, updates: Sequence[RefUpdate], number: int) -> None:
    try:
        repo.push(updates)
    except PushRejected as error:
        raise PushRejected(
            f"another merge published first; this round {number} was not published.",
            hint="moshi-hub merge   (makes the next round from what is open now)",
            refs=error.refs,
        ) from error


def publish_proposed(
    repo: HubRepo,
    state: HubState,
    main: str,
    proposed: Proposed,
    metadata: Mapping[str, bytes],
    by: Author,
) -> None:
    """Publish a reviewed round: fast-forward main unless a forge already did, and move ``latest``.

    Args:
        repo: The store that holds the proposal.
        state: The hub as it stands.
        main: Commit of main.
        proposed: The round.
        metadata: Its complete metadata, signed on top of what the hub has now.
        by: Who makes the commit.

    Raises:
        HubError: Main has gone elsewhere since.
    """
    number, manifest = proposed.number, proposed.manifest
    latest = commit_latest(repo, manifest, {**proposed.files, **metadata}, by)
    # A proposal made anew meanwhile has moved ``prepared``, and the weights' refs with it.
    updates = [
        RefUpdate(state.refs.latest, latest, state.commit),
        RefUpdate(state.refs.next(number), None, proposed.latest),
    ]
    if not has_round(repo, main, manifest.newest):
        if proposed.branch is None or repo.parents(proposed.branch) != [main]:
            raise HubError(
                f"main has moved since round {number} was proposed.",
                hint="moshi-hub merge   (proposes it again on the new main)",
            )
        updates.append(RefUpdate(MAIN, proposed.branch, main))
    _push(repo, updates, number)
