"""The hub as found: the newest round, and every open contribution judged by the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moshi_fl.history import HUB_FILE
from moshi_fl.hubfile import MAX_HUBFILE_BYTES, HubConfig, parse_hubfile
from moshi_fl.records import Contribution, Intake
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.rules import shapes_of
from moshi_fl.signing import check_ssh_keygen
from moshi_fl.store import HubRepo
from moshi_hub.collect import judge, known_deltas, known_keys, make_rules
from moshi_hub.intake import Arrivals, arrivals
from moshi_hub.offers import Offers, open_offers
from moshi_hub.verify import Rules, Verdict


@dataclass(frozen=True)
class OpenRound:
    """The hub as found, and every submission judged."""

    snapshot: Snapshot
    main: str
    rules: Rules
    verdicts: tuple[Verdict, ...]
    branches: Mapping[str, str]
    """The hub's own branches among them, with their commits."""
    arrivals: Arrivals
    offers: Offers

    @property
    def accepted(self) -> list[Contribution]:
        """Contributions that passed the gate, in order of id."""
        return sorted(self.intake, key=lambda contribution: contribution.id)

    @property
    def intake(self) -> list[Contribution]:
        """Contributions that passed the gate, in the order in which they were judged."""
        return [v.contribution for v in self.verdicts if v.accepted and v.contribution]

    @property
    def signatures(self) -> dict[str, bytes]:
        """Signature of each accepted contribution's record, by id."""
        accepted = (v for v in self.verdicts if v.accepted)
        return {v.contribution.id: v.signature for v in accepted if v.contribution}


def look(replica: Replica, folder: Path, head: str = "") -> OpenRound:
    """Bring the newest round here and judge all open contributions.

    Args:
        replica: The hub's copy on this machine.
        folder: Working folder; the deltas are left in ``folder/deltas``.
        head: Judge only what has this commit as its head now. Who came first is not asked then.

    Raises:
        HubError: The hub cannot be reached, or is not to be trusted.
        SigningError: There are signatures to check, and no ssh-keygen that can.
    """
    replica.repo.prepare()
    refs = replica.repo.remote_refs()
    snapshot = replica.pull()
    main = replica.fetch_main()
    config = settings_on(replica.repo, main)
    rules = rules_of(replica, snapshot, main, config)
    offers, names = open_offers(replica, refs, head), snapshot.state.refs
    branches = offers.branches
    if branches:
        check_ssh_keygen()  # else it would look as if nobody had signed
    came = Arrivals(Intake(hub=config.hub.id, seen=()), tuple(branches))
    if not head:
        came = arrivals(replica, config.hub.id, names, refs, branches)
    deltas = folder / "deltas"
    deltas.mkdir(parents=True)
    with replica.scratch() as scratch:
        verdicts = tuple(judge(offers.places, scratch, main, rules, deltas, came.order))
    return OpenRound(snapshot, main, rules, verdicts, offers.on(replica.repo), came, offers)


def settings_on(repo: HubRepo, main: str) -> HubConfig:
    """The hub's settings as main has them now."""
    text = repo.read(main, HUB_FILE, limit=MAX_HUBFILE_BYTES).decode("utf-8", "replace")
    return parse_hubfile(text)


def rules_of(replica: Replica, snapshot: Snapshot, main: str, config: HubConfig) -> Rules:
    """Rules of the open round."""
    first = max(0, snapshot.round - config.delta.max_staleness)
    rounds = replica.chain(snapshot.state, first)
    seen = known_deltas(replica, main, snapshot.record)
    taken = known_keys(replica, main, rounds[1:])
    shapes = shapes_of(snapshot.load())
    return make_rules(config, snapshot.state.refs, rounds, shapes, seen, taken)
