"""Hostile contributors: what they cost the default, in real federations and on a real hub.

The engine and the attacks are those of ``benchmarks.attacks``; ``make bench`` plays them for longer
and against every strategy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.attacks.defences import Alone, Sent
from benchmarks.attacks.files import BROKEN, Honest
from benchmarks.attacks.table import ACCEPTANCE, BACKDOOR, DEFAULT, Cell, play
from benchmarks.attacks.threats import THREATS, Scene, Threat
from benchmarks.attacks.world import MODEL, SHORT, World
from moshi_fl.aggregate import apply_step
from moshi_fl.codec import get_codec
from moshi_fl.rules import shapes_of
from moshi_fl.strategies import find_strategy
from moshi_fl.weights import Weights
from moshi_sdk.audit import Auditor
from tests.support.simulator import HubSimulator, random_delta

BY_NAME = {threat.name: threat for threat in THREATS}
KEPT = {"codec": "topk", "options": {"keep": 1024}}


@pytest.fixture(scope="module")
def world() -> World:
    return World(SHORT)


@pytest.fixture(scope="module")
def clean(world: World) -> Cell:
    """Nobody is hostile, and everything is averaged."""
    return play(world, "fedavg")


def hostile(*names: str, slow: bool = False) -> list:
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(BY_NAME[name], id=name, marks=marks) for name in names]


QUICK = hostile("sign flip", "scaling x100", "IPM, 10", "ALIE, z = 1.5", "label flip")
QUICK += hostile("free-rider, zero", "Sybil copies")
SLOW = hostile("IPM, 0.5", "Gaussian noise", "backdoor", "backdoor x n/f", slow=True)
SLOW += hostile("free-rider, replay", "stale base", slow=True)


def test_every_attack_is_tested() -> None:
    assert {param.values[0].name for param in QUICK + SLOW} == set(BY_NAME)


@pytest.mark.parametrize("threat", QUICK + SLOW)
def test_three_of_ten_cost_the_default_almost_nothing(
    world: World, clean: Cell, threat: Threat
) -> None:
    attacked = play(world, DEFAULT, threat, 3).run
    assert attacked.loss <= clean.run.loss + threat.allowed
    assert attacked.backdoor is None or attacked.backdoor < BACKDOOR


@pytest.mark.parametrize("threat", hostile("scaling x100", "IPM, 10"))
def test_the_same_attacks_ruin_a_plain_mean(world: World, clean: Cell, threat: Threat) -> None:
    assert play(world, "fedavg", threat, 3).run.loss > clean.run.loss + 0.1


def test_honest_contributors_are_taken(world: World) -> None:
    run = play(world, DEFAULT).run
    assert run.honest_sent == 20
    assert run.acceptance >= ACCEPTANCE


# The same on a real hub: a bare repository, signed branches, `merge` with the default strategy.


def honest_file(hub: HubSimulator) -> Honest:
    snapshot = hub.person("eve").pull()
    rules, base = snapshot.state.config.delta, snapshot.load()
    delta = random_delta(base, seed=99)
    return Honest(delta, get_codec(rules.codec, rules.options), shapes_of(base))


def test_every_broken_file_is_refused_by_name_and_holds_up_nobody(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, model=MODEL, delta=KEPT)
    ann = hub.contribute("ann")
    honest = honest_file(hub)
    sent = {}
    for number, broken in enumerate(BROKEN):
        data = broken.make(honest)
        record = hub.contribute(f"eve{number}", seed=2, mutate=lambda _, data=data: data)
        sent[record.id] = broken
    outcome = hub.merge()
    verdicts = {v.contribution.id: v for v in outcome.open_round.verdicts if v.contribution}
    found = {broken.name: verdicts[i].findings[0].code for i, broken in sent.items()}
    assert found == {broken.name: broken.code for broken in BROKEN}
    assert [merged.id for merged in outcome.proposal.record.contributions] == [ann.id]
    assert outcome.leftovers == ""


def test_what_is_old_is_refused(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    first = hub.person("eve").pull()
    old = random_delta(first.load(), seed=5)
    hub.contribute("ann", delta=old)
    hub.merge()
    hub.contribute("eve", delta=old)
    assert hub.codes() == ["replay"]
    hub.rounds(3)
    hub.contribute("eve", seed=6, on=first)
    assert hub.codes() == ["stale-base"]


def test_copies_under_other_names_count_once(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path)
    base = hub.person("eve").pull().load()
    work, noise = random_delta(base, seed=5), random_delta(base, seed=6, scale=1e-5)
    for number in range(3):
        almost = {name: work[name] + number * noise[name] for name in work}
        hub.contribute(f"eve{number}", delta=almost)
    outcome = hub.merge()
    codes = [v.findings[0].code for v in outcome.open_round.verdicts if not v.accepted]
    assert codes == ["copy", "copy"]
    assert len(outcome.proposal.record.contributions) == 1


class Story:
    """A hub whose contributors really train, some of them for harm."""

    def __init__(self, folder: Path, world: World) -> None:
        self.hub = HubSimulator(folder, model=MODEL, delta=KEPT)
        self.world, self.number = world, 0
        start = self.hub.person("teacher").pull().load()
        head_start = {name: world.start[name] - start[name] for name in start}
        self.hub.contribute("teacher", delta=head_start)
        self.hub.merge()

    def weights(self) -> Weights:
        return self.hub.sync().load()

    def round(self, honest: int, threats: list[Threat]) -> Weights:
        """One round on the hub; what averaging the honest alone would have given."""
        self.number += 1
        base = {name: np.array(array) for name, array in self.weights().items()}
        deltas = [self.world.trained(base, client, self.number) for client in range(honest)]
        files = [self.world.encoded(delta) for delta in deltas]
        known = tuple(self.world.decoded(data) for data in files)
        places = tuple(range(10 - len(threats), 10))
        scene = Scene(self.world, self.number, base, known, places, {})
        for client, delta in enumerate(deltas):
            self.hub.contribute(f"honest{client}", delta=delta, seed=client)
        for client, threat in zip(places, threats, strict=True):
            self.send(client, threat.send(scene, client))
        self.hub.merge()
        sent = [Sent(client, data) for client, data in enumerate(files)]
        return apply_step(base, Alone(self.world, "fedavg").decide(1, base, sent).step)

    def send(self, client: int, what: Weights | bytes) -> None:
        name = f"hostile{client}"
        if isinstance(what, bytes):
            self.hub.contribute(name, seed=client, mutate=lambda _: what)
        else:
            self.hub.contribute(name, seed=client, delta=what)

    def audit(self) -> list[bool | None]:
        auditor = Auditor(self.hub.person("auditor"), find_strategy=find_strategy)
        return [found.identical for found in auditor.audit(1, self.number + 1)]


@pytest.mark.slow
def test_seven_honest_outvote_three_hostile_on_a_real_hub(tmp_path: Path, world: World) -> None:
    story = Story(tmp_path, world)
    threats = [BY_NAME[name] for name in ("IPM, 10", "label flip", "backdoor x n/f")]
    for _ in range(2):
        wanted = story.round(7, threats)
        assert world.loss(story.weights()) <= world.loss(wanted) + 0.03
    assert story.audit() == [True] * 3


@pytest.mark.slow
def test_each_attack_in_turn_stops_no_hub(tmp_path: Path, world: World) -> None:
    story = Story(tmp_path, world)
    for threat in THREATS:
        before = world.loss(story.weights())
        wanted = story.round(3, [threat])
        assert world.loss(story.weights()) <= max(world.loss(wanted), before) + threat.allowed
    assert set(story.audit()) == {True}
