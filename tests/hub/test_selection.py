"""Selection: one contribution per owner, copies once, and all of it visible."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.errors import ConfigError, HubError
from moshi_fl.records import Weighting
from moshi_fl.rules import Claim, round_weights
from moshi_fl.strategies import find_strategy
from moshi_hub import choice
from moshi_hub import merge as merging
from moshi_hub.merge import publish_round
from moshi_hub.selection import Candidate, one_per_owner, select, without_copies
from moshi_sdk.audit import Auditor, Finding
from tests.support.simulator import HubSimulator, random_delta


def audit(hub: HubSimulator) -> list[Finding]:
    replica = hub.person("auditor")
    auditor = Auditor(replica, find_strategy=find_strategy)
    return list(auditor.audit(1, replica.look().newest.round))


# One per owner.


def test_of_an_owners_contributions_the_newest_base_counts_then_the_lowest_id() -> None:
    some = [
        Candidate("d", "ann", 3),
        Candidate("c", "ann", 3),
        Candidate("a", "ann", 2),
        Candidate("b", "bob", 1),
    ]
    kept, dropped = one_per_owner(some)
    assert [entry.id for entry in kept] == ["c", "b"]
    assert {key: finding.code for key, finding in dropped.items()} == dict.fromkeys(
        "da", "superseded"
    )
    assert "c" in dropped["a"].message


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=8).flatmap(
        lambda parts: st.permutations(
            [Candidate(f"{n}", owner, base) for n, (owner, base) in enumerate(parts)]
        )
    )
)
def test_whose_contribution_counts_does_not_depend_on_the_order(some: list[Candidate]) -> None:
    kept, dropped = one_per_owner(some)
    again, _ = one_per_owner(sorted(some, key=lambda entry: entry.id))
    assert set(kept) == set(again)
    assert {entry.owner for entry in kept} == {entry.owner for entry in some}
    assert len(kept) + len(dropped) == len(some)


# Copies.


def cosines(**pairs: float):
    return lambda one, other: pairs.get(one + other, pairs.get(other + one, 0.0))


def test_a_copy_is_one_of_the_first_that_counts() -> None:
    some = [Candidate(name, name, 0) for name in "abcd"]
    kept, dropped = without_copies(some, cosines(ab=0.99, bc=0.99, ad=0.98, cd=1.0))
    assert [entry.id for entry in kept] == ["a", "c"]  # b does not count, so c is no copy of it
    assert dropped["b"].code == dropped["d"].code == "copy"
    assert "that of a does: cosine 0.9900" in dropped["b"].message
    assert "that of c does" in dropped["d"].message


def test_what_is_over_the_limit_waits_and_only_what_counts_is_compared() -> None:
    some = [Candidate("b", "x", 0), Candidate("a", "y", 0), Candidate("c", "z", 1)]
    some.append(Candidate("d", "z", 0))
    asked = []

    def compare(bases):
        asked.append(dict(bases))
        return cosines()

    chosen = select(some, compare, 2)
    assert (chosen.taken, chosen.waiting, set(chosen.dropped)) == (("a", "b"), ("c",), {"d"})
    assert asked == [{"b": 0, "a": 0, "c": 1}]


def test_sybil_copies_count_once(hub: HubSimulator) -> None:
    base = dict(hub.sync().load())
    work = random_delta(base, 1)
    hub.contribute("ann", delta=work)
    hub.contribute("ben", seed=2)
    for number in range(3):
        noise = random_delta(base, 50 + number, scale=1e-6)
        copy = {name: np.float32(2 + number) * work[name] + noise[name] for name in work}
        hub.contribute(f"sybil{number}", delta=copy)
    outcome = hub.merge()
    dropped = [v for v in outcome.open_round.verdicts if not v.accepted]
    assert [verdict.findings[0].code for verdict in dropped] == ["copy"] * 3
    assert len(outcome.built.record.contributions) == 2
    originals = {v.findings[0].message.split()[6] for v in dropped}
    assert originals <= {merged.id for merged in outcome.built.record.contributions}
    assert not [ref for ref in hub.refs() if "/contribute/" in ref or "/delta/" in ref]
    assert [finding.identical for finding in audit(hub)] == [True]


def test_the_report_says_what_was_left_out_and_why(hub: HubSimulator) -> None:
    old = hub.sync("slow")
    hub.rounds(1)
    work = random_delta(dict(hub.sync().load()), 1)
    hub.contribute("ann", delta=work)
    hub.contribute("eve", delta={name: 2 * array for name, array in work.items()})
    hub.contribute("ben", seed=2)
    hub.contribute("ben", on=old, seed=3)
    built = hub.merge().built
    report = hub.replica.repo.read(built.main, "rounds/0002/report.md", limit=1 << 18).decode()
    assert "| copy | its delta points where that of" in report
    assert "| superseded | its owner also sent" in report
    assert len(built.record.contributions) == 2


def test_a_newer_base_supersedes_what_its_owner_sent_before(hub: HubSimulator) -> None:
    old = hub.sync("ann")
    hub.rounds(1)
    late, new = hub.contribute("ann", on=old, seed=7), hub.contribute("ann", seed=8)
    record = hub.merge().built.record
    assert [merged.id for merged in record.contributions] == [new.id]
    assert late.id not in hub.verdicts()


def test_a_proposal_settles_what_it_left_out(hub: HubSimulator) -> None:
    old = hub.sync("ann")
    hub.rounds(1)
    hub.contribute("ann", on=old, seed=1)
    hub.contribute("ann", seed=2)
    hub.merge(publish=False)
    assert len([ref for ref in hub.refs() if "/contribute/" in ref]) == 2
    publish_round(hub.replica)
    assert not [ref for ref in hub.refs() if "/contribute/" in ref]


def test_a_copy_counts_when_the_original_is_excluded(hub: HubSimulator) -> None:
    work = random_delta(dict(hub.sync().load()), 1)
    one = hub.contribute("ann", delta=work)
    two = hub.contribute("eve", delta={name: 2 * array for name, array in work.items()})
    record = hub.merge(exclude=(one.id,)).built.record
    assert [merged.id for merged in record.contributions] == [two.id]


def test_copies_do_not_make_up_the_numbers(hub: HubSimulator) -> None:
    hub.edit_settings("min_contributions = 1", "min_contributions = 2")
    work = random_delta(dict(hub.sync().load()), 1)
    hub.contribute("ann", delta=work)
    hub.contribute("eve", delta={name: 2 * array for name, array in work.items()})
    with pytest.raises(HubError, match=r"1 contribution\(s\) to merge.*2; 1 rejected"):
        hub.merge()


# Weights.


@given(
    claims=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 10**6), st.just(0)), min_size=1
    ),
    min_owners=st.integers(1, 5),
)
def test_nobody_has_more_than_a_share(claims: list[tuple[str, int, int]], min_owners: int) -> None:
    rule = Weighting(rule="examples", min_owners=min_owners, max_examples=10**6)
    weights = round_weights(rule, [Claim(*claim) for claim in claims])
    totals: dict[str, int] = {}
    for (owner, _, _), weight in zip(claims, weights, strict=True):
        totals[owner] = totals.get(owner, 0) + weight
    shares = min(min_owners, len(totals))
    # Each contribution weighs at least 1, and each is rounded down.
    assert max(totals.values()) * shares <= sum(totals.values()) + shares * len(claims)


def test_a_braggart_weighs_a_third_at_most(hub: HubSimulator) -> None:
    hub.edit_settings('weighting = "equal"', 'weighting = "examples"')
    for number in range(5):
        hub.contribute(f"person{number}", seed=number, num_examples=1000)
    braggart = hub.contribute("braggart", seed=9, num_examples=10**12)
    record = hub.merge().built.record
    weights = {merged.id: merged.weight for merged in record.contributions}
    assert weights[braggart.id] == sum(weights.values()) // 3 == 2500
    assert [finding.identical for finding in audit(hub)] == [True]


# Robust rounds.


def test_robust_rounds_carry_their_norms_on(hub: HubSimulator) -> None:
    hub.rounds(3, contributors=4)
    first, second, third = hub.replica.chain(hub.replica.look(), 1)[-3:]
    assert first.strategy.name == "robust"
    assert first.strategy.options["running_norm"] == 0.0
    running = second.strategy.options["running_norm"]
    assert running == first.median_norm > 0
    limit = min(second.median_norm, 2 * running)
    assert third.strategy.options["running_norm"] == 0.8 * running + 0.2 * limit
    assert [finding.identical for finding in audit(hub)] == [True] * 3


def test_another_strategy_in_between_starts_the_norms_anew(hub: HubSimulator) -> None:
    hub.rounds(1, contributors=2)
    hub.contribute("ann", seed=5)
    assert hub.merge(strategy="median").built.record.median_norm is None
    hub.contribute("ann", seed=6)
    assert hub.merge().built.record.strategy.options["running_norm"] == 0.0
    assert [finding.identical for finding in audit(hub)] == [True] * 3


def test_a_running_norm_in_the_settings_is_refused(hub: HubSimulator) -> None:
    hub.edit_settings(
        'strategy = "robust"', 'strategy = "robust"\noptions = { running_norm = 1.0 }'
    )
    hub.contribute("ann")
    with pytest.raises(ConfigError, match="running_norm follows from the rounds before"):
        hub.merge()


RECOMPUTE = """
import sys
from pathlib import Path
from moshi_fl.replica import Replica
from moshi_fl.strategies import find_strategy
from moshi_sdk.audit import Auditor
auditor = Auditor(Replica(sys.argv[1], Path(sys.argv[2])), find_strategy=find_strategy)
print(*(finding.weights for finding in auditor.audit(1, 2)))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512_ICL", "OPENBLAS_CORETYPE": "Nehalem"},
    ],
    ids=["one thread", "three threads", "an older processor"],
)
def test_another_process_recomputes_robust_rounds(
    hub: HubSimulator, environment: dict[str, str]
) -> None:
    hub.rounds(2, contributors=5)
    published = [record.weights for record in hub.replica.chain(hub.replica.look(), 1)[-2:]]
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECOMPUTE, hub.url, str(hub.folder / "other")],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == published


