"""A hub's history as its records tell it: names of refs, the manifest, the chain of rounds.

Reads and checks records; moves no weights (``moshi_fl.restore`` does) and keeps no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moshi_fl.errors import BadSignature, CorruptRecord, HubError, UntrustedHub
from moshi_fl.hubfile import MAX_HUBFILE_BYTES, HubConfig, parse_hubfile
from moshi_fl.records import Contribution, Manifest, Round, digest, dump, load
from moshi_fl.signed.files import MAX_METADATA_BYTES, METADATA_FILES
from moshi_fl.signing import CONTRIBUTION_NAMESPACE, MAX_SIGNATURE_BYTES, verify_signature
from moshi_fl.store import NO_HUB_THERE, HubRepo, RefMissing
from moshi_fl.weights import sha256_bytes

MAIN = "refs/heads/main"
ROUND_BRANCHES = "refs/heads/round/*"
PREFIXES = ("refs/moshi/", "refs/heads/moshi/")
"""Where weights may lie. The second is for hosts that take only branches and tags."""

MANIFEST_FILE = "manifest.json"
HUB_FILE = "hub.toml"
EVALUATORS_FILE = "trust/evaluators.json"
TOKENIZER_FILE = "tokenizer.json"
DELTA_FILE = "delta.safetensors"
MAX_CONTRIBUTION_BYTES = 16_384
MAX_MANIFEST_BYTES = 8 << 20
MAX_TOKENIZER_BYTES = 8 << 20
MAX_LATEST_PACK = 32 << 20
MAX_LATEST_FILES = 1000
SIGNED_FILES = (MANIFEST_FILE, HUB_FILE, TOKENIZER_FILE)
"""What the targets metadata signs."""
LOCAL_LATEST = "refs/moshi-fl/latest"


@dataclass(frozen=True)
class Refs:
    """Names of a hub's refs under its prefix."""

    prefix: str

    @property
    def latest(self) -> str:
        """The small manifest that a client fetches first."""
        return f"{self.prefix}latest"

    def keyframe(self, number: int) -> str:
        """All weights of a round."""
        return f"{self.prefix}keyframe/{number}"

    def update(self, number: int) -> str:
        """What leads from the round before to this one."""
        return f"{self.prefix}update/{number}"

    def delta(self, number: int, sha256: str) -> str:
        """One contribution's delta, made on that round; named by its own content."""
        return f"{self.prefix}delta/{number}/{sha256[:32]}"

    @property
    def intake(self) -> str:
        """In which order the open contributions were first seen."""
        return f"{self.prefix}intake"

    @property
    def upward(self) -> str:
        """What was sent last to the hub that this one began with."""
        return f"{self.prefix}upward"

    def archive(self, number: int) -> str:
        """The accepted deltas of a round whose update is a step; kept for audit."""
        return f"{self.prefix}archive/{number}"

    def evaluation(self, number: int, step: str) -> str:
        """A signed record of the evaluation of what shall become that round."""
        return f"{self.prefix}evaluation/{number}/{step}"

    def evidence(self, number: int) -> str:
        """All records of the evaluation that a round's verdicts follow from."""
        return f"{self.prefix}evidence/{number}"

    def pool(self, sha256: str) -> str:
        """A held-out pool that is no longer used, and therefore no longer secret."""
        return f"{self.prefix}pool/{sha256}"

    @property
    def sealed_pool(self) -> str:
        """The held-out pool in use, encrypted: for jobs that have its key."""
        return f"{self.prefix}sealed-pool"

    def next(self, number: int) -> str:
        """The ``latest`` of a proposed round, ready for the day it is published."""
        return f"{self.prefix}next/{number}"

    @property
    def next_root(self) -> str:
        """A change of the hub's keys that waits for signatures."""
        return f"{self.prefix}next/root"


def contribution_branch(number: int, contribution_id: str) -> str:
    """Branch of a contribution's record, made on that round."""
    return f"refs/heads/contribute/{number}/{contribution_id}"


def branch_place(branch: str) -> tuple[int, str] | None:
    """Round and id that a branch name states, or None when it is no contribution's branch."""
    parts = branch.removeprefix("refs/heads/").split("/")
    if len(parts) != 3 or parts[0] != "contribute":
        return None
    number, contribution_id = parts[1], parts[2]
    if (
        not (number.isascii() and number.isdigit() and len(number) < 10)
        or str(int(number)) != number
    ):
        return None
    if len(contribution_id) != 32 or not set(contribution_id) <= set("0123456789abcdef"):
        return None
    return int(number), contribution_id


def contribution_path(number: int, contribution_id: str) -> str:
    """Path of the record in the tree of its branch."""
    return f"contributions/{number:04d}/{contribution_id}.json"


def signature_beside(path: str) -> str:
    """Name of the signature of the record in this file."""
    return path.removesuffix(".json") + ".sig"


