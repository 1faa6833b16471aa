"""Draws, agreement and decisions: pure functions on integers."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.consensus import (
    TOLERANCES,
    Case,
    Measured,
    agree,
    decide,
    gain,
    private_checks,
    quantise,
)
from moshi_fl.draw import assign, counts, draw_sequences, nonce_commitment, ranking, seed_of
from moshi_fl.errors import CorruptRecord
from moshi_fl.evidence import LARGEST_LOSS, Ruling, Seat, Submission, pack, unpack
from moshi_fl.merkle import is_included, leaf, merkle_proof, merkle_root
from tests.support.keys import signer_of

SEED = hashlib.sha256(b"seed").hexdigest()


def submission(number: int, owner: str = "ann") -> Submission:
    name = hashlib.sha256(str(number).encode()).hexdigest()
    return Submission(id=name[:32], record=name, key=signer_of(owner).public_key)


def seat(name: str, owner: str | None = None, *, counts: bool = True) -> Seat:
    return Seat(key=signer_of(name).public_key, owner=owner or name, counts=counts)


def owners(seats: Iterable[Seat]) -> dict[str, str]:
    return {entry.key: entry.owner for entry in seats}


# Losses and verdicts.


def test_losses_are_micro_nats_rounded_half_to_even() -> None:
    assert quantise([2.5, 0.5e-6, 1.5e-6, 0.0]) == [2500000, 0, 2, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e9, -math.inf])
def test_a_loss_that_is_none_is_the_largest(loss: float) -> None:
    assert quantise([loss]) == [LARGEST_LOSS]


def verdict(gains: Iterable[int]) -> str:
    before = np.full(len(list(gains)), 2_000_000, np.int64)
    return gain(before, before - np.array(gains, np.int64)).outcome


def test_a_clear_gain_earns_credit_and_a_clear_loss_is_rejected() -> None:
    assert verdict([100, 110, 90, 105]) == "credit"
    assert verdict([-100, -110, -90, -105]) == "reject"


def test_what_cannot_be_told_from_noise_is_neutral() -> None:
    assert verdict([1000, -900, 950, -1000]) == "neutral"
    assert verdict([-1000, 900, -950, 1000]) == "neutral"


def test_what_changes_nothing_is_rejected() -> None:
    assert verdict([0, 0, 0]) == "reject"


@given(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=40))
def test_the_integer_rule_is_the_rule_of_the_paper(gains: list[int]) -> None:
    mean = sum(gains) / len(gains)
    error = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
    if min(abs(mean - 1.645 * error), abs(mean + 1.645 * error)) < 1e-6:
        return  # floats cannot tell
    if mean - 1.645 * error > 0:
        wanted = "credit"
    else:
        wanted = "neutral" if mean + 1.645 * error > 0 else "reject"
    assert verdict(gains) == wanted


def test_a_gain_states_mean_and_error_in_whole_micro_nats() -> None:
    before = np.array([1000, 1000, 1000], np.int64)
    found = gain(before, before - np.array([10, 11, 13]))
    assert (found.mean, found.standard_error) == (11, 0)
    found = gain(before, before + np.array([10, 10, 13]))
    assert found.mean == -11


@given(st.lists(st.integers(0, LARGEST_LOSS), max_size=50))
def test_losses_survive_packing(losses: list[int]) -> None:
    assert unpack(pack(losses), len(losses), name="x").tolist() == losses


@pytest.mark.parametrize("text", ["AAAA", "AAAAAA==x", "/////w==", "AAAAAB=="])
def test_losses_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CorruptRecord):
        unpack(text, 1, name="x")


@given(st.integers(2, 2000), st.integers(2, 500), st.integers(0, 100))
def test_a_pool_has_room_for_everybody(pool: int, sequences: int, private: int) -> None:
    shared, own = counts(pool, sequences, private)
    assert 1 <= shared <= sequences
    assert shared + 2 * own <= pool
    assert pool < 4 or shared >= 2


def test_the_default_pool_has_256_shared_and_32_private_sequences() -> None:
    assert counts(256 + 64, 256, 32) == (256, 32)


# The Merkle tree.


@given(st.integers(1, 40), st.data())
def test_each_submission_can_prove_that_it_is_in(size: int, data: st.DataObject) -> None:
    leaves = [hashlib.sha256(bytes([n])).digest() for n in range(size)]
    index = data.draw(st.integers(0, size - 1))
    root, proof = merkle_root(leaves), merkle_proof(leaves, index)
    assert is_included(leaves[index], index, size, proof, root)
    other = hashlib.sha256(b"other").digest()
    assert not is_included(other, index, size, proof, root)
    wrong = data.draw(st.integers(-1, size))
    assert wrong == index or not is_included(leaves[index], wrong, size, proof, root)
    assert not is_included(leaves[index], index, size, [*proof, other], root)


def test_a_leaf_is_not_a_node() -> None:
    a, b = leaf(submission(1)), leaf(submission(2))
    assert merkle_root([a, b]) != merkle_root([merkle_root([a, b])[::-1]])
    assert merkle_root([]) == hashlib.sha256(b"").digest()


# Seed and draw.


def test_every_nonce_changes_the_seed_and_their_order_does_not() -> None:
    nonces = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
    seeds = {seed_of(SEED, order) for order in itertools.permutations(nonces)}
    assert len(seeds) == 1
    assert seed_of(SEED, nonces[:2]) not in seeds
    assert seed_of(SEED[::-1], nonces) not in seeds


def test_a_commitment_cannot_be_taken_over() -> None:
    nonce = "ab" * 32
    assert nonce_commitment("ssh-ed25519 A", nonce) != nonce_commitment("ssh-ed25519 B", nonce)


def test_nobody_evaluates_their_own_and_an_owner_has_one_voice() -> None:
    seats = [seat("eve"), seat("eve2", "eve"), seat("ann2", "ann"), seat("ann"), seat("bob")]
    ordered = ranking(SEED, submission(1, "ann"), seats, owners(seats))
    assert sorted({entry.owner for entry in ordered}) == ["bob", "eve"]
    assert len(ordered) == 2


def test_who_is_absent_still_owns_their_contribution() -> None:
    """Eve sends a contribution with one key, and would evaluate it with another."""
    seats = [seat("eve2", "eve"), seat("bob")]
    known = owners([*seats, seat("eve", "eve", counts=False)])
    ordered = ranking(SEED, submission(1, "eve"), seats, known)
    assert [entry.owner for entry in ordered] == ["bob"]


def test_stages_draw_different_evaluators() -> None:
    seats = [seat(f"person{n}") for n in range(9)] + [seat("new", counts=False)]
    for number in range(20):
        first = assign(SEED, submission(number), seats, owners(seats), quorum=2, stage=1)
        more = assign(SEED, submission(number), seats, owners(seats), quorum=2, stage=2)
        assert (len(first.evaluators), len(more.evaluators)) == (2, 4)
        assert not set(first.evaluators) & set(more.evaluators)
        assert len(first.probation) == 1
        assert not more.probation


def test_everybody_gets_a_share_of_the_work() -> None:
    seats = [seat(f"person{n}") for n in range(5)]
    drawn = [
        assign(SEED, submission(n), seats, owners(seats), quorum=2, stage=1) for n in range(100)
    ]
    shares = [sum(s.id in entry.evaluators for entry in drawn) for s in seats]
    assert sum(shares) == 200
    assert min(shares) > 20


def test_private_sequences_are_nobody_elses() -> None:
    found = draw_sequences(SEED, 320, 256, 32)
    assert len(found.shared) == len(set(found.shared)) == 256
    one, two = found.private("a" * 32), found.private("b" * 32)
    assert len(one) == 32
    assert not set(one) & set(found.shared)
    assert one != two


# Decisions.

TRUE = np.array([2_000_000, 2_100_000, 1_900_000, 2_050_000], np.int64)
BETTER = TRUE - np.array([50_000, 52_000, 49_000, 51_000])
SEQUENCES = draw_sequences(SEED, 8, 4, 2)


def truth(sequence: int) -> tuple[int, int]:
    """What anybody would find who measured it."""
    if sequence in SEQUENCES.shared:
        place = SEQUENCES.shared.index(sequence)
        return int(TRUE[place]), int(BETTER[place])
    return 1_000_000 + sequence, 900_000 + sequence


def honest(name: str, **changes: object) -> Measured:
    private = {sequence: truth(sequence) for sequence in SEQUENCES.private(name)}
    how = {"counts": True, "before": TRUE, "after": BETTER, "private": private} | changes
    return Measured(evaluator=name, sealing="s", **how)  # type: ignore[arg-type]


def liar(name: str, shift: int = -300_000, **changes: object) -> Measured:
    return honest(name, after=BETTER - shift, **changes)


def referee(submission: str, sequence: int) -> Ruling:
    before, after = truth(sequence)
    return Ruling(submission=submission, sequence=sequence, before=before, after=after)


def case(anchor: Measured | None, *others: Measured, stage: int = 1, **how: object) -> Case:
    known = {"quorum": 2, "precision": "float64"} | how
    return Case("c" * 32, stage, sequences=SEQUENCES, anchor=anchor, externals=others, **known)  # type: ignore[arg-type]


def test_three_who_agree_decide() -> None:
    found = decide(case(honest("h"), honest("a"), honest("b")), referee)
    assert (found.outcome, found.agreeing, found.liars, found.rulings) == (
        "credit", ("a", "b"), (), (),
    )  # fmt: skip


def test_one_liar_of_three_is_proven_to_lie_and_the_verdict_is_right() -> None:
    for lie in (-300_000, 300_000, 2):
        found = decide(case(honest("h"), honest("a"), liar("b", lie)), referee)
        assert (found.outcome, found.agreeing, found.liars) == ("credit", ("a",), ("b",))
        assert len(found.rulings) == 1


def test_who_is_off_by_the_last_digit_agrees_with_nobody_but_did_not_lie() -> None:
    found = decide(case(honest("h"), honest("a"), liar("b", 1)), referee)
    assert (found.outcome, found.liars) == (None, ())


def test_two_colluding_of_three_decide_nothing() -> None:
    found = decide(case(honest("h"), liar("a"), liar("b")), referee)
    assert (found.outcome, found.agreeing, found.liars) == (None, (), ("a", "b"))


def test_two_colluding_are_outvoted_by_more_evaluators() -> None:
    more = [honest(name) for name in "cdef"]
    found = decide(case(honest("h"), liar("a"), liar("b"), *more, stage=2), referee)
    assert (found.outcome, found.agreeing) == ("credit", ("c", "d", "e", "f"))


def test_if_all_who_were_drawn_lie_a_person_decides() -> None:
    six = [liar(name) for name in "abcdef"]
    found = decide(case(honest("h"), *six, stage=2), referee)
    assert (found.outcome, found.agreeing) == ("disputed", ())
    assert found.liars == tuple("abcdef")


@given(
    st.lists(st.sampled_from([0, 0, 1, 2, -500_000, 500_000]), max_size=6),
    st.integers(1, 2),
    st.integers(1, 3),
)
def test_no_set_of_liars_makes_a_wrong_verdict_while_the_anchor_is_honest(
    shifts: list[int], stage: int, quorum: int
) -> None:
    others = [liar(f"e{n}", shift) for n, shift in enumerate(shifts)]
    found = decide(case(honest("h"), *others, stage=stage, quorum=quorum), referee)
    assert found.outcome in {"credit", "disputed", None}
    assert set(found.liars) == {
        m.evaluator for m, s in zip(others, shifts, strict=True) if abs(s) > 1
    }


@given(st.lists(st.sampled_from([0, 5_000, -500_000]), min_size=2, max_size=6), st.integers(1, 2))
def test_an_anchor_that_lies_decides_nothing_against_one_honest_evaluator(
    shifts: list[int], stage: int
) -> None:
    others = [liar(f"e{n}", shift) for n, shift in enumerate(shifts)]
    found = decide(case(liar("h", -500_000), *others, stage=stage), referee)
    if any(shift != -500_000 for shift in shifts):
        assert found.outcome == "disputed"
        assert "anchor" in found.reason


def test_without_the_anchor_nothing_is_decided() -> None:
    assert decide(case(None, honest("a"), honest("b")), referee).outcome == "disputed"


def test_a_copier_is_caught_by_its_private_sequences() -> None:
    """It has a friend's shared results, but has to make up its own."""
    invented = dict.fromkeys(SEQUENCES.private("b"), (1000000, 900000))
    found = decide(case(honest("h"), honest("a"), honest("b", private=invented)), referee)
    assert found.liars == ("b",)
    assert (found.outcome, found.agreeing) == ("credit", ("a",))