# Lies.


def lie(hub: HubSimulator, monkeypatch: pytest.MonkeyPatch, **fields: object) -> str:
    """Publish a round whose record has other fields than it should; what the audit says."""
    honest = merging.propose

    def falsified(*a, **k):
        proposal = honest(*a, **k)
        return replace(proposal, record=msgspec.structs.replace(proposal.record, **fields))

    with monkeypatch.context() as patch:
        patch.setattr(merging, "propose", falsified)
        hub.merge()
    (finding,) = audit(hub)
    assert finding.identical is False
    return finding.problem


def test_a_median_norm_that_the_deltas_do_not_have_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.contribute("ann")
    assert "its median norm is said to be 7.0" in lie(hub, monkeypatch, median_norm=7.0)


def test_a_running_norm_that_does_not_follow_is_found(
    hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.contribute("ann")
    monkeypatch.setattr(choice, "strategy_options", lambda *_: {"running_norm": 1e-6})
    hub.merge()
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "its running norm is 1e-06, by the rule 0.0" in finding.problem


def test_an_owner_split_in_two_is_found(hub: HubSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    from moshi_hub import propose as proposing

    hub.contribute("ann")
    monkeypatch.setattr(proposing, "owner_of", lambda entry: f"not {entry.contributor}")
    hub.merge()
    (finding,) = audit(hub)
    assert finding.identical is False
    assert "is said to be 'not ann''s, by its record it is 'SHA256:" in finding.problem
