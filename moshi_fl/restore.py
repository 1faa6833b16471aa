"""From a hub's refs to verified global weights: which bytes to fetch, and how to apply them.

Every file is compared with the manifest before it is decoded, and the result with the round's
digest before anyone sees it. Fetched objects live in a throw-away store, so nothing that a hub
sends stays unless it proved right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.aggregate import Strategy, Update, apply_step, get_strategy
from moshi_fl.aggregate.centers import median
from moshi_fl.aggregate.gram import norms
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import Delta
from moshi_fl.errors import CorruptRecord, HubError, UntrustedHub
from moshi_fl.records import Location, Merged, Round
from moshi_fl.rules import MEASURES_NORMS, Shapes, shapes_before_growth, shapes_of
from moshi_fl.snapshot import decode_keyframe, decode_step, grow
from moshi_fl.store import HubRepo
from moshi_fl.upstream import takes_upstream
from moshi_fl.weights import Weights, open_weights, save_weights, sha256_file, weights_digest

PACK_OVERHEAD = 1 << 20
SPARE_FILES = 256  # beside the deltas: libraries, pipes, the keyframe
StrategyFinder = Callable[[str, dict[str, bool | int | float | str]], Strategy]


@dataclass(frozen=True)
class Plan:
    """The cheapest way to a round: an optional keyframe, then updates in order."""

    keyframe: Round | None
    updates: tuple[Round, ...]

    @property
    def locations(self) -> list[Location]:
        """Everything to fetch, in the order of use."""
        first = [self.keyframe.keyframe] if self.keyframe and self.keyframe.keyframe else []
        return first + [record.update.location for record in self.updates if record.update]

    @property
    def bytes(self) -> int:
        """Bytes of all files to fetch."""
        return sum(location.bytes for location in self.locations)


def plan(
    rounds: Sequence[Round],
    target: int,
    have: int | None,
    present: Container[str] | None = None,
) -> Plan:
    """Choose what to fetch for the target round.

    Args:
        rounds: A checked chain of rounds that reaches the target.
        target: Number of the wanted round.
        have: Number of a round whose verified weights are at hand, if any.
        present: Refs that the hub still keeps; None when it surely keeps all of these rounds.

    Raises:
        HubError: The chain offers no way there.
    """
    by_number = {record.round: record for record in rounds}
    ways = [
        Plan(record, _updates(by_number, record.round + 1, target))
        for record in rounds
        if record.round <= target and record.keyframe is not None
    ]
    if have is not None and have <= target and have + 1 >= rounds[0].round:
        ways.append(Plan(None, _updates(by_number, have + 1, target)))
    if present is not None:
        ways = [way for way in ways if all(place.ref in present for place in way.locations)]
    if not ways:
        raise HubError(f"round {target} cannot be had: the hub no longer keeps what leads to it.")
    return min(ways, key=lambda way: way.bytes)


def _updates(by_number: dict[int, Round], first: int, last: int) -> tuple[Round, ...]:
    return tuple(by_number[number] for number in range(first, last + 1))


def fetch_locations(scratch: HubRepo, locations: Sequence[Location], folder: Path) -> list[Path]:
    """Fetch files into ``folder``, one sub-folder per location, each checked by size and hash.

    Raises:
        UntrustedHub: A ref, a file list, a size or a hash differs from the records.
    """
    if not locations:
        return []
    refs = {location.ref: f"refs/moshi-fl/{index}" for index, location in enumerate(locations)}
    expect = {location.ref: location.commit for location in locations}
    total = sum(location.bytes for location in locations)
    scratch.prepare()
    scratch.fetch(refs, max_bytes=total + total // 16 + PACK_OVERHEAD, expect=expect)
    folders = []
    for index, location in enumerate(locations):
        target = folder / str(index)
        target.mkdir(parents=True, exist_ok=True)
        extract(scratch, location, target)
        folders.append(target)
    return folders


def extract(repo: HubRepo, location: Location, folder: Path) -> None:
    """Write a fetched location's files into a folder, checking each against its record."""
    entries = {entry.path: entry for entry in repo.entries(location.commit)}
    if set(entries) != {file.name for file in location.files}:
        raise UntrustedHub(f"{location.ref}: its files are not those that the records name.")
    for file in location.files:
        entry = entries[file.name]
        if (entry.mode, entry.kind, entry.size) != ("100644", "blob", file.bytes):
            raise UntrustedHub(f"{location.ref}: {file.name} is not the recorded plain file.")
        path = folder / file.name
        with path.open("wb") as out:
            repo.stream(location.commit, entry, out, limit=file.bytes)
        if sha256_file(path) != file.sha256:
            raise UntrustedHub(f"{location.ref}: {file.name} does not have the recorded hash.")


