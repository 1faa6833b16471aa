"""Removes from a hub what a published round has settled: branches, deltas, old weights.

Runs after publishing, in pushes of its own: a ref goes only if it still is what was judged, and
whatever goes wrong here harms no round. The next merge repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.errors import MoshiError
from moshi_fl.history import ROUND_BRANCHES, HubState, Refs
from moshi_fl.hubfile import StorageRules
from moshi_fl.records import Manifest
from moshi_fl.store import HubRepo, PushRejected, RefUpdate, is_local, local_path, tidy_hub
from moshi_hub.verify import Rules, Verdict

AT_A_TIME = 400
"""Refs deleted by one push: their names stand on a command line, whose length is limited."""


@dataclass(frozen=True)
class Settled:
    """Branches (with the commits that were judged) and deltas that nobody needs any more."""

    branches: Mapping[str, str]
    deltas: frozenset[str]
    waiting: frozenset[str]
    """Deltas of accepted contributions that wait for the next round."""


def settle(verdicts: Sequence[Verdict], branches: Mapping[str, str], waiting: set[str]) -> Settled:
    """What a round has settled.

    Args:
        verdicts: What the gate said of every open contribution.
        branches: Branch to the commit that was judged; only these are the hub's to delete.
        waiting: Ids of accepted contributions that the round did not take.
    """
    done, deltas, kept = {}, set(), set()
    for verdict in verdicts:
        record = verdict.contribution
        if record and (record.id in waiting or not verdict.is_settled):
            kept.add(record.delta.ref)
        elif verdict.is_settled:
            if verdict.branch in branches:
                done[verdict.branch] = branches[verdict.branch]
            deltas |= {record.delta.ref} if record else set()
    return Settled(done, frozenset(deltas), frozenset(kept))


def clean_up(repo: HubRepo, state: HubState, rules: Rules, settled: Settled) -> str:
    """Delete what is settled, and what the storage policy no longer keeps.

    Args:
        repo: The replica's store.
        state: The hub after publishing.
        rules: Rules of the round that was merged.
        settled: What that round settled.

    Returns:
        What went wrong, in words; empty when nothing did.
    """
    try:
        return _clean_up(repo, state, rules, settled)
    except MoshiError as error:  # the round is published: that the rest failed must not hide it
        return str(error)


def _clean_up(repo: HubRepo, state: HubState, rules: Rules, settled: Settled) -> str:
    present = repo.remote_refs(f"{state.refs.prefix}*", ROUND_BRANCHES)
    oldest = state.newest.round - rules.config.delta.max_staleness
    doomed = set(stale_refs(present, state.refs, rules.config.storage, state.manifest))
    doomed |= {ref for ref in present if _is_spent(ref, state.refs, settled, oldest)}
    updates = [RefUpdate(ref, None, commit) for ref, commit in settled.branches.items()]
    updates += [RefUpdate(ref, None, present[ref]) for ref in sorted(doomed)]
    parts = (updates[start : start + AT_A_TIME] for start in range(0, len(updates), AT_A_TIME))
    problems = [_remove(repo, part) for part in parts]
    if is_local(repo.url):
        tidy_hub(local_path(repo.url))
    return " ".join(filter(None, problems))


def _is_spent(ref: str, names: Refs, settled: Settled, oldest: int) -> bool:
    """Whether a delta's ref is settled, or too old for any contribution to name it."""
    number = ref.removeprefix(f"{names.prefix}delta/").split("/")[0]
    if not number.isdigit() or ref in settled.waiting:
        return False
    return ref in settled.deltas or int(number) < oldest


def stale_refs(
    refs: Mapping[str, str], names: Refs, rules: StorageRules, manifest: Manifest
) -> list[str]:
    """Refs that the storage policy no longer keeps, of those on the hub.

    Keyframes can be recomputed from the updates, so only the first and those in the manifest stay;
    proposals of rounds that are published go.
    """
    newest = manifest.newest.round
    wanted = {record.keyframe.ref for record in manifest.rounds if record.keyframe}
    first_kept = newest - rules.keep_rounds + 1 if rules.keep_rounds else 0
    first_kept = min(first_kept, manifest.rounds[0].round)
    stale = []
    for ref in refs:
        kind, _, number = ref.removeprefix(names.prefix).removeprefix("refs/heads/").partition("/")
        if kind == "evaluation":
            number = number.partition("/")[0]
        if not number.isdigit():
            continue
        keep = {
            "keyframe": ref in wanted or (int(number) == 0 and not rules.keep_rounds),
            "update": int(number) >= first_kept,
            "archive": int(number) >= first_kept,
            "evidence": int(number) >= first_kept,
            "evaluation": int(number) > newest,
            "next": int(number) > newest,
            "round": int(number) > newest,
        }
        if not keep.get(kind, True):
            stale.append(ref)
    return stale


def _remove(repo: HubRepo, updates: Sequence[RefUpdate]) -> str:
    """Delete refs; one that moved meanwhile stays and is named."""
    try:
        repo.push(updates)
    except PushRejected as error:
        rest = [update for update in updates if update.ref not in error.refs]
        again = _remove(repo, rest) if len(rest) < len(updates) else ""
        return f"moved meanwhile and kept: {', '.join(error.refs)}. {again}".strip()
    except MoshiError as error:
        return str(error)
    return ""