def test_which_private_sequences_are_checked_depends_on_the_sealing() -> None:
    wide = draw_sequences(SEED, 320, 256, 32)
    private = dict.fromkeys(wide.private("b"), (1, 1))
    chosen = set()
    for sealing in range(20):
        measured = Measured("b", True, TRUE, TRUE, private, sealing=str(sealing))
        what = Case("c" * 32, 1, 2, "float64", wide, None, (measured,))
        chosen.add(tuple(private_checks(what, measured)))
    assert all(len(places) == 2 for places in chosen)
    assert len(chosen) > 10


def test_newcomers_are_compared_but_do_not_count() -> None:
    new = honest("n", counts=False)
    assert decide(case(honest("h"), honest("a"), new), referee).outcome is None
    found = decide(case(honest("h"), honest("a"), honest("b"), new), referee)
    assert (found.agreeing, found.confirmed) == (("a", "b"), ("a", "b", "n"))
    found = decide(case(honest("h"), honest("a"), honest("b"), liar("n", counts=False)), referee)
    assert (found.outcome, found.liars) == ("credit", ("n",))


def test_who_is_missing_is_replaced() -> None:
    assert decide(case(honest("h"), honest("a")), referee).outcome is None
    found = decide(case(honest("h"), honest("a"), honest("c"), stage=2), referee)
    assert found.outcome == "credit"


def test_an_auditor_with_the_rulings_decides_the_same() -> None:
    for others in ((honest("a"), liar("b")), (liar("a"), liar("b", 7)), (liar("a", 1),)):
        what = case(honest("h"), *others)
        found = decide(what, referee)
        known = {ruling.sequence: ruling for ruling in found.rulings}
        assert decide(what, lambda _, sequence, known=known: known.get(sequence)) == found


def test_float32_agrees_within_its_tolerance() -> None:
    loose = TOLERANCES["float32"]
    near = honest("a", after=BETTER + np.array([100, -100, 90, -90]))
    assert agree(honest("h"), near, loose)
    assert not agree(honest("h"), honest("a", after=BETTER + 11), loose)  # the mean is off
    assert not agree(honest("h"), honest("a", after=BETTER + np.array([101, -101, 0, 0])), loose)
    found = decide(case(honest("h"), near, honest("b"), precision="float32"), referee)
    assert (found.outcome, found.liars) == ("credit", ())
    found = decide(case(honest("h"), liar("a", 101), honest("b"), precision="float32"), referee)
    assert found.liars == ("a",)
