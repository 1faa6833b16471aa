"""Evaluators who lie, copy, come late or do not come; on a real hub, told as stories."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from moshi_fl.evidence import Attestation, evaluator_id, pack, unpack
from moshi_fl.session import board_of
from moshi_fl.verdicts import check_verdicts
from moshi_hub.trust import reputations, status
from tests.support.keys import signer_of
from tests.support.sessions import Court, shifted
from tests.support.simulator import HubSimulator


def id_of(name: str) -> str:
    return evaluator_id(signer_of(name).public_key)


def liars(court: Court) -> set[str]:
    return {tally.key for tally in court.verdicts().tallies if tally.lies}


@pytest.fixture
def hub(tmp_path: Path) -> HubSimulator:
    return HubSimulator.copied(tmp_path, evaluation={"sequences": 12}, delta={"codec": "f32"})


def test_honest_evaluators_agree_to_the_last_digit(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    good, bad = court.helpful(), court.harmful()
    court.run("eve", "fay")
    judged = {entry.submission: entry for entry in court.verdicts().judged}
    assert judged[good.id].outcome == "credit"
    assert judged[good.id].gain > 0
    assert judged[bad.id].outcome == "reject"
    assert set(judged[good.id].attesters) == {id_of("eve"), id_of("fay")}
    assert {tally.confirmed for tally in court.verdicts().tallies} == {2}


def test_one_liar_of_three_is_caught_and_the_verdict_is_right(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    bad = court.harmful()
    court.person("fay", shifted(500_000))
    court.run("eve", "fay")
    verdicts = court.verdicts()
    assert verdicts.judged[0].outcome == "reject"
    assert verdicts.judged[0].submission == bad.id
    assert liars(court) == {signer_of("fay").public_key}
    assert verdicts.rulings
    known = reputations([verdicts])
    listed = {entry.owner: entry for entry in court_list(court)}
    fay = signer_of("fay").public_key
    assert status(listed["fay"], known[fay]) == "suspended"


def court_list(court: Court):
    from moshi_fl.trusted import read_evaluators

    listed = read_evaluators(court.replica.repo, court.replica.fetch_main())
    assert listed
    return listed.evaluators


def test_two_colluding_of_three_prove_only_that_they_lie(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    court.harmful()
    for name in ("eve", "fay"):
        court.person(name, shifted(500_000))
    court.run("eve", "fay")
    assert court.verdicts().judged[0].outcome == "disputed"
    assert liars(court) == {signer_of(name).public_key for name in ("eve", "fay")}


def test_two_colluding_are_outvoted_by_more_evaluators(hub: HubSimulator) -> None:
    names = ["eve", "fay", "gus", "hal", "ida", "jon"]
    court = Court(hub, *names)
    bad = court.harmful()
    session = court.run(*names, until="seal")
    drawn = set(session.draws[1].assignments[0].evaluators)
    for name in names:
        if id_of(name) in drawn:
            court.person(name, shifted(500_000))
            path = court.people[name].folder
            for kept in path.glob("attestation-*"):
                kept.unlink()
    # Their honest pledges are on the board already; the same story with lies from the start:
    for ref, oid in hub.refs().items():
        if "/pledge/" in ref:
            from moshi_fl.store import RefUpdate

            hub.replica.repo.push([RefUpdate(ref, None, oid)])
    session = court.run(*names)
    judged = court.verdicts().judged[0]
    assert (judged.submission, judged.outcome) == (bad.id, "reject")
    assert len(judged.attesters) == 4
    assert {evaluator_id(key) for key in liars(court)} == drawn
    assert set(session.draws) == {1, 2}


def test_when_everybody_lies_nothing_is_accepted(hub: HubSimulator) -> None:
    names = ["eve", "fay", "gus", "hal", "ida", "jon"]
    court = Court(hub, *names)
    court.harmful()
    for name in names:
        court.person(name, shifted(500_000))
    court.run(*names)
    assert court.verdicts().judged[0].outcome == "disputed"
    assert len(liars(court)) == 6


def test_a_copier_is_caught_by_its_private_sequences(hub: HubSimulator) -> None:
    """It has an honest friend's shared numbers, and measures nothing itself."""
    court = Court(hub, "eve", "fay")
    court.helpful()

    def copy(found: Attestation) -> Attestation:
        def invent(entry):
            size = len(unpack_any(entry.private))
            return msgspec.structs.replace(entry, private=pack([5_000_000] * size))

        return msgspec.structs.replace(
            found,
            bases=tuple(map(invent, found.bases)),
            results=tuple(map(invent, found.results)),
        )

    court.person("fay", copy)
    court.run("eve", "fay")
    assert liars(court) == {signer_of("fay").public_key}
    assert court.verdicts().judged[0].outcome == "credit"


