"""Merging: what goes into a round, what it costs, and who wins a race."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from moshi_fl.aggregate import STRATEGIES
from moshi_fl.errors import HubError
from moshi_fl.history import MAIN, contribution_branch, round_branch
from moshi_fl.replica import Replica
from moshi_fl.store import PushRejected
from moshi_fl.strategies import find_strategy
from moshi_hub.merge import finish, publish_round
from moshi_sdk.audit import Auditor
from tests.support.hubs import git
from tests.support.simulator import HubSimulator, random_delta


def audit(hub: HubSimulator, first: int, last: int) -> list[bool | None]:
    auditor = Auditor(hub.person("auditor"), find_strategy=find_strategy)
    return [finding.identical for finding in auditor.audit(first, last)]


def test_a_round_is_the_weighted_mean_of_what_was_sent(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32"})
    hub.edit_settings('strategy = "robust"', 'strategy = "fedavg"')
    hub.edit_settings('weighting = "equal"', 'weighting = "examples"')
    hub.edit_settings("min_owners = 3", "min_owners = 1")
    base = dict(hub.sync("before").load())
    first, second = random_delta(base, 1), random_delta(base, 2)
    hub.contribute("ann", delta=first, num_examples=300)
    hub.contribute("bob", delta=second, num_examples=100)
    hub.merge()
    after = hub.sync("after").load()
    for name, old in base.items():
        mean = (300 * first[name].astype(np.float64) + 100 * second[name].astype(np.float64)) / 400
        np.testing.assert_allclose(after[name], old + mean, atol=1e-7)


def test_everyone_gets_the_published_digest_and_can_recompute_it(hub: HubSimulator) -> None:
    hub.rounds(3, contributors=2)
    cold, record = hub.sync("newcomer"), hub.replica.pull().record
    assert cold.record == record
    assert cold.load()
    assert audit(hub, 1, 3) == [True, True, True]


def test_settled_branches_and_deltas_leave_the_hub(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.contribute("eve", delta=random_delta(hub.sync().load(), 5, scale=1e6))
    outcome = hub.merge()
    assert len(outcome.open_round.accepted) == 1
    assert outcome.leftovers == ""
    assert not [ref for ref in hub.refs() if "contribute" in ref or "/delta/" in ref]


def test_what_a_hub_does_not_let_go_is_said_until_it_is_gone(hub: HubSimulator) -> None:
    branch = contribution_branch(0, hub.contribute("ann").id)
    git(hub.path, "config", "receive.denyDeletes", "true")
    assert branch in hub.merge().leftovers
    hub.contribute("bob", seed=2)
    assert branch in hub.merge().leftovers
    assert any(branch in problem for problem in finish(hub.replica))
    git(hub.path, "config", "receive.denyDeletes", "false")
    assert finish(hub.replica) == []
    assert branch not in hub.refs()


def test_nothing_to_merge_is_said_and_changes_nothing(hub: HubSimulator) -> None:
    before = hub.refs()
    with pytest.raises(HubError, match="0 contribution"):
        hub.merge()
    assert hub.refs() == before


def test_a_dry_run_changes_nothing(hub: HubSimulator) -> None:
    hub.contribute("ann")
    before = hub.refs()
    outcome = hub.merge(publish=False, dry_run=True)
    assert outcome.proposal.record.round == 1
    assert hub.refs() == before


def test_two_merges_race_and_one_wins(hub: HubSimulator) -> None:
    """The second one looked before the first published, and publishes after it."""
    hub.contribute("ann")
    other = hub.maintainer("second maintainer")
    late = _merge_interrupted_by(other, lambda: hub.merge(name="the first"))
    with pytest.raises(PushRejected, match="another merge published first"):
        late()
    assert hub.sync().round == 1
    assert audit(hub, 1, 1) == [True]


def test_the_same_merge_twice_is_one_merge(hub: HubSimulator) -> None:
    """Down to the commit: publishing what is already published is no error, and no second round."""
    hub.contribute("ann")
    seconds = int(time.time())
    first = hub.merge(publish=False)
    again = hub.merge(publish=False)
    if int(time.time()) == seconds:
        assert first.built == again.built
    assert first.proposal.record.weights == again.proposal.record.weights


def _merge_interrupted_by(replica: Replica, event, publish: bool = True):
    """A merge during whose aggregation something else happens."""

    def finder(name, options):
        event()
        return find_strategy(name, options)

    def run():
        from moshi_hub.merge import Options, merge

        options = Options(publish=publish, name="other")
        return merge(replica, options, evaluator=lambda _: None, find_strategy=finder)

    return run


def test_a_proposed_round_waits_for_its_maintainer(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    assert hub.sync().round == 0
    assert round_branch(1) in hub.refs()
    hub.contribute("bob", seed=2)
    record, leftovers = publish_round(hub.replica)
    assert (record.round, len(record.contributions), leftovers) == (1, 1, "")
    assert hub.sync().round == 1
    assert round_branch(1) not in hub.refs()
    assert len([ref for ref in hub.refs() if "/contribute/" in ref]) == 1
    assert audit(hub, 1, 1) == [True]


def test_a_proposal_can_be_made_again_after_an_exclusion(hub: HubSimulator) -> None:
    ann, bob = hub.contribute("ann"), hub.contribute("bob", seed=2)
    hub.merge(publish=False)
    hub.merge(publish=False, exclude=(bob.id[:10],))
    record, _ = publish_round(hub.replica)
    assert [merged.id for merged in record.contributions] == [ann.id]


@pytest.mark.parametrize("publish", [True, False])
def test_what_a_round_leaves_out_stays_open(hub: HubSimulator, publish: bool) -> None:
    """Whether it was published at once or after a review: the next round can take it."""
    ann, bob = hub.contribute("ann"), hub.contribute("bob", seed=2)
    hub.merge(publish=publish, exclude=(bob.id[:10],))
    if not publish:
        publish_round(hub.replica)
    assert [verdict.accepted for verdict in hub.verdicts().values()] == [True]
    record = hub.merge().built.record
    assert [merged.id for merged in record.contributions] == [bob.id]
    assert ann.id != bob.id


def test_excluding_what_is_not_open_is_refused(hub: HubSimulator) -> None:
    hub.contribute()
    with pytest.raises(HubError, match="--exclude zz: no open contribution"):
        hub.merge(exclude=("zz",))


def test_publishing_what_nobody_proposed_is_refused(hub: HubSimulator) -> None:
    with pytest.raises(HubError, match="not proposed"):
        publish_round(hub.replica)


def test_a_proposal_on_an_old_main_is_refused(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    hub.edit_settings("max_staleness = 2", "max_staleness = 3")
    with pytest.raises(HubError, match="main has moved"):
        publish_round(hub.replica)
    assert hub.sync().round == 0


def test_a_proposal_does_not_replace_the_weights_of_a_round_that_was_published_meanwhile(
    hub: HubSimulator,
) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    other = hub.maintainer("second maintainer")
    late = _merge_interrupted_by(other, lambda: publish_round(hub.replica), publish=False)
    with pytest.raises(PushRejected, match="another merge published first"):
        late()
    assert hub.sync().round == 1
    assert audit(hub, 1, 1) == [True]


def test_a_proposal_that_is_made_anew_while_it_is_published_stays_unpublished(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.contribute("ann")
    hub.merge(publish=False)
    push = hub.replica.repo.push

    def late(updates) -> None:
        monkeypatch.undo()
        hub.merge(publish=False, replica=hub.maintainer("second"), name="second")
        push(updates)

    monkeypatch.setattr(hub.replica.repo, "push", late)
    with pytest.raises(PushRejected):
        publish_round(hub.replica)
    assert hub.sync().round == 0
    publish_round(hub.replica)
    assert hub.sync("newcomer").round == 1


def test_what_exceeds_the_limit_waits_for_the_next_round(hub: HubSimulator) -> None:
    hub.edit_settings("max_contributions = 1000", "max_contributions = 2")
    for seed in (1, 2, 3):
        hub.contribute(f"person{seed}", seed=seed)
    outcome = hub.merge()
    assert len(outcome.waiting) == 1
    outcome = hub.merge()
    assert [merged.base_round for merged in outcome.proposal.record.contributions] == [0]
    assert audit(hub, 1, 2) == [True, True]


def test_an_older_base_counts_less(hub: HubSimulator) -> None:
    hub.edit_settings("min_owners = 3", "min_owners = 1")
    old = hub.sync("slow")
    hub.rounds(1)
    slow = hub.contribute("slow", on=old, seed=7)
    fast = hub.contribute("fast", seed=8)
    record = hub.merge().proposal.record
    assert {m.id: m.weight for m in record.contributions} == {slow.id: 500_000, fast.id: 1_000_000}
    assert audit(hub, 2, 2) == [True]


def test_no_contribution_weighs_more_than_the_limit(hub: HubSimulator) -> None:
    hub.edit_settings('weighting = "equal"', 'weighting = "examples"')
    hub.contribute("braggart", num_examples=10**15)
    assert hub.merge().proposal.record.contributions[0].weight == 100_000


@pytest.mark.parametrize("strategy", [*STRATEGIES, "flower:FedMedian", "flower:Krum"])
def test_rounds_of_other_strategies_can_be_synced_and_audited(
    hub: HubSimulator, strategy: str
) -> None:
    for seed in range(1, 6):
        hub.contribute(f"person{seed}", seed=seed)
    record = hub.merge(strategy=strategy).proposal.record
    assert record.strategy
    assert record.strategy.name == strategy
    assert hub.sync("cold").load()
    assert audit(hub, 1, 1) == [True]


def test_many_dense_contributions_are_published_as_one_step(tmp_path: Path) -> None:
    hub = HubSimulator.copied(tmp_path, delta={"codec": "f32"})
    reader = hub.person("reader")
    reader.pull()
    for seed in (1, 2, 3):
        hub.contribute(f"person{seed}", seed=seed)
    outcome = hub.merge()
    record = outcome.built.record
    assert record.update.kind == "step"
    assert record.archive is not None
    assert record.update.location.bytes < record.archive.bytes
    assert reader.pull().load()
    assert audit(hub, 1, 1) == [True]


def test_keyframes_come_when_updates_have_grown_to_half_of_one(hub: HubSimulator) -> None:
    hub.rounds(8, contributors=4)
    state = hub.replica.look()
    rounds = hub.replica.chain(state, 0)
    since = 0
    for record in rounds[1:]:
        update = record.update.location.bytes
        assert (record.keyframe is not None) == (2 * (since + update) > keyframe_bytes(rounds))
        since = 0 if record.keyframe else since + update
    assert any(record.keyframe for record in rounds[1:])


def keyframe_bytes(rounds) -> int:
    return rounds[0].keyframe.bytes


def test_every_round_can_carry_a_keyframe(hub: HubSimulator) -> None:
    hub.edit_settings('keyframes = "auto"', 'keyframes = "every-round"')
    hub.rounds(2)
    assert all(record.keyframe for record in hub.replica.look().manifest.rounds)


def test_a_hub_that_keeps_few_rounds_prunes_the_rest(hub: HubSimulator) -> None:
    hub.edit_settings("keep_rounds = 0", "keep_rounds = 1")
    hub.edit_settings('keyframes = "auto"', 'keyframes = "every-round"')
    hub.rounds(4)
    weights = sorted(ref for ref in hub.refs() if ref.startswith("refs/moshi/"))
    assert weights == [
        "refs/moshi/keyframe/3",
        "refs/moshi/keyframe/4",
        "refs/moshi/latest",
        "refs/moshi/update/3",
        "refs/moshi/update/4",
    ]
    assert audit(hub, 4, 4) == [True]


def test_characters_that_two_propose_join_the_vocabulary(hub: HubSimulator) -> None:
    reader = hub.person("reader")
    before = reader.pull()
    hub.contribute("ann", seed=1, proposed_characters="éß")
    hub.contribute("bob", seed=2, proposed_characters="é→")
    hub.merge()
    after = reader.pull()
    assert after.record.growth
    assert after.record.growth.characters == "é"
    assert after.record.parameters == before.record.parameters + 2 * 16 + 1
    grown, old = after.load()["embedding.weight"], before.load()["embedding.weight"]
    assert grown.shape == (old.shape[0] + 1, 16)
    assert audit(hub, 1, 1) == [True]


def test_a_delta_of_an_older_vocabulary_still_merges(hub: HubSimulator) -> None:
    old = hub.sync("slow")
    hub.contribute("ann", seed=1, proposed_characters="é")
    hub.contribute("bob", seed=2, proposed_characters="é")
    hub.merge()
    hub.contribute("slow", on=old, seed=3)
    hub.contribute("fast", seed=4)
    record = hub.merge().proposal.record
    assert sorted(merged.missing_rows for merged in record.contributions) == [0, 1]
    assert hub.sync("cold").load()
    assert audit(hub, 1, 2) == [True, True]


def test_a_typo_in_the_settings_names_key_and_line(hub: HubSimulator) -> None:
    hub.contribute("ann")
    hub.edit_settings("min_contributions", "min_contribution")
    with pytest.raises(Exception, match=r"hub.toml, line \d+: .*did you mean 'min_contributions'"):
        hub.merge()


def test_main_holds_only_small_text(hub: HubSimulator) -> None:
    hub.rounds(2, contributors=2)
    repo = hub.replica.repo
    sizes = {entry.path: entry.size for entry in repo.entries(hub.replica.fetch_main())}
    assert max(sizes.values()) < 20_000
    assert {path.split("/")[0] for path in sizes} == {
        "README.md",
        "hub.toml",
        "rounds",
        "tokenizer.json",
    }
    assert hub.refs()[MAIN]
