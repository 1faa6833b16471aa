"""``kill -9`` at any moment: the same command, given again, ends as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moshi_fl.signing import own_signer
from tests.support.children import Ended, Nursery
from tests.support.hubs import git
from tests.support.simulator import HubSimulator, write_corpus

LEFTOVERS = (".tmp-", "work-", "tmp_pack", "tmp_obj")


class Scene:
    """A hub and its people, put back to the same state as often as wanted."""

    def __init__(self, folder: Path, commands: Nursery) -> None:
        self.hub = HubSimulator(folder / "stage")
        self.folder, self.commands = folder, commands
        self.stage = folder / "stage"
        self.data = write_corpus(folder / "data")
        for who in ("ann", "reader", "maintainer"):
            commands.run("moshi-fl", "config", "set", "contributor", who, home=self.stage / who)

    def contribute(self, *more: str, **how) -> Ended:
        """Ann trains and sends."""
        what = ("--steps", "1", "--batch-size", "2", "--seed", "7", "--contributor", "ann")
        if "--resume" not in more:
            more = (*what, "--data", str(self.data), *more)
        return self._run("moshi-fl", "contribute", *more, who="ann", **how)

    def sync(self, **how) -> Ended:
        """A reader brings the newest round home."""
        return self._run("moshi-fl", "sync", who="reader", **how)

    def merge(self, **how) -> Ended:
        """The maintainer makes and publishes a round."""
        return self._run("moshi-hub", "merge", "--publish", who="maintainer", **how)

    def _run(self, *command: str, who: str, **how) -> Ended:
        words = (*command, "--hub", self.hub.url, "--json")
        return self.commands.run(*words, home=self.stage / who, **how)

    def make_identity(self) -> None:
        """Ann's key; each new one would make another contribution of the same work."""
        own_signer(self.stage / "ann")

    def keep(self) -> None:
        """Remember the present state."""
        shutil.rmtree(self.folder / "kept", ignore_errors=True)
        shutil.copytree(self.stage, self.folder / "kept", symlinks=True)

    def reset(self) -> None:
        """Back to it."""
        shutil.rmtree(self.stage)
        shutil.copytree(self.folder / "kept", self.stage, symlinks=True)

    def leftovers(self) -> list[str]:
        """What nobody will need again on anyone's disk."""
        paths = [path.relative_to(self.stage) for path in self.stage.rglob("*")]
        return [str(path) for path in paths if path.name.startswith(LEFTOVERS)]


@pytest.fixture
def scene(tmp_path: Path, commands: Nursery) -> Scene:
    return Scene(tmp_path, commands)


def push_of(ended: Ended) -> int:
    """Number of the event that is the push."""
    return next(n for n, event in enumerate(ended.events, 1) if event.startswith("git push"))


def test_a_contribution_killed_anywhere_is_the_same_contribution(scene: Scene) -> None:
    scene.make_identity()
    scene.hub.sync("ann")  # deaths before that are told below
    scene.keep()
    whole = scene.contribute(trace=True)
    assert whole.status == 0, whole.err
    refs = scene.hub.refs()
    for moment, event in enumerate(whole.events, 1):
        scene.reset()
        assert scene.contribute(kill_at=moment).was_killed, event
        again = scene.contribute()
        assert again.status == 0, (event, again.err)
        assert again.json["contribution"] == whole.json["contribution"], event
        assert scene.hub.refs() == refs, event
        assert scene.leftovers() == [], event


def test_a_contribution_killed_at_every_write_in_turn_gets_there(scene: Scene) -> None:
    scene.make_identity()
    scene.keep()
    whole = scene.contribute()
    scene.reset()
    deaths = 0
    while (ended := scene.contribute(kill_at=deaths + 1)).was_killed:
        deaths += 1
    assert ended.status == 0, ended.err
    assert deaths > 10
    assert ended.json["contribution"] == whole.json["contribution"]
    assert scene.leftovers() == []


def test_a_replacement_killed_anywhere_leaves_exactly_one(scene: Scene) -> None:
    scene.make_identity()
    assert scene.contribute().status == 0
    scene.keep()
    how = ("--seed", "8", "--replace")
    whole = scene.contribute(*how, trace=True)
    assert whole.status == 0, whole.err
    refs = scene.hub.refs()
    for moment in range(push_of(whole) - 1, len(whole.events) + 1):
        scene.reset()
        assert scene.contribute(*how, kill_at=moment).was_killed
        assert len([ref for ref in scene.hub.refs() if "/contribute/" in ref]) == 1
        again = scene.contribute(*how)
        assert again.status == 0, again.err
        assert again.json["contribution"] == whole.json["contribution"]
        assert scene.hub.refs() == refs
        assert scene.leftovers() == []