def signature_path(number: int, contribution_id: str) -> str:
    """Path of the record's signature, beside it."""
    return signature_beside(contribution_path(number, contribution_id))


def round_branch(number: int) -> str:
    """Branch of a proposed round: what a maintainer reviews."""
    return f"refs/heads/round/{number}"


def round_folder(number: int) -> str:
    """Folder of a round on main: its record, report, ledger and accepted contributions."""
    return f"rounds/{number:04d}"


def round_path(number: int) -> str:
    """Path of a round's record on main."""
    return f"{round_folder(number)}/round.json"


def ledger_path(number: int) -> str:
    """Path on main of a round's ledger."""
    return f"{round_folder(number)}/ledger.json"


def verdicts_path(number: int) -> str:
    """Path on main of the verdicts that a round is based on; the signature ends in ``.sig``."""
    return f"{round_folder(number)}/verdicts.json"


def accepted_path(number: int, contribution_id: str) -> str:
    """Path on main of a contribution's record that a round accepted."""
    return f"{round_folder(number)}/contributions/{contribution_id}.json"


def accepted_signature_path(number: int, contribution_id: str) -> str:
    """Path on main of that record's signature."""
    return signature_beside(accepted_path(number, contribution_id))


@dataclass(frozen=True)
class HubState:
    """All that the ``latest`` commit says, checked."""

    commit: str
    refs: Refs
    manifest: Manifest
    hubfile: str
    config: HubConfig
    tokenizer: bytes
    files: Mapping[str, bytes]
    """Those of the commit that mean something, metadata included, as they are."""

    @property
    def newest(self) -> Round:
        """The round that is the current global model."""
        return self.manifest.newest


def fetch_latest(repo: HubRepo, prefix: str | None = None) -> tuple[Refs, str]:
    """Fetch the hub's ``latest`` commit: one small request, whatever the hub's age.

    Args:
        repo: The store to fetch into.
        prefix: Where the hub's weights are known to lie; None looks in each of ``PREFIXES``.

    Returns:
        The hub's names of refs, and the commit. Nothing of it has been checked yet.

    Raises:
        HubError: Unreachable, or there is no hub at this URL.
    """
    for candidate in [prefix] if prefix else PREFIXES:
        refs = Refs(candidate)
        try:
            found = repo.fetch({refs.latest: LOCAL_LATEST}, max_bytes=MAX_LATEST_PACK)
        except RefMissing:
            continue
        return refs, found[LOCAL_LATEST]
    raise HubError(
        f"there is no moshi-fl hub at {repo.shown_url}: it has no {Refs(PREFIXES[0]).latest}.",
        hint=NO_HUB_THERE,
    )


def read_state(repo: HubRepo, refs: Refs, commit: str) -> HubState:
    """Read and check a ``latest`` commit that is in the local store; its signatures are not.

    Raises:
        UntrustedHub: Its parts contradict each other.
        CorruptRecord, ConfigError: A part is malformed.
    """
    return parse_state(read_latest(repo, commit), refs, commit)


def read_latest(repo: HubRepo, commit: str) -> dict[str, bytes]:
    """The files of a ``latest`` commit that mean something, each within its limit.

    Raises:
        CorruptRecord: One of the hub's own is missing, or one is no plain file or too large.
    """
    limits = dict.fromkeys(METADATA_FILES, MAX_METADATA_BYTES) | {
        MANIFEST_FILE: MAX_MANIFEST_BYTES,
        HUB_FILE: MAX_HUBFILE_BYTES,
        TOKENIZER_FILE: MAX_TOKENIZER_BYTES,
    }
    found = repo.read_listed(commit, limits, at_most=MAX_LATEST_FILES)
    for name in SIGNED_FILES:
        if name not in found:
            raise CorruptRecord(f"{commit} has no file {name!r}.")
    return found


