"""What the hub does in a session: open, close, draw, seal, decide. Each step is one signed record.

A step can be repeated: whoever comes second finds it done. What a step says follows from the board,
the settings and the clock, so a process that was killed leaves nothing to mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moshi_fl.draw import counts
from moshi_fl.errors import ConfigError, DataError, Exit, HubError
from moshi_fl.evidence import Closing, Draw, Mode, Opening, Sealing, Seat, Submission
from moshi_fl.history import Refs
from moshi_fl.merkle import leaf, merkle_root
from moshi_fl.records import Contribution, File, Location, Record, Round, digest, dump
from moshi_fl.session import (
    Session,
    Signed,
    board_of,
    draw_assignments,
    draw_seed,
    evidence_files,
    read_session,
)
from moshi_fl.signing import EVALUATION_NAMESPACE, Signer
from moshi_fl.store import NOREPLY, Author, HubRepo
from moshi_fl.verdicts import check_verdicts, decide_all, to_escalate, verdicts_of
from moshi_fl.weights import sha256_bytes
from moshi_hub.agenda import counted, next_step
from moshi_hub.board import Board
from moshi_hub.judging import Decided
from moshi_hub.measure import Desk, Meter, referee
from moshi_hub.propose import utc_now
from moshi_hub.publish import seconds

STEPS = ("open", "close", "draw", "seal", "decide")


class MoreAttestations(HubError):
    """The evaluation is not over: others must do their part first."""

    exit_code = Exit.MORE_ATTESTATIONS


@dataclass(frozen=True)
class Chair:
    """The hub in a session.

    Attributes:
        signer: The anchor's key.
        mode: Whether the evaluators are this machine's own processes.
        seats: Who may take part.
        previous: The newest round.
        refs: Names of the hub's refs.
        repo: Store for the commit of the evidence.
        submissions: Contributions that passed the gate.
        desk: What it takes to measure.
    """

    signer: Signer
    mode: Mode
    seats: tuple[Seat, ...]
    previous: Round
    refs: Refs
    repo: HubRepo
    submissions: Sequence[Contribution]
    desk: Desk

    @property
    def number(self) -> int:
        """The round that shall come of it."""
        return self.previous.round + 1

    def read(self, board: Board) -> Session | None:
        """The session as it stands; None before it is opened.

        Raises:
            UntrustedHub: The board holds records that this hub's anchor did not make.
        """
        found = board.read()
        if "opening" not in found:
            return None
        session = read_session(found)
        if session.opening.anchor != self.signer.public_key:
            raise ConfigError(
                "the evaluation was opened with another anchor key than this machine's.",
                hint="run it where it was opened; moshi-hub evaluators list shows the anchor",
            )
        if session.opening.previous != digest(self.previous):
            raise HubError(
                f"an evaluation of round {self.number} is there that follows another round "
                f"{self.previous.round}.",
                hint="moshi-hub doctor   (shows what is wrong with the hub)",
            )
        return session

    def advance(self, board: Board, step: str) -> str:
        """Do one step that a maintainer asks for; returns in words what was done.

        Raises:
            ConfigError: It is not the next one.
        """
        session = self.read(board)
        wanted = next_step(session)
        if step != wanted:
            raise ConfigError(
                f"the next step of this evaluation is {wanted or 'none: it is decided'}.",
                hint="moshi-hub evaluate   (does the next step)",
            )
        return self.act(board, session)

    def act(self, board: Board, session: Session | None) -> str:
        """Do the next step of a session that was just read; returns in words what was done.

        Where another process of this hub has done it meanwhile, its record stays.
        """
        if session is None:
            return self._post(board, "opening", self._opening(), "opened the evaluation")
        return {
            "close": self._close,
            "draw": self._draw,
            "seal": self._seal,
            "decide": self._decide,
        }[next_step(session)](board, session)

    def decided(self, board: Board) -> Decided | None:
        """The verdicts, when there are any."""
        found = board.read()
        session = self.read(board)
        verdicts = session.verdicts if session else None
        if session is None or verdicts is None:
            return None
        listed = verdicts.evidence.files
        every = evidence_files(found)
        files = {file.name: every[file.name] for file in listed if file.name in every}
        session = check_verdicts(verdicts, board_of(files))
        commit_evidence(self.repo, self.refs, session, files)
        return Decided(verdicts, found["verdicts"], session, files)

    def _opening(self) -> Opening:
        rules = self.desk.config.evaluation
        size = Meter(self.desk, rules.precision).size()
        if size < 2:
            raise DataError(
                f"the held-out pool has {size} sequence(s); a verdict takes at least 2.",
                hint="moshi-hub pool new --eval-data PATH",
            )
        shared, private = counts(size, rules.sequences, rules.private_sequences)
        return Opening(
            hub=self.previous.hub,
            round=self.number,
            previous=digest(self.previous),
            mode=self.mode,
            anchor=self.signer.public_key,
            seats=self.seats,
            pool=self.desk.pool_digest,
            pool_sequences=size,
            sequences=shared,
            private_sequences=private,
            precision=rules.precision,
            share=rules.share,
            quorum=rules.quorum,
            hours=rules.hours,
            created=utc_now(),
        )

    def _close(self, board: Board, session: Session) -> str:
        submissions = tuple(
            Submission(id=entry.id, record=digest(entry), key=entry.key)
            for entry in sorted(self.submissions, key=lambda entry: entry.id)
        )
        record = Closing(
            opening=digest(session.opening),
            commitments=_digests(session.commitments.values()),
            submissions=submissions,
            root=merkle_root([leaf(entry) for entry in submissions]).hex(),
            created=utc_now(),
        )
        return self._post(board, "closing", record, f"closed over {len(submissions)} contributions")

    def _draw(self, board: Board, session: Session) -> str:
        closing = session.closing
        assert closing is not None
        seed = draw_seed(closing, session.reveals)
        return self._post_draw(board, session, seed, closing.submissions, 1)

    def _post_draw(
        self,
        board: Board,
        session: Session,
        seed: str,
        submissions: Iterable[Submission],
        stage: int,
    ) -> str:
        assert session.closing is not None
        reveals = session.draws[1].reveals if stage > 1 else _digests(session.reveals.values())
        record = Draw(
            closing=digest(session.closing),
            stage=stage,
            reveals=reveals,
            seed=seed,
            assignments=draw_assignments(session, seed, submissions, stage),
            created=utc_now(),
        )
        return self._post(board, f"draw/{stage}", record, f"drew the evaluators of stage {stage}")

    def _seal(self, board: Board, session: Session) -> str:
        stage = session.stage
        record = Sealing(
            draw=digest(session.draws[stage]),
            commitments=_digests(session.pledges[stage].values()),
            created=utc_now(),
        )
        return self._post(board, f"sealing/{stage}", record, f"sealed stage {stage}")

    def _decide(self, board: Board, session: Session) -> str:
        opening = session.opening
        meter = Meter(self.desk, opening.precision, opening.share)
        decisions = decide_all(session, referee(meter))
        if more := to_escalate(session, decisions):
            self._post_draw(board, session, session.seed, more, 2)
            return f"drew more evaluators for {len(more)} contribution(s)"
        found = board.read()
        files = evidence_files({name: found[name] for name in counted(session)})
        evidence = commit_evidence(self.repo, self.refs, session, files)
        verdicts = verdicts_of(session, decisions, evidence)
        return self._post(board, "verdicts", verdicts, "decided")

    def _post(self, board: Board, name: str, record: Record, words: str) -> str:
        data = dump(record)
        signed = Signed(data, self.signer.sign(data, EVALUATION_NAMESPACE))
        return words if board.post(name, signed) else f"{words} (somebody else was faster)"


def _digests(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(sorted(map(digest, records)))


def commit_evidence(
    repo: HubRepo, refs: Refs, session: Session, files: dict[str, bytes]
) -> Location:
    """Make the orphan commit of a session's records in the local store."""
    ref = refs.evidence(session.opening.round)
    blobs = dict(zip(files, repo.put_many(list(files.values())), strict=True))
    when = seconds(session.sealings[session.stage].created)
    author = Author("moshi-fl", NOREPLY)
    commit = repo.commit(repo.tree(blobs), message=f"{ref}\n", author=author, when=when)
    listed = tuple(
        File(name=name, bytes=len(data), sha256=sha256_bytes(data))
        for name, data in sorted(files.items())
    )
    return Location(ref=ref, commit=commit, files=listed)
