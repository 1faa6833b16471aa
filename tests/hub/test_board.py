"""Boards: what strangers put there does no harm, and a name is taken once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moshi_fl.evidence import evaluator_id
from moshi_fl.session import Signed, read_session
from moshi_fl.store import ANY, Author, RefUpdate
from moshi_hub.board import FolderBoard, RefBoard
from tests.support.keys import signer_of
from tests.support.sessions import Paper
from tests.support.simulator import HubSimulator

BY = Author("x", "x@x")


def ref_board(hub: HubSimulator, who: str = "") -> RefBoard:
    replica = hub.person(who) if who else hub.replica
    return RefBoard(replica.repo, replica.look().refs, 1)


def fill(board: RefBoard | FolderBoard, paper: Paper) -> None:
    for name, signed in paper.board.items():
        assert board.post(name, signed)


@pytest.fixture(scope="module")
def paper() -> Paper:
    return Paper("eve", "fay")


def test_both_boards_give_back_what_was_posted(
    hub: HubSimulator, paper: Paper, tmp_path: Path
) -> None:
    for board in (FolderBoard(tmp_path / "board"), ref_board(hub)):
        assert board.read() == {}
        fill(board, paper)
        assert board.read() == paper.board
    assert ref_board(hub, "reader").read() == paper.board


def test_a_name_is_taken_once(hub: HubSimulator, paper: Paper, tmp_path: Path) -> None:
    other = Signed(b"other", "signature")
    for board in (FolderBoard(tmp_path / "board"), ref_board(hub)):
        assert board.post("opening", paper.board["opening"])
        assert not board.post("opening", other)
        assert board.post("opening", paper.board["opening"])
        assert board.read()["opening"] == paper.board["opening"]


def test_junk_beside_the_records_does_no_harm(hub: HubSimulator, paper: Paper) -> None:
    fill(ref_board(hub), paper)
    repo, prefix = hub.replica.repo, "refs/moshi/evaluation/1/"
    big = repo.commit(
        repo.tree({"record.json": repo.put(b"x" * (12 << 20))}), message="x", author=BY, when=0
    )
    eve = evaluator_id(signer_of("eve").public_key)
    names = [f"pledge/2/{eve}", f"nonce/{'0' * 32}", "whatever", "draw/3", f"pledge/7/{eve}"]
    repo.push([RefUpdate(prefix + name, big, ANY) for name in names])
    found = ref_board(hub, "reader").read()
    assert found == paper.board
    assert len(read_session(found).attestations[1]) == 3


def test_a_squatter_gives_way_to_whose_place_it_is(hub: HubSimulator, paper: Paper) -> None:
    name = f"commitment/{evaluator_id(signer_of('eve').public_key)}"
    board = ref_board(hub)
    board.post("opening", paper.board["opening"])
    board.post(name, Signed(b"{}\n", "nothing"))
    mine = ref_board(hub, "eve")
    there = mine.read()[name]
    assert not mine.post(name, paper.board[name])
    assert mine.post(name, paper.board[name], instead=there)
    assert board.read()[name] == paper.board[name]


def test_a_folder_with_records_being_written_and_replaced_is_read_as_it_is(tmp_path: Path) -> None:
    board, stop = FolderBoard(tmp_path), threading.Event()
    records = [Signed(f"{n}\n".encode(), f"signature {n}\n") for n in range(2)]
    assert board.post("opening", records[0])

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            board.post("opening", records[(turn + 1) % 2], instead=records[turn % 2])
            turn += 1

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for _ in range(300):
            assert set(board.read()) <= {"opening"}
    finally:
        stop.set()
        writer.join()
