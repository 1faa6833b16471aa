"""Reputations: a fold over the verdicts, and who may evaluate because of them."""

from __future__ import annotations

import pytest

from moshi_fl.evidence import Evaluator, Evaluators, Tally, Verdicts
from moshi_fl.records import Location
from moshi_hub.trust import Reputation, beta_cdf, beta_quantile, reputations, seats, status
from tests.support.keys import signer_of

ANN = signer_of("ann").public_key
EVE = signer_of("eve").public_key
NOWHERE = Location(ref="refs/moshi/evidence/1", commit="0" * 40, files=())


def verdicts(*tallies: tuple[str, int, int], mode: str = "appointed") -> Verdicts:
    return Verdicts(
        hub="0" * 16,
        round=1,
        opening="0" * 64,
        mode=mode,  # type: ignore[arg-type]
        anchor=ANN,
        judged=(),
        rulings=(),
        tallies=tuple(Tally(key=k, confirmed=c, lies=n) for k, c, n in tallies),
        evidence=NOWHERE,
    )


# Tables: scipy.stats.beta.ppf(p, a, b), version 1.17.
@pytest.mark.parametrize(
    ("p", "a", "b", "wanted"),
    [
        (0.05, 1.0, 1.0, 0.05),
        (0.05, 6.0, 1.0, 0.6069622310029),
        (0.05, 5.0, 1.0, 0.5492802716530),
        (0.05, 10.0, 2.0, 0.6356405107528),
        (0.05, 2.0, 10.0, 0.0333192176842),
        (0.5, 3.0, 3.0, 0.5),
    ],
)
def test_quantiles_are_those_of_the_tables(p: float, a: float, b: float, wanted: float) -> None:
    assert beta_quantile(p, a, b) == pytest.approx(wanted, abs=1e-9)


def test_quantiles_with_one_parameter_of_one_have_a_closed_form() -> None:
    for a in (0.3, 1.0, 4.5, 60.0, 900.0):
        assert beta_quantile(0.05, a, 1.0) == pytest.approx(0.05 ** (1 / a), abs=1e-10)
        assert beta_quantile(0.05, 1.0, a) == pytest.approx(1 - 0.95 ** (1 / a), abs=1e-10)


def test_the_quantile_inverts_the_distribution() -> None:
    for a, b in ((0.25, 11.0), (17.3, 11.0), (300.0, 21.0), (1.0, 1.0)):
        assert beta_cdf(beta_quantile(0.05, a, b), a, b) == pytest.approx(0.05, abs=1e-9)


def test_five_confirmed_verdicts_make_a_newcomer_eligible() -> None:
    entry = Evaluator(key=ANN, owner="ann")
    for confirmed, wanted in ((0, "probation"), (4, "probation"), (5, "eligible")):
        known = reputations([verdicts((ANN, confirmed, 0))])
        assert status(entry, known[ANN]) == wanted


def test_time_fades_what_was_learned() -> None:
    known = reputations([verdicts((ANN, 5, 0)), None])
    assert known[ANN].alpha == pytest.approx(1 + 0.98 * 5)
    assert reputations([verdicts((ANN, 5, 0))] + [None] * 400)[ANN].alpha < 1.01


def test_a_proven_lie_suspends_and_a_second_revokes() -> None:
    entry = Evaluator(key=EVE, owner="eve", vouched=True)
    once = reputations([verdicts((EVE, 39, 0)), verdicts((EVE, 0, 1))])[EVE]
    assert once.alpha == pytest.approx((1 + 0.98 * 39) / 4)
    assert once.beta == pytest.approx(11)
    assert status(entry, once) == "suspended"
    again = reputations([verdicts((EVE, 0, 1)), verdicts((EVE, 0, 1))])[EVE]
    assert status(entry, again) == "revoked"
    recovered = Reputation(alpha=200.0, beta=5.0, lies=2)
    assert status(entry, recovered) == "revoked"


def test_processes_of_one_machine_earn_nothing() -> None:
    assert reputations([verdicts((ANN, 50, 0), mode="local")]) == {}


def test_seats_go_to_those_who_may_evaluate() -> None:
    people = [
        Evaluator(key=signer_of("vouched").public_key, owner="a", vouched=True),
        Evaluator(key=signer_of("new").public_key, owner="b"),
        Evaluator(key=signer_of("gone").public_key, owner="c", vouched=True, revoked=True),
        Evaluator(key=EVE, owner="d", vouched=True),
    ]
    listed = Evaluators(hub="0" * 16, anchors=(ANN,), evaluators=tuple(people))
    found = seats(listed, {EVE: Reputation(lies=1)})
    assert {(seat.owner, seat.counts) for seat in found} == {("a", True), ("b", False)}