def parse_state(files: Mapping[str, bytes], refs: Refs, commit: str) -> HubState:
    """What the files of a ``latest`` commit say, checked against each other.

    Raises:
        As for ``read_state``.
    """
    data, tokenizer = files[MANIFEST_FILE], files[TOKENIZER_FILE]
    hubfile = files[HUB_FILE].decode("utf-8", "replace")
    manifest = load(data, Manifest, name=MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    config = parse_hubfile(hubfile)
    check_chain(manifest.rounds)
    _check_state(manifest, config, refs, tokenizer)
    return HubState(commit, refs, manifest, hubfile, config, tokenizer, files)


def _check_state(manifest: Manifest, config: HubConfig, refs: Refs, tokenizer: bytes) -> None:
    ids = {config.hub.id, manifest.hub, *(record.hub for record in manifest.rounds)}
    if len(ids) != 1:
        raise UntrustedHub("the manifest mixes records of different hubs.")
    if config.hub.refs != refs.prefix:
        raise UntrustedHub(
            f"hub.toml says refs = {config.hub.refs!r}, but {refs.prefix!r} was used."
        )
    if manifest.rounds[0].keyframe is None:
        raise UntrustedHub(f"the manifest starts at round {manifest.rounds[0].round}: no keyframe.")
    if sha256_bytes(tokenizer) != manifest.newest.tokenizer:
        raise UntrustedHub(
            f"the tokenizer is not the one that round {manifest.newest.round} names."
        )


def check_chain(rounds: Sequence[Round]) -> None:
    """Insist that each round names the one before it by number and digest.

    Raises:
        UntrustedHub: The chain is broken; names the round.
    """
    for earlier, later in itertools.pairwise(rounds):
        if later.round != earlier.round + 1 or later.previous != digest(earlier):
            raise UntrustedHub(
                f"the chain of rounds is broken: round {later.round} does not follow "
                f"round {earlier.round} as recorded.",
                hint="ask the hub's maintainer; nothing was changed here",
            )
        if later.update is None:
            raise UntrustedHub(f"round {later.round} has no update.")


def read_rounds(repo: HubRepo, main: str, first: int, last: int) -> list[Round]:
    """Records of rounds ``first..last`` from a commit of main, in order, unchained."""
    numbers = range(first, last + 1)
    paths = [round_path(number) for number in numbers]
    found = repo.read_many(main, paths, limit=1 << 20)
    rounds = [load(data, Round, name=path) for path, data in zip(paths, found, strict=True)]
    for number, record in zip(numbers, rounds, strict=True):
        if record.round != number:
            raise UntrustedHub(f"{round_path(number)} is the record of round {record.round}.")
    return rounds


def read_contributions(repo: HubRepo, main: str, *records: Round) -> dict[str, Contribution]:
    """Records of these rounds' accepted contributions by id, from a commit of main.

    Raises:
        UntrustedHub: A record is not the one its id names.
    """
    places = [(record.round, merged.id) for record in records for merged in record.contributions]
    ids = [contribution_id for _, contribution_id in places]
    paths = [accepted_path(*place) for place in places]
    contributions = {}
    for path, data, wanted in zip(
        paths, repo.read_many(main, paths, limit=1 << 20), ids, strict=True
    ):
        contribution = load(data, Contribution, name=path)
        if contribution.id != wanted:
            raise UntrustedHub(f"{path} holds contribution {contribution.id}.")
        contributions[wanted] = contribution
    return contributions


def check_signature(contribution: Contribution, signature: bytes) -> None:
    """Insist that a contribution is signed by the key that it names.

    Raises:
        BadSignature: It is not.
        SigningError: ssh-keygen could not be asked.
    """
    armoured = signature.decode("ascii", "replace")
    verify_signature(dump(contribution), armoured, contribution.key, CONTRIBUTION_NAMESPACE)


def check_signatures(
    repo: HubRepo, main: str, record: Round, contributions: Mapping[str, Contribution]
) -> None:
    """Insist that each accepted contribution of a round is signed by the key that it names.

    Raises:
        UntrustedHub: One is not, or main does not have its signature; names it.
        SigningError: ssh-keygen could not be asked.
    """
    ids = [merged.id for merged in record.contributions]
    paths = [accepted_signature_path(record.round, contribution_id) for contribution_id in ids]
    try:
        found = repo.read_many(main, paths, limit=MAX_SIGNATURE_BYTES)
    except CorruptRecord as error:
        raise UntrustedHub(f"a signature of round {record.round} is missing: {error}") from error
    for contribution_id, signature in zip(ids, found, strict=True):
        try:
            check_signature(contributions[contribution_id], signature)
        except BadSignature as error:
            short = contribution_id[:12]
            raise UntrustedHub(f"contribution {short} is not signed by its key: {error}") from error


def first_rival(record: Round) -> int:
    """Number of the first round that can have taken another contribution to one of the bases."""
    return min((merged.base_round for merged in record.contributions), default=record.round) + 1


def check_one_per_key(record: Round, earlier: Iterable[Round]) -> None:
    """Insist that each key counts once in a round, and once for each base.

    Args:
        record: The round, whose owners are those of the records.
        earlier: The rounds from ``first_rival`` on; those that are no earlier are left aside.

    Raises:
        UntrustedHub: One counts twice; names it.
    """
    before = [entry for entry in earlier if entry.round < record.round]
    places = {(m.owner, m.base_round): entry.round for entry in before for m in entry.contributions}
    owners: set[str] = set()
    for merged in record.contributions:
        first = places.get((merged.owner, merged.base_round))
        if merged.owner in owners or first is not None:
            raise UntrustedHub(
                f"contribution {merged.id[:12]} is a second one of the key {merged.owner[:60]}: "
                f"round {record.round if first is None else first} has the first."
            )
        owners.add(merged.owner)
