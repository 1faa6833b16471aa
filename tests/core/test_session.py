"""Sessions on paper: what a reader refuses, and what it passes over."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_fl import evidence
from moshi_fl.errors import MoshiError, UntrustedHub
from moshi_fl.evidence import Closing, Draw, Opening, Sealing, Verdicts, evaluator_id
from moshi_fl.records import Record, load
from moshi_fl.session import Signed, board_of, evidence_files, read_session
from moshi_fl.verdicts import check_verdicts, decide_all, measurements
from tests.support.keys import signer_of
from tests.support.sessions import Paper

BAD = (-30_000, 50_000)


def id_of(name: str) -> str:
    return evaluator_id(signer_of(name).public_key)


@pytest.fixture(scope="module")
def paper() -> Paper:
    return Paper("eve", "fay", gains=BAD)


def test_a_right_session_gives_right_verdicts(paper: Paper) -> None:
    verdicts = paper.verdicts()
    assert [entry.outcome for entry in verdicts.judged] == ["reject", "credit"]
    assert [entry.gain for entry in verdicts.judged] == list(BAD)
    check_verdicts(verdicts, paper.board)
    assert board_of(evidence_files(paper.board)) == paper.board


@pytest.mark.parametrize(
    ("step", "kind", "change"),
    [
        ("closing", Closing, lambda _: {"root": "0" * 64}),
        ("closing", Closing, lambda r: {"submissions": r.submissions[::-1]}),
        ("closing", Closing, lambda r: {"submissions": r.submissions[:1]}),
        ("closing", Closing, lambda _: {"opening": "0" * 64}),
        ("closing", Closing, lambda r: {"commitments": (*r.commitments, "f" * 64)}),
        ("draw/1", Draw, lambda _: {"seed": "0" * 64}),
        ("draw/1", Draw, lambda r: {"assignments": r.assignments[::-1]}),
        ("draw/1", Draw, lambda _: {"assignments": ()}),
        ("draw/1", Draw, lambda r: {"reveals": r.reveals[1:]}),
        ("draw/1", Draw, lambda _: {"stage": 2}),
        ("sealing/1", Sealing, lambda r: {"commitments": (*r.commitments, "f" * 64)}),
        ("sealing/1", Sealing, lambda _: {"draw": "0" * 64}),
    ],
)
def test_a_hub_that_contradicts_itself_is_refused(
    paper: Paper, step: str, kind: type[Record], change: Callable[[Record], dict[str, object]]
) -> None:
    lying = Paper.__new__(Paper)
    lying.board = dict(paper.board)
    record = load(paper.board[step].record, kind, name=step)
    lying.say(step, "hub", msgspec.structs.replace(record, **change(record)))
    with pytest.raises(UntrustedHub):
        read_session(lying.board)


@pytest.mark.parametrize("step", ["opening", "closing", "draw/1", "sealing/1"])
def test_only_the_anchor_speaks_for_the_hub(paper: Paper, step: str) -> None:
    forged = Paper.__new__(Paper)
    forged.board = dict(paper.board)
    data = paper.board[step].record
    from tests.support.keys import signature_by

    forged.board[step] = Signed(data, signature_by("eve", data, "moshi-fl-evaluation-v1"))
    with pytest.raises(UntrustedHub):
        read_session(forged.board)
    forged.board[step] = Signed(data, signature_by("hub", data, "moshi-fl-attestation-v1"))
    with pytest.raises(UntrustedHub):
        read_session(forged.board)


def test_what_a_stranger_says_is_passed_over(paper: Paper) -> None:
    board = dict(paper.board)
    stolen = board[f"commitment/{id_of('eve')}"]
    board[f"commitment/{id_of('mallory')}"] = stolen
    session = read_session(board)
    assert set(session.commitments) == {id_of("hub"), id_of("eve"), id_of("fay")}
    assert any("no seat" in why for why in session.ignored.values())


def test_an_attestation_that_was_not_pledged_does_not_count(paper: Paper) -> None:
    name = f"attestation/1/{id_of('eve')}"
    changed = Paper.__new__(Paper)
    changed.board = dict(paper.board)
    record = load(paper.board[name].record, evidence.Attestation, name=name)
    changed.say(name, "eve", msgspec.structs.replace(record, results=record.results[:1]))
    session = read_session(changed.board)
    assert id_of("eve") not in session.attestations[1]
    assert "committed" in session.ignored[name]
    decisions = decide_all(session, lambda *_: None)
    assert {decision.outcome for decision in decisions.values()} == {None}


def test_a_late_pledge_does_not_count() -> None:
    paper = Paper("eve", "fay")
    sealing = load(paper.board["sealing/1"].record, Sealing, name="sealing")
    session = read_session(paper.board)
    late = evidence.evaluator_id(signer_of("fay").public_key)
    from moshi_fl.records import digest

    kept = tuple(c for c in sealing.commitments if c != digest(session.pledges[1][late]))
    paper.say("sealing/1", "hub", msgspec.structs.replace(sealing, commitments=kept))
    session = read_session(paper.board)
    assert late not in session.attestations[1]
    assert "too late" in session.ignored[f"attestation/1/{late}"]


def test_losses_that_are_none_are_passed_over(paper: Paper) -> None:
    session = read_session(paper.board)
    eve = id_of("eve")
    found = session.attestations[1][eve]
    for text in ("AAAA", "", "////////////////////////////////", "x"):
        broken = msgspec.structs.replace(found.results[0], shared=text)
        session.attestations[1][eve] = msgspec.structs.replace(
            found, results=(broken, *found.results[1:])
        )
        assert eve not in measurements(session, broken.submission)


SPECIAL = [b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"true", b"{" * 3000, b"\xff", b"[]"]


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        data = data[:at] + draw(st.sampled_from([b"", *SPECIAL])) + data[end:]
    return data


@given(st.data())
@settings(max_examples=300)
def test_mutated_records_are_refused_in_words(paper: Paper, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(paper.board)))
    signed = paper.board[name]
    broken = Signed(data.draw(mutated(signed.record)), signed.signature)
    try:
        session = read_session({**paper.board, name: broken})
    except MoshiError:
        return
    assert broken == signed or name.count("/") or name == "verdicts"
    for entry in session.closing.submissions if session.closing else ():
        measurements(session, entry.id)


@given(st.data())
@settings(max_examples=200)
def test_mutated_verdicts_and_ledgers_are_refused_in_words(
    paper: Paper, data: st.DataObject
) -> None:
    from moshi_fl.records import dump

    valid = dump(paper.verdicts())
    found = data.draw(mutated(valid))
    try:
        record = load(found, Verdicts, name="verdicts")
        check_verdicts(record, paper.board)
    except MoshiError:
        return
    assert found == valid or record.evidence != paper.verdicts().evidence


def test_an_opening_is_strict() -> None:
    with pytest.raises(MoshiError):
        load(b"{}\n", Opening, name="opening")