def unpack_any(text: str) -> list[int]:
    import base64

    size = len(base64.b64decode(text)) // 4
    return unpack(text, size, name="test").tolist()


def test_who_comes_after_the_sealing_does_not_count(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay", "gus")
    court.helpful()
    session = court.run("eve", "fay", "gus", until="seal")
    drawn = session.draws[1].assignments[0].evaluators
    late = next(name for name in ("eve", "fay", "gus") if id_of(name) in drawn)
    court_two = Court.__new__(Court)
    court_two.__dict__ |= court.__dict__
    # One pledge never came in time: take it off the board before it is sealed.
    from moshi_fl.store import RefUpdate

    ref = session_ref(f"pledge/1/{id_of(late)}")
    hub.replica.repo.push([RefUpdate(ref, None, hub.refs()[ref])])
    others = [name for name in ("eve", "fay", "gus") if name != late]
    chair, board = court.chair(), court.board()
    chair.advance(board, "seal")
    court.person(late).advance(court.board_of(late))  # now it comes
    session = court.run(*others, late)
    judged = court.verdicts().judged[0]
    assert id_of(late) not in judged.attesters
    assert judged.outcome == "credit"  # the third evaluator stood in
    assert len(judged.attesters) == 2


def session_ref(step: str) -> str:
    return f"refs/moshi/evaluation/1/{step}"


def test_who_does_not_reveal_its_nonce_is_not_drawn(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay", "gus")
    court.helpful()
    session = court.run(
        "eve", "fay", "gus", absent=lambda name, step: name == "gus" and step == "draw"
    )
    assert id_of("gus") in session.commitments
    assert id_of("gus") not in session.reveals
    assert id_of("gus") not in session.draws[1].assignments[0].evaluators
    assert court.verdicts().judged[0].outcome == "credit"


def test_nobody_evaluates_their_own_contribution(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay", "ann")
    mine = court.helpful("ann")
    session = court.run("eve", "fay", "ann")
    assert session.draws[1].assignments[0].submission == mine.id
    assert set(session.draws[1].assignments[0].evaluators) == {id_of("eve"), id_of("fay")}


def test_newcomers_learn_and_do_not_count(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    court.appoint("new", vouched=False)
    court.helpful()
    court.run("eve", "fay", "new")
    judged = court.verdicts().judged[0]
    assert id_of("new") not in judged.attesters
    tallies = {evaluator_id(tally.key): tally.confirmed for tally in court.verdicts().tallies}
    assert tallies[id_of("new")] == 1


def test_the_evidence_gives_the_verdicts_again_and_nothing_else_does(hub: HubSimulator) -> None:
    court = Court(hub, "eve", "fay")
    court.helpful()
    court.person("fay", shifted(400_000))
    court.run("eve", "fay")
    decided = court.decided()
    board = board_of(dict(decided.files))
    check_verdicts(decided.verdicts, board)
    from moshi_fl.errors import UntrustedHub

    entry = decided.verdicts.judged[0]
    lies = [
        msgspec.structs.replace(decided.verdicts, rulings=()),
        msgspec.structs.replace(decided.verdicts, tallies=()),
        msgspec.structs.replace(
            decided.verdicts, judged=(msgspec.structs.replace(entry, gain=entry.gain + 1),)
        ),
        msgspec.structs.replace(
            decided.verdicts, judged=(msgspec.structs.replace(entry, outcome="neutral"),)
        ),
        msgspec.structs.replace(decided.verdicts, judged=()),
    ]
    for lie in lies:
        with pytest.raises(UntrustedHub):
            check_verdicts(lie, board)
    for name in board:
        with pytest.raises(UntrustedHub):
            check_verdicts(decided.verdicts, {k: v for k, v in board.items() if k != name})
