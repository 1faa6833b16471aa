"""Between a hub and the one whose round it began with: where each stands, and what is to be done.

Reads both hubs and what this machine remembers; ``moshi_hub.upward`` and ``moshi_hub.taking`` act.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from moshi_fl.errors import HubError
from moshi_fl.feedback import Feedback
from moshi_fl.history import read_contributions
from moshi_fl.records import (
    Contribution,
    Growth,
    Round,
    dump,
    load,
)
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.rules import grown_rows
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.upstream import Origin, Stand, stand_of
from moshi_fl.weights import Weights, write_atomic
from moshi_hub.outbox import PASSED_FILE, Outbox, Passed, Prepared, Told


class Bridge:
    """Between a hub and the one that it began with.

    Args:
        replica: This hub's copy on this machine.
        upstream: The other's.
    """

    def __init__(self, replica: Replica, upstream: Replica) -> None:
        self.replica, self.upstream = replica, upstream

    @cached_property
    def below(self) -> Snapshot:
        """This hub's newest round."""
        self.replica.repo.prepare()
        return self.replica.pull()

    @cached_property
    def above(self) -> Snapshot:
        """The other hub's newest round."""
        return self.upstream.pull()

    @cached_property
    def rounds(self) -> list[Round]:
        """All rounds of this hub."""
        return self.replica.chain(self.below.state, 0)

    @cached_property
    def stand(self) -> Stand:
        """Where this hub last took the other's weights.

        Raises:
            HubError: It began with none, or with those of a third hub.
        """
        found, other = stand_of(self.rounds), self.above.state.config.hub.id
        here, there = self.replica.repo.shown_url, self.upstream.repo.shown_url
        if found is None:
            raise HubError(
                f"{here} did not begin with another hub's round.",
                hint=f"moshi-hub init PATH --upstream {there}   (makes a hub that does)",
            )
        if found.origin.hub != other:
            raise HubError(
                f"{here} stands on hub {found.origin.hub}, and {there} is hub {other}.",
                hint="--upstream URL   (of the hub that it began with)",
            )
        return found

    @property
    def folder(self) -> Path:
        """Where this machine keeps what goes up."""
        return self.replica.folder / "upward" / self.stand.origin.hub

    @property
    def feedback(self) -> Feedback:
        """What the other hub's codec could not say yet."""
        return Feedback(self.folder / "feedback")

    @property
    def outbox(self) -> Outbox:
        """What goes up, as this hub itself has it."""
        return Outbox(self.replica.repo, self.below.state.refs.upward)

    @cached_property
    def told(self) -> Told:
        """What the hub said when it was asked last; not what concerns another hub, or a past."""
        return self._ours(self.outbox.read())

    def _ours(self, told: Told) -> Told:
        passed = told.waiting.passed if told.waiting else told.passed
        if passed is None:
            return told
        is_ours = passed.upstream == self.stand.origin.hub and passed.last <= self.below.round
        return told if is_ours else Told(told.commit)

    def passed(self) -> Passed | None:
        """What was sent last, from here or from another machine."""
        path, told = self.folder / PASSED_FILE, self.told.passed
        own = load(path.read_bytes(), Passed, name=path.name) if path.exists() else None
        return max((one for one in (own, told) if one), key=lambda one: one.last, default=None)

    def claim(self, prepared: Prepared, signature: str, delta: bytes) -> None:
        """Let a contribution wait on the hub: from here on it is sent, and no other.

        Raises:
            HubError: Another machine was faster.
        """
        self.told = self.outbox.claim(self.told, prepared, signature, delta)

    def note_sent(self) -> None:
        """Remember that what waited was sent, on the hub and here.

        Raises:
            HubError: Another machine has gone on meanwhile.
        """
        self.told = self.outbox.note(self.told)
        assert self.told.passed is not None
        write_atomic(self.folder / PASSED_FILE, dump(self.told.passed))

    def first_unsent(self) -> int:
        """The round after which nothing has been sent yet; what waits is not sent."""
        passed, waiting = self.passed(), self.told.waiting
        known = (passed.last if passed else 0, waiting.passed.first if waiting else 0)
        return max(self.stand.number, *known)

    def must_wait(self) -> bool:
        """Whether the other hub has this one's contribution to its newest round already."""
        passed = self.passed()
        return passed is not None and passed.round >= self.above.round

    def is_behind(self) -> bool:
        """Whether the other hub has a round that this one could take."""
        return self.above.round > self.stand.origin.round

    def weights(self, number: int) -> Weights:
        """This hub's weights of a round."""
        if number == self.below.round:
            return self.below.load()
        return self.replica.pull(number).load()

    def contributions(self, rounds: Sequence[Round]) -> list[Contribution]:
        """What went into these rounds of this hub."""
        repo, main = self.replica.repo, self.replica.fetch_main()
        return list(read_contributions(repo, main, *rounds).values())

    def missing_rows(self) -> int:
        """Rows by which the other hub's vocabulary has grown since this one took a round."""
        later = self.upstream.chain(self.above.state, self.stand.origin.round)[1:]
        return grown_rows(later)

    def to_take(self) -> Origin | None:
        """The other hub's newest round, when there is one to take and all is sent."""
        if not self.is_behind() or self.first_unsent() < self.below.round:
            return None
        return Origin.of(self.above.record)

    def growth(self) -> Growth | None:
        """Characters that the other hub's vocabulary has gained meanwhile.

        Raises:
            HubError: It is not this hub's vocabulary with more at its end.
        """
        own, theirs = self.below.state.tokenizer, self.above.state.tokenizer
        if own == theirs:
            return None
        if self.below.record.vocabulary_tensors:
            before, after = CharVocabulary.from_bytes(own), CharVocabulary.from_bytes(theirs)
            if after.characters.startswith(before.characters):
                new = after.characters[len(before.characters) :]
                return Growth(characters=new, byte_row=before.byte_row)
        raise HubError(
            f"the vocabulary of {self.upstream.repo.shown_url} does not go on from this hub's.",
            hint="[vocabulary] max_size = 256 keeps a hub from growing on its own",
        )