@pytest.mark.parametrize("delay", [0.002, 0.01, 0.03])
def test_a_contribution_killed_while_it_is_sent_arrives_once(scene: Scene, delay: float) -> None:
    scene.make_identity()
    scene.keep()
    whole = scene.contribute(trace=True)
    refs = scene.hub.refs()
    scene.reset()
    scene.contribute(kill_at=push_of(whole), kill_after=delay)
    again = scene.contribute("--resume")
    assert again.status == 0 or "no unfinished contribution" in again.err
    assert scene.hub.refs() == refs
    assert scene.leftovers() == []
    git(scene.hub.path, "fsck", "--strict")


def test_a_contribution_merged_before_its_sender_knew_is_not_sent_twice(scene: Scene) -> None:
    scene.keep()
    whole = scene.contribute(trace=True)
    scene.reset()
    assert scene.contribute(kill_at=push_of(whole) + 1).was_killed
    for seed in range(4):  # beyond the hub's limit for old bases
        scene.hub.contribute("bob", seed=seed)
        scene.hub.merge()
    again = scene.contribute("--resume")
    assert again.status == 0, again.err
    assert "The hub already had it" in again.err
    assert not [ref for ref in scene.hub.refs() if "contribute/" in ref or "delta/" in ref]
    assert scene.contribute("--resume").status == 1


def test_what_the_hub_did_not_take_is_not_sent_again_unasked(scene: Scene) -> None:
    sent = scene.contribute()
    git(scene.hub.path, "update-ref", "-d", sent.json["branch"])
    again = scene.contribute()
    assert again.status == 3
    assert "was sent before, and is open no more" in again.err
    assert "--seed" in again.err


def test_a_merge_killed_anywhere_can_be_done_again(scene: Scene) -> None:
    scene.hub.contribute("ann", seed=1)
    scene.hub.contribute("bob", seed=2)
    scene.keep()
    whole = scene.merge(trace=True)
    assert whole.status == 0, whole.err
    assert whole.json["contributions"] == 2
    refs = set(scene.hub.refs())
    push = push_of(whole)
    # Before the push the hub does not know of it, so a few of those moments tell as much as all.
    for moment in (*range(1, push, 6), *range(push, len(whole.events) + 1)):
        event = whole.events[moment - 1]
        scene.reset()
        assert scene.merge(kill_at=moment).was_killed, event
        again = scene.merge()
        assert again.status == 0 or "0 contribution(s) to merge" in again.err, (event, again.err)
        assert set(scene.hub.refs()) == refs, event
        assert scene.hub.sync().record.weights == whole.json["weights"], event
        assert scene.leftovers() == [], event


@pytest.mark.parametrize("delay", [0.002, 0.01, 0.03])
def test_a_merge_killed_while_it_publishes_is_published_once(scene: Scene, delay: float) -> None:
    scene.hub.contribute("ann", seed=1)
    scene.keep()
    whole = scene.merge(trace=True)
    refs = set(scene.hub.refs())
    scene.reset()
    scene.merge(kill_at=push_of(whole), kill_after=delay)
    again = scene.merge()
    if "another merge published first" in again.err:  # the orphaned push came through just now
        again = scene.merge()
    assert again.status == 0 or "0 contribution(s) to merge" in again.err, again.err
    assert set(scene.hub.refs()) == refs
    assert scene.hub.sync().record.weights == whole.json["weights"]
    git(scene.hub.path, "fsck", "--strict")


def test_a_sync_killed_anywhere_never_leaves_half_a_model(scene: Scene) -> None:
    scene.sync()
    scene.hub.rounds(2)
    scene.keep()
    whole = scene.sync(trace=True)
    assert whole.status == 0, whole.err
    for moment, event in enumerate(whole.events, 1):
        scene.reset()
        assert scene.sync(kill_at=moment).was_killed, event
        scene.hub.sync("reader", offline=True).load()  # the old round or the new, never half
        again = scene.sync()
        assert again.status == 0, (event, again.err)
        assert again.json["weights"] == whole.json["weights"], event
        assert scene.leftovers() == [], event
