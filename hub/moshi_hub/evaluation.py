"""The edge around an evaluation: what a hub, its open round and this machine's keys make of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from moshi_fl.errors import HubError
from moshi_fl.evidence import Evaluators, Mode
from moshi_fl.history import EVALUATORS_FILE, MAIN, read_rounds
from moshi_fl.records import Contribution, Round, digest, dump
from moshi_fl.replica import Replica
from moshi_fl.signing import Signer
from moshi_fl.store import HubRepo, PushRejected, RefUpdate
from moshi_fl.trusted import read_evaluators, read_verdicts
from moshi_hub.agenda import awaited, next_step
from moshi_hub.board import RefBoard
from moshi_hub.chair import Chair, MoreAttestations
from moshi_hub.heldout import pool_path
from moshi_hub.judging import Decided, with_anchor
from moshi_hub.local import ANCHOR, evaluate_locally, forget_sessions, local_seats, local_signer
from moshi_hub.measure import BaseModel, Desk, tokenizer_before_growth
from moshi_hub.merge import Gate
from moshi_hub.opened import OpenRound
from moshi_hub.propose import utc_now
from moshi_hub.publish import author, seconds
from moshi_hub.trust import Reputation, reputations, seats


def desk_for(replica: Replica, found: OpenRound, deltas: Path) -> Desk:
    """What it takes to measure the accepted contributions of an open round.

    Args:
        replica: The hub's copy on this machine.
        found: The open round.
        deltas: Folder of the verified deltas; kept apart from what may be removed.
    """
    newest, bases = found.snapshot.round, {}
    for number in sorted({newest, *(entry.round for entry in found.accepted)}):
        path = found.snapshot.path if number == newest else replica.pull(number).path
        missing = found.rules.bases[number].missing_rows
        bases[number] = BaseModel(
            path, tokenizer_before_growth(found.snapshot.state.tokenizer, missing)
        )
    contributions = {entry.id: entry for entry in found.accepted}
    return Desk(found.rules.config, pool_path(replica), bases, contributions, deltas)


def chair_for(replica: Replica, found: OpenRound, folder: Path, home: Path, mode: Mode) -> Chair:
    """The hub's part in the evaluation of an open round.

    Args:
        replica: The hub's copy on this machine.
        found: The open round, as ``look`` left it.
        folder: Its working folder.
        home: Folder of this user's moshi-fl data, with the anchor's key.
        mode: Who evaluates.
    """
    hub, rules = found.rules.config.hub.id, found.rules.config.evaluation
    if mode == "local":
        places = [seat for _, seat in local_seats(home, hub, rules.quorum).values()]
    else:
        listed = read_evaluators(replica.repo, found.main)
        known = known_reputations(replica.repo, found.main, found.snapshot.record)
        places = list(seats(listed, known)) if listed else []
    return Chair(
        signer=local_signer(home, hub, ANCHOR),
        mode=mode,
        seats=tuple(sorted(places, key=lambda seat: seat.key)),
        previous=found.snapshot.record,
        refs=found.snapshot.state.refs,
        repo=replica.repo,
        submissions=found.accepted[: found.rules.config.aggregation.max_contributions],
        desk=desk_for(replica, found, folder / "deltas"),
    )


def run_locally(
    replica: Replica,
    found: OpenRound,
    folder: Path,
    home: Path,
    on_step: Callable[[str], None] | None = None,
) -> Decided:
    """Evaluate an open round by this machine's own processes; goes on where it stopped."""
    forget_sessions(replica.folder / "evaluation", found.snapshot.round)
    chair = chair_for(replica, found, folder, home, "local")
    hub, quorum = found.rules.config.hub.id, found.rules.config.evaluation.quorum
    signers: dict[str, Signer] = {ANCHOR: chair.signer}
    signers |= {name: signer for name, (signer, _) in local_seats(home, hub, quorum).items()}
    return evaluate_locally(chair, signers, session_folder(replica, chair), on_step=on_step)


def session_folder(replica: Replica, chair: Chair) -> Path:
    """Where this machine keeps a local session: another one for other submissions."""
    rules = msgspec.json.encode(chair.desk.config.evaluation, order="sorted").hex()
    words = [digest(chair.previous), chair.desk.pool_digest, chair.signer.public_key, rules]
    words += [entry.id for entry in chair.submissions]
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return replica.folder / "evaluation" / f"{chair.number}-{name}"


def board_for(replica: Replica, chair: Chair) -> RefBoard:
    """Where appointed evaluators and the hub meet."""
    return RefBoard(replica.repo, chair.refs, chair.number)


def gate_for(replica: Replica, home: Path, tell: Callable[[str], None] | None = None) -> Gate:
    """What a merge asks for verdicts, given the open round and its working folder."""

    def gate(found: OpenRound, folder: Path) -> Decided | None:
        rules = found.rules.config.evaluation
        if not rules.gate or not found.accepted:
            return None
        if rules.evaluators == "local":
            if not pool_path(replica).exists():
                return None
            return run_locally(replica, found, folder, home, tell)
        chair = chair_for(replica, found, folder, home, "appointed")
        board = board_for(replica, chair)
        decided = chair.decided(board)
        if decided is None:
            raise waiting_for(chair, board)
        return decided

    return gate


def waiting_for(chair: Chair, board: RefBoard) -> MoreAttestations:
    """The error that says what an evaluation waits for."""
    session = chair.read(board)
    names = ", ".join(who[:12] for who in awaited(session)) or "the hub"
    step = next_step(session)
    return MoreAttestations(
        f"the evaluation of round {chair.number} is not over: next is {step!r}, awaited: {names}.",
        hint="moshi-hub evaluate   (does the hub's next step; evaluators run moshi-hub attest)",
    )


# The list of evaluators.


def change_evaluators(
    replica: Replica, home: Path, name: str, change: Callable[[Evaluators], Evaluators]
) -> Evaluators:
    """Commit a change of the list to main.

    Raises:
        HubError: main moved meanwhile, or may not be pushed.
    """
    state = replica.look()
    main = replica.fetch_main()
    hub = state.config.hub.id
    before = read_evaluators(replica.repo, main)
    listed = before or with_anchor(None, hub, local_signer(home, hub, ANCHOR).public_key)
    changed = change(listed)
    if changed == before:
        return changed
    repo = replica.repo
    tree = repo.tree({EVALUATORS_FILE: repo.put(dump(changed))}, base=main)
    commit = repo.commit(
        tree,
        parents=(main,),
        message="Evaluators\n",
        author=author(name),
        when=seconds(utc_now()),
    )
    try:
        repo.push([RefUpdate(MAIN, commit, main)])
    except PushRejected as error:
        raise HubError("main moved meanwhile; nothing was changed.", hint="Try again.") from error
    return changed


def known_reputations(repo: HubRepo, main: str, newest: Round) -> dict[str, Reputation]:
    """Reputation of each key that main knows."""
    rounds = read_rounds(repo, main, 0, newest.round)
    return reputations(read_verdicts(repo, main, rounds))


def named(entries: Collection[Contribution], start: str) -> Contribution:
    """The one contribution whose id begins so.

    Raises:
        HubError: None does, or several.
    """
    found = [entry for entry in entries if entry.id.startswith(start)]
    if len(found) != 1:
        what = "no accepted contribution begins" if not found else "several contributions begin"
        raise HubError(f"{what} with {start}.", hint="moshi-hub verify   (lists all)")
    return found[0]
