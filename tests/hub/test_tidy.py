"""A hub in a folder stays tidy by itself."""

from __future__ import annotations

from moshi_fl.store import tidy_hub
from tests.support.simulator import HubSimulator


def packs(hub: HubSimulator) -> int:
    return len(list((hub.path / "objects" / "pack").glob("*.pack")))


def test_many_packs_become_few_and_nothing_is_lost(hub: HubSimulator) -> None:
    hub.rounds(3, contributors=2)
    before, refs = packs(hub), hub.refs()
    assert tidy_hub(hub.path, packs=before - 1)
    assert packs(hub) < before
    assert hub.refs() == refs
    assert hub.sync("newcomer").load()


def test_few_packs_are_left_alone(hub: HubSimulator) -> None:
    assert not tidy_hub(hub.path)


def test_an_open_contribution_survives_tidying(hub: HubSimulator) -> None:
    record = hub.contribute("ann")
    tidy_hub(hub.path, packs=0)
    assert hub.verdicts()[record.id].accepted
    assert len(hub.merge().proposal.record.contributions) == 1
