"""This machine's verified copy of one hub: cached rounds, and what was seen of its history.

A replica never goes back: a hub whose newest round is older than one seen before, or whose history
differs from it, is refused, and the cached rounds stay as they are. Weights appear under their
round's name in one step, so a reader never sees half a model.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from moshi_fl.errors import CorruptRecord, HubError, MoshiError, UntrustedHub
from moshi_fl.history import (
    MAIN,
    SIGNED_FILES,
    HubState,
    Refs,
    check_chain,
    fetch_latest,
    parse_state,
    read_latest,
    read_rounds,
    read_state,
)
from moshi_fl.policy import NO_DEMANDS, Policy
from moshi_fl.records import (
    Count,
    HubId,
    Oid,
    Record,
    Round,
    RoundNumber,
    Sha256,
    digest,
    dump,
    load,
)
from moshi_fl.restore import Plan, plan, restore
from moshi_fl.signed.files import Trust, TrustFolder, find_root, pinned
from moshi_fl.store import HubRepo, normalise_url, redact
from moshi_fl.store.failures import disk_errors
from moshi_fl.strategies import find_strategy
from moshi_fl.text import Size
from moshi_fl.weights import Weights, open_weights, weights_digest, write_atomic

MAX_MAIN_PACK = 1 << 30
ADVICE = "ask the hub's maintainer; your cached rounds are untouched"


class Seen(Record, frozen=True, kw_only=True):
    """The newest round that this machine verified, so that the hub cannot take it back."""

    format: Literal[1] = 1
    kind: Literal["seen"] = "seen"
    hub: HubId
    prefix: Annotated[str, Meta(max_length=60)]
    commit: Oid
    round: RoundNumber
    record: Sha256
    checked: Count
    expires: Count


@dataclass(frozen=True)
class Snapshot:
    """A verified round on this machine.

    Attributes:
        state: What the hub's ``latest`` said when it was last seen.
        record: The round's record.
        path: Its weights, a safetensors file.
        checked: When the hub was last asked, in seconds since 1970.
        online: Whether the hub answered this time.
        problem: Why it did not; empty when it did.
        received: Bytes of weights fetched this time.
        root: Fingerprint of the root of trust by which the hub's signatures are judged.
        first_contact: Whether that root was taken as offered, just now.
    """

    state: HubState
    record: Round
    path: Path
    checked: float
    online: bool
    received: int = 0
    problem: str = ""
    root: str = ""
    first_contact: bool = False

    @property
    def round(self) -> int:
        """Number of the round."""
        return self.record.round

    def load(self) -> Weights:
        """Memory-map the weights after comparing them with the round's digest."""
        weights = open_weights(self.path)
        if weights_digest(weights) != self.record.weights:
            raise CorruptRecord(
                f"{self.path} is damaged: it is not round {self.round}.",
                hint=f"rm {self.path}   (the next sync fetches it again)",
            )
        return weights