def restore(
    scratch: HubRepo,
    way: Plan,
    base: Weights | None,
    out: Path,
    *,
    find_strategy: StrategyFinder = get_strategy,
) -> None:
    """Carry out a plan and write the target round's weights to ``out`` in one step.

    Args:
        scratch: A throw-away store for what is fetched; gone afterwards, whatever happens.
        way: The plan.
        base: Weights of the round before the first update, when the plan has no keyframe.
        out: The safetensors file to write.
        find_strategy: Looks up an aggregation strategy by name.

    Raises:
        UntrustedHub: Anything fetched or computed differs from the records.
    """
    folder = scratch.path.with_suffix(".files")
    try:
        folders = fetch_locations(scratch, way.locations, folder)
        weights = base
        if way.keyframe:
            weights = _open_keyframe(way.keyframe, folders.pop(0), folder / "keyframe.safetensors")
        if weights is None:
            raise ValueError("a plan without a keyframe needs a base")
        for record, files in zip(way.updates, folders, strict=True):
            weights = advance(weights, record, files, find_strategy)
            check_digest(weights, record)
        save_weights(out, weights)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        scratch.drop()


def _open_keyframe(record: Round, files: Path, out: Path) -> Weights:
    try:
        decode_keyframe(files, out, parameters=record.parameters)
    except CorruptRecord as error:
        raise UntrustedHub(f"the keyframe of round {record.round}: {error}") from error
    weights = open_weights(out)
    check_digest(weights, record)
    return weights


def check_digest(weights: Weights, record: Round) -> None:
    """Insist that these are the weights of that round."""
    if (found := weights_digest(weights)) != record.weights:
        raise UntrustedHub(
            f"round {record.round} does not give the weights it promises "
            f"(digest {found[:12]}…, recorded {record.weights[:12]}…).",
            hint="moshi-fl audit   (finds the round at which the hub's records stop being true)",
        )


def advance(
    weights: Weights, record: Round, files: Path, find_strategy: StrategyFinder = get_strategy
) -> Weights:
    """Apply one round's update to the weights of the round before. Does not check the digest.

    Args:
        weights: Weights of round ``record.round - 1``.
        record: The round to reach.
        files: Folder with the files of ``record.update``.
        find_strategy: Looks up an aggregation strategy by name.
    """
    if record.update is None:
        raise UntrustedHub(f"round {record.round} has no update.")
    try:
        if takes_upstream(record):  # the other hub has trained the new rows: the step covers them
            return decode_step(grown(weights, record), files)
        if record.update.kind == "step":
            weights = decode_step(weights, files)
        else:
            weights = aggregate(weights, record, files, find_strategy)
    except CorruptRecord as error:
        raise UntrustedHub(f"round {record.round}: {error}") from error
    return grown(weights, record)


def grown(weights: Weights, record: Round) -> Weights:
    """The weights with the rows that a round's growth of the vocabulary appends."""
    if record.growth is None:
        return weights
    characters, first = record.growth.characters, record.growth.byte_row
    return grow(weights, record.vocabulary_tensors, characters, first)


def aggregate(
    weights: Weights, record: Round, files: Path, find_strategy: StrategyFinder = get_strategy
) -> Weights:
    """Aggregate a round's contributions, as ``record`` weighs them, into new weights.

    ``files`` holds one delta per contribution, named ``<id>.safetensors``.
    """
    strategy = record.strategy
    if strategy is None or record.update is None:
        raise UntrustedHub(f"round {record.round} does not say how it was aggregated.")
    deltas = open_deltas(record, files, shapes_of(weights))
    step = find_strategy(strategy.name, strategy.options).aggregate(deltas, shapes_of(weights))
    return apply_step(weights, step, strategy.server_learning_rate)


def median_norm(weights: Weights, record: Round, files: Path) -> float | None:
    """Median norm of a round's deltas; None where its strategy does not go by it.

    Args:
        weights: Weights of the round before.
        record: The round.
        files: One delta per contribution, named ``<id>.safetensors``.
    """
    if record.strategy is None or record.strategy.name not in MEASURES_NORMS:
        return None
    return median(norms(open_deltas(record, files, shapes_of(weights))))


def open_deltas(record: Round, files: Path, shapes: Shapes) -> list[Update]:
    """Open a round's deltas for aggregation, each against the shapes of its own base."""
    if record.update is None:
        return []
    codec = get_codec(record.update.codec, record.update.codec_options)
    allow_open_files(len(record.contributions))
    deltas = []
    for merged in record.contributions:
        path = files / delta_name(merged)
        own = shapes_before_growth(shapes, record.vocabulary_tensors, merged.missing_rows)
        deltas.append(Update(merged.id, merged.weight, Delta.open(path, own, codec)))
    return deltas


def allow_open_files(count: int) -> None:
    """Raise the limit of open files, where there is one: each delta stays open while it counts."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if resource.RLIM_INFINITY != soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def delta_name(merged: Merged) -> str:
    """File name of a contribution's delta among a round's files."""
    return f"{merged.id}.safetensors"
