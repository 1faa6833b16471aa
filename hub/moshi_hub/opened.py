"""The hub as found: the newest round, and every open contribution judged by the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moshi_fl.history import HUB_FILE
from moshi_fl.hubfile import MAX_HUBFILE_BYTES, HubConfig, parse_hubfile
from moshi_fl.records import Contribution, Intake
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.rules import shapes_of
from moshi_fl.signing import check_ssh_keygen
from moshi_fl.store import HubRepo
from moshi_hub.collect import judge, known_deltas, known_keys, make_rules, rivals
from moshi_hub.intake import Arrivals, arrivals, recorded_order
from moshi_hub.offers import Offers, open_offers
from moshi_hub.trained import trained_parts
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

    @cached_property
    def trained(self) -> dict[str, str]:
        """What of the model each contribution changes whose delta could be read, by id."""
        carried = {v.contribution.id: v.carried for v in self.verdicts if v.contribution}
        return trained_parts(self.rules.config, self.snapshot.state.tokenizer, carried)


def look(replica: Replica, folder: Path, head: str = "") -> OpenRound:
    """Bring the newest round here and judge all open contributions.

    Args:
        replica: The hub's copy on this machine.
        folder: Working folder; the deltas are left in ``folder/deltas``.
        head: Judge only what has this commit as its head now; what its repository has open by the
            same key counts. Who came first is what the hub records, not what this machine has seen.

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
    if offers.places:
        check_ssh_keygen()  # else it would look as if nobody had signed
    if head:
        order = recorded_order(replica, config.hub.id, names, refs, offers.beside)
        order = _with_rivals(offers, main, rules, order)
        came = Arrivals(Intake(hub=config.hub.id, seen=()), order)
    else:
        came = arrivals(replica, config.hub.id, names, refs, offers.branches)
    deltas = folder / "deltas"
    deltas.mkdir(parents=True)
    with replica.scratch() as scratch:
        judged = judge(offers.beside, scratch, main, rules, deltas, came.order)
        verdicts = tuple(verdict for verdict in judged if verdict.branch in offers.places)
    return OpenRound(snapshot, main, rules, verdicts, offers.on(replica.repo), came, offers)


def _with_rivals(offers: Offers, main: str, rules: Rules, order: Sequence[str]) -> tuple[str, ...]:
    """What is asked for, and what may take its place: nothing else needs to be judged for it."""
    wanted = set(offers.places)
    for branch in offers.places:
        wanted.update(rivals(offers.beside, main, rules, branch, order))
    return tuple(branch for branch in order if branch in wanted)


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