def hub_folder(home: Path, url: str) -> Path:
    """Where a hub's replica lies: readable, and distinct for distinct hubs, whatever the login."""
    url = redact(url)
    tail = re.sub(r"[^A-Za-z0-9]+", "-", url.rstrip("/").removesuffix(".git").split("/")[-1])
    return (
        home
        / "hubs"
        / f"{tail.strip('-') or 'hub'}-{hashlib.sha256(url.encode()).hexdigest()[:10]}"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Replica:
    """A local copy of one hub.

    Args:
        url: Path or URL of the hub.
        home: Folder of this user's moshi-fl data.
        keep_rounds: How many rounds' weights to keep.
        timeout: Seconds after which one Git operation is given up.
        root: Fingerprint that a root of the hub must have; empty to trust the first one offered.
        even_expired: Accept signatures that have expired; for maintainers, who renew them.
        policy: What the user demands of a round beyond that.
        attestations: Counts a round's agreeing attestations of others than the hub; asked only
            when the policy wants to know. Without it there are none.
    """

    def __init__(
        self,
        url: str,
        home: Path,
        *,
        keep_rounds: int = 2,
        timeout: float = 600.0,
        root: str = "",
        even_expired: bool = False,
        policy: Policy = NO_DEMANDS,
        attestations: Callable[[Replica, Round], int] | None = None,
    ) -> None:
        self.url = normalise_url(url)
        self.home, self.root, self.even_expired = home, root, even_expired
        self.policy, self._attestations = policy, attestations
        self.folder = hub_folder(home, self.url)
        self.keep_rounds = max(1, keep_rounds)
        self.timeout = timeout
        self.repo = HubRepo(self.folder / "git", self.url, timeout=timeout)
        self.trust = TrustFolder(self.folder / "trust")

    def beside(self, url: str) -> Replica:
        """The copy of another hub, whose server is not shown the token for this one's."""
        other = Replica(url, self.home)
        path, timeout = other.repo.path, other.timeout
        other.repo = HubRepo(path, other.url, timeout=timeout, token_for=self.url)
        return other

    def pull(self, number: int | None = None) -> Snapshot:
        """Ask the hub and bring a round here: a cold start, an update, or nothing to do.

        Args:
            number: The wanted round; the newest when None.

        Raises:
            HubError: The hub cannot be reached, or does not have that round.
            StaleHub: Its signatures have expired.
            UntrustedHub: It is not signed by whom this machine trusts, went back, or contradicts
                its records.
        """
        with self._locked():
            state, trust = self._look()
            if number is not None and number != state.newest.round:
                return self._pull_old(state, trust, number)
            self._check_policy(state.newest)
            received = self._ensure(state.newest, state.manifest.rounds)
            self._remember(state, trust)
            self._prune()
            return self._snapshot(state, trust, state.newest, received)

    def look(self) -> HubState:
        """Ask the hub for its newest state and check it against what was seen; no weights.

        Raises:
            HubError, StaleHub, UntrustedHub: As for ``pull``.
        """
        with self._locked():
            return self._look()[0]

    def cached(self) -> Snapshot | None:
        """The newest verified round on this machine, if any; the hub is not asked.

        Raises:
            UntrustedHub: What was verified goes back to another root than the one demanded.
        """
        seen = self.seen()
        if seen and self.root and not self.trust.knows(self.root):
            raise UntrustedHub(
                f"{self.repo.shown_url} was verified by the root {self.trust.root()}, "
                f"not by the one demanded ({self.root}).",
                hint=f"rm -r {self.folder}   (forgets what was verified by the other root)",
            )
        if seen is None or not self.weights_path(seen.round).exists():
            return None
        try:
            state = read_state(self.repo, Refs(seen.prefix), seen.commit)
        except (HubError, CorruptRecord):
            return None
        path = self.weights_path(seen.round)
        root = self.trust.root()
        return Snapshot(state, state.newest, path, seen.checked, online=False, root=root)

    def seen(self) -> Seen | None:
        """What was last verified."""
        try:
            return load((self.folder / "seen.json").read_bytes(), Seen, name="seen.json")
        except FileNotFoundError:
            return None

    def forget(self) -> None:
        """Delete this copy and all that was seen; for whoever makes a new hub at an old address."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def fetch_main(self) -> str:
        """Fetch main (small text only) and return its commit, checked against what was seen."""
        local, offered = "refs/moshi-fl/main", "refs/moshi-fl/offered"
        with self.repo.lock():
            before = self.repo.resolve(local)
            main = self.repo.fetch({MAIN: offered}, max_bytes=MAX_MAIN_PACK)[offered]
            if before and not self.repo.is_ancestor(before, main):
                raise UntrustedHub(
                    f"the hub's main was rewound: {before[:10]} is no longer part of its history.",
                    hint=ADVICE,
                )
            self.repo.set_ref(local, main)
        return main

    def weights_path(self, number: int) -> Path:
        """File of a round's weights, whether it exists or not."""
        return self.folder / "weights" / f"{number:06d}.safetensors"

    def rounds_at_hand(self) -> list[int]:
        """Numbers of the rounds whose weights are on this machine, ascending."""
        return sorted(int(path.stem) for path in self.weights_path(0).parent.glob("*.safetensors"))

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for one piece of work; gone afterwards, or when the next process finds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"work-{os.getpid()}-", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[HubRepo]:
        """A throw-away store beside the replica's own."""
        with self.workspace() as folder:
            yield self.repo.beside(folder / "git")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.repo.prepare()
        with self.repo.lock():
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        patterns = (".tmp-*-*", "[!g]*/.tmp-*-*", "[!g]*/*/.tmp-*-*")  # git/ has its own ways
        files = (path for pattern in patterns for path in self.folder.glob(pattern))
        for stale in (*self.folder.glob("work-*-*"), *files):
            if _alive(int(stale.name.split("-")[1])):
                continue
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)

    def _look(self) -> tuple[HubState, Trust]:
        seen = self.seen()
        refs, commit = fetch_latest(self.repo, seen.prefix if seen else None)
        try:
            files = read_latest(self.repo, commit)
            trust = self._known(seen, commit) or self._verify(files)
            state = parse_state(files, refs, commit)
        except CorruptRecord as error:
            raise UntrustedHub(
                f"{self.repo.shown_url} offers a model that cannot be used: {error}", hint=ADVICE
            ) from error
        if seen and seen.commit != commit:
            self._check_continuity(seen, state)
        with disk_errors(self.folder):
            self.trust.keep(trust.metadata)
        return state, trust

    def _check_policy(self, record: Round) -> None:
        if self.policy.asks_evidence:
            found = self._attestations(self, record) if self._attestations else 0
            self.policy.check(record, found)

    def _known(self, seen: Seen | None, commit: str) -> Trust | None:
        """What verifying this commit has shown before, if it was and nothing has expired since."""
        if seen is None or seen.commit != commit:
            return None
        files = self.trust.load()
        root = pinned(files)
        expired = time.time() >= seen.expires and not self.even_expired
        if not root or expired or (self.root and not find_root(files, self.root)):
            return None
        return Trust({}, root, first_contact=False, expires=seen.expires)

    def _verify(self, files: Mapping[str, bytes]) -> Trust:
        from moshi_fl.signed.client import Offer, verify  # loads TUF: only for what is new

        offer = Offer(
            hub=self.repo.shown_url,
            files=files,
            targets=SIGNED_FILES,
            replica=self.folder,
            pin=self.root,
            even_expired=self.even_expired,
        )
        with disk_errors(self.folder), self.workspace() as folder:
            return verify(offer, self.trust.load(), folder)

    def _check_continuity(self, seen: Seen, state: HubState) -> None:
        if state.config.hub.id != seen.hub:
            raise UntrustedHub(
                f"{self.repo.shown_url} is another hub than before "
                f"({state.config.hub.id}, was {seen.hub}).",
                hint=f"rm -r {self.folder}   (forgets the old one, if this is what you expect)",
            )
        if state.newest.round < seen.round:
            raise UntrustedHub(
                f"the hub was rewound: it offers round {state.newest.round}, "
                f"but round {seen.round} was already seen.",
                hint=ADVICE,
            )
        if self._digest_of(seen.round, state) != seen.record:
            raise UntrustedHub(
                f"the hub rewrote its history: round {seen.round} is not the one seen before.",
                hint=ADVICE,
            )

    def _digest_of(self, number: int, state: HubState) -> str:
        first = state.manifest.rounds[0]
        if number < first.round - 1:
            chain = self.chain(state, number)
            return digest(chain[0])
        if number == first.round - 1:
            return first.previous or ""
        return digest(state.manifest.rounds[number - first.round])

    def chain(self, state: HubState, first: int) -> list[Round]:
        """Checked records of all rounds from ``first`` to the newest; reads main where needed."""
        rounds = list(state.manifest.rounds)
        if first >= rounds[0].round:
            return rounds[first - rounds[0].round :]
        earlier = read_rounds(self.repo, self.fetch_main(), first, rounds[0].round - 1)
        check_chain(earlier + rounds)
        return earlier + rounds

    def _pull_old(self, state: HubState, trust: Trust, number: int) -> Snapshot:
        if number > state.newest.round:
            raise HubError(
                f"round {number} does not exist: the newest is {state.newest.round}.",
                hint=f"--round {state.newest.round} or less; without it, the newest",
            )
        rounds = list(state.manifest.rounds)
        if number < rounds[0].round:
            rounds = self.chain(state, 0)
        record = rounds[number - rounds[0].round]
        self._check_policy(record)
        present = self.repo.remote_refs(f"{state.refs.prefix}*")
        received = self._ensure(record, rounds, present)
        return self._snapshot(state, trust, record, received)

    def _ensure(
        self, record: Round, rounds: Sequence[Round], present: Container[str] | None = None
    ) -> int:
        path = self.weights_path(record.round)
        if path.exists():
            return 0
        have = self._usable_base(record, rounds)
        way = plan(rounds, record.round, have, present)
        self._require_room(way, record)
        base = open_weights(self.weights_path(have)) if have is not None else None
        with self.scratch() as scratch:
            start = None if way.keyframe else base
            restore(scratch, way, start, path, find_strategy=find_strategy)
        return way.bytes

    def _require_room(self, way: Plan, record: Round) -> None:
        """Refuse before the first byte what cannot fit: files twice (packed, plain), weights."""
        weights = 4 * record.parameters
        needed = 2 * way.bytes + weights * (2 if way.keyframe else 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise MoshiError(
                f"no room for round {record.round}: it takes {Size(needed)}, "
                f"{self.folder} has {Size(free)} left.",
                hint="Make room there, or set MOSHI_FL_HOME to a folder on a larger disk.",
            )

    def _usable_base(self, record: Round, rounds: Sequence[Round]) -> int | None:
        by_number = {entry.round: entry.weights for entry in rounds}
        for number in reversed(self.rounds_at_hand()):
            if number > record.round or number + 1 < rounds[0].round:
                continue
            wanted = by_number.get(number)
            path = self.weights_path(number)
            if wanted is None or weights_digest(open_weights(path)) == wanted:
                return number
            path.unlink()
        return None

    def _snapshot(self, state: HubState, trust: Trust, record: Round, received: int) -> Snapshot:
        return Snapshot(
            state,
            record,
            self.weights_path(record.round),
            time.time(),
            online=True,
            received=received,
            root=trust.root,
            first_contact=trust.first_contact,
        )

    def _remember(self, state: HubState, trust: Trust) -> None:
        seen = Seen(
            hub=state.config.hub.id,
            prefix=state.refs.prefix,
            commit=state.commit,
            round=state.newest.round,
            record=digest(state.newest),
            checked=int(time.time()),
            expires=trust.expires,
        )
        self.repo.set_ref("refs/moshi-fl/seen", state.commit)
        write_atomic(self.folder / "seen.json", dump(seen))

    def _prune(self) -> None:
        for number in self.rounds_at_hand()[: -self.keep_rounds]:
            self.weights_path(number).unlink(missing_ok=True)
