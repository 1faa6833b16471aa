"""The hub's side of an evaluation with appointed evaluators: as many steps as can be done now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moshi_fl.errors import HubError
from moshi_fl.evidence import Verdicts
from moshi_fl.replica import Replica
from moshi_fl.signing import Signer
from moshi_hub.agenda import awaited, is_overdue, next_step
from moshi_hub.board import RefBoard
from moshi_hub.chair import Chair
from moshi_hub.evaluator import Evaluator
from moshi_hub.measure import Desk

MAX_STEPS = 40


@dataclass(frozen=True)
class State:
    """Where a session stands, and what was done."""

    next_step: str
    awaited: list[str]
    done: list[str]
    verdicts: Verdicts | None


def host(
    replica: Replica,
    chair: Chair,
    board: RefBoard,
    forced: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> State:
    """Do what the hub can do: the anchor's part, and its own steps while nobody is awaited.

    Args:
        replica: The hub's copy on this machine.
        chair: The hub's part.
        board: Where records are put up.
        forced: Do this step whoever is awaited, and no other.
        tell: Told what was done.
    """
    done: list[str] = []

    def note(words: str) -> None:
        done.append(words)
        if tell:
            tell(words)

    anchor = evaluator(replica, chair.signer, lambda: chair.desk)
    for words in anchor.advance(board):
        note(f"the anchor {words}")
    if forced:
        note(f"the hub {chair.advance(board, forced)}")
    for _ in range(MAX_STEPS):
        for words in anchor.advance(board):
            note(f"the anchor {words}")
        session = chair.read(board)
        step, missing = next_step(session), awaited(session)
        others = [who for who in missing if who != anchor.id]
        waits = bool(others) and not (session and is_overdue(session))
        if forced or not step or waits:
            verdicts = session.verdicts if session else None
            return State(step, missing, done, verdicts)
        if missing and not others:
            continue  # another process of this hub has just done a step: the anchor is next again
        note(f"the hub {chair.act(board, session)}")
    raise HubError(
        "the evaluation makes no progress here.",
        hint="moshi-hub evaluate --step NAME   (goes on without the anchor's part)",
    )


def evaluator(
    replica: Replica,
    signer: Signer,
    desk: Callable[[], Desk],
    anchors: tuple[str, ...] = (),
) -> Evaluator:
    """An evaluator who keeps what it must remember beside the replica."""
    return Evaluator(signer, replica.folder / "evaluation" / "own", desk, anchors)
