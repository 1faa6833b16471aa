"""Audit: recompute published rounds from their accepted contributions, bit for bit.

Trusts neither the merger nor the hub: ids are compared with record contents, signatures with the
records' keys, deltas with records, weights with the rules, verdicts and ledger with attestations,
and the recomputed model with the published digest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from moshi_fl.errors import CorruptRecord, HubError, UntrustedHub
from moshi_fl.evidence import Verdicts
from moshi_fl.history import (
    HubState,
    check_chain,
    check_one_per_key,
    check_signatures,
    first_rival,
    read_contributions,
    read_rounds,
    round_branch,
)
from moshi_fl.records import Contribution, Location, Round
from moshi_fl.replica import MAX_MAIN_PACK, Replica
from moshi_fl.restore import (
    StrategyFinder,
    advance,
    aggregate,
    delta_name,
    fetch_locations,
    grown,
    median_norm,
)
from moshi_fl.rules import MEASURES_NORMS, Claim, owner_of, round_weights, running_norm
from moshi_fl.taken import check_taken
from moshi_fl.trusted import check_evaluation, external_attestations
from moshi_fl.upstream import Origin, origin_of
from moshi_fl.weights import Weights, weights_digest


@dataclass(frozen=True)
class Finding:
    """What the audit of one round found.

    ``identical`` is None when the round could not be recomputed because the hub no longer keeps
    its deltas; ``problem`` says what is wrong, or why it could not be done. ``proposed``: the
    round waits for its publication. ``origin``: what it takes of another hub, if it does.
    """

    round: int
    contributions: int
    identical: bool | None
    weights: str
    problem: str = ""
    proposed: bool = False
    origin: Origin | None = None


class Auditor:
    """Audits rounds of one hub, oldest first.

    Args:
        replica: The hub's copy on this machine.
        find_strategy: Looks up an aggregation strategy by name.
        on_round: Called with each round's number before it is recomputed.
        upstream: The hub that this one takes rounds of; None leaves its word for them.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        find_strategy: StrategyFinder,
        on_round: Callable[[int], None] | None = None,
        upstream: Replica | None = None,
    ) -> None:
        self._replica = replica
        self._upstream = upstream
        self._find_strategy = find_strategy
        self._on_round = on_round
        self._main = ""
        self._state: HubState | None = None

    def audit(self, first: int, last: int) -> Iterator[Finding]:
        """Recompute rounds ``first`` to ``last``; round 0 is random weights and has nothing to it.

        Raises:
            HubError: The hub cannot be reached, or does not have these rounds.
            SigningError: There is no ssh-keygen that can check signatures.
        """
        state = self._replica.look()
        if not 1 <= first <= last <= state.newest.round:
            newest = state.newest.round
            asked = f"round {first}" if first == last else f"rounds {first} to {last}"
            raise HubError(f"{asked} cannot be audited: {_range(newest)}", hint=_instead(newest))
        self._main, self._state = self._replica.fetch_main(), state
        chain = self._replica.chain(state, first - 1)
        weights: Weights | None = None
        for base, record in itertools.pairwise(chain[: last - first + 2]):
            if self._on_round:
                self._on_round(record.round)
            finding, weights = self._audit_round(record, base, weights)
            yield finding

    def audit_beginning(self) -> Finding:
        """Whose weights round 0 has; there is nothing to recompute.

        Raises:
            HubError: The hub, or the one that it takes rounds of, cannot be reached.
        """
        record = self._replica.chain(self._replica.look(), 0)[0]
        try:
            origin = self._check_origin(record)
        except UntrustedHub as error:
            return Finding(0, 0, False, "", str(error))
        return Finding(0, 0, None, record.weights, origin=origin)

    def audit_proposed(self, number: int) -> Finding:
        """Recompute the round that waits for its publication on branch ``round/N``.

        Raises:
            HubError: The hub cannot be reached, or there is no such proposal.
        """
        state, repo, branch = self._replica.look(), self._replica.repo, round_branch(number)
        present = repo.remote_refs(branch)
        if number != state.newest.round + 1 or branch not in present:
            raise HubError(
                f"round {number} cannot be audited: {_range(state.newest.round)} "
                f"It is not proposed either: the hub has no {branch}.",
                hint=_instead(state.newest.round),
            )
        local = "refs/moshi-fl/proposed"
        fetched = repo.fetch({branch: local}, max_bytes=MAX_MAIN_PACK, expect=present)
        self._main, self._state = fetched[local], state
        record = read_rounds(repo, self._main, number, number)[0]
        if self._on_round:
            self._on_round(number)
        try:
            check_chain([state.newest, record])
        except UntrustedHub as error:
            count = len(record.contributions)
            return Finding(number, count, False, "", str(error), proposed=True)
        return replace(self._audit_round(record, state.newest, None)[0], proposed=True)

    def _audit_round(
        self, record: Round, base: Round, at_hand: Weights | None
    ) -> tuple[Finding, Weights | None]:
        count = len(record.contributions)
        try:
            if not base.round:  # no audit of its own compares round 0 when others are audited
                self._check_origin(base)
            origin = self._check_origin(record)
            contributions = read_contributions(self._replica.repo, self._main, record)
            check_signatures(self._replica.repo, self._main, record, contributions)
            check_weights(record, contributions)
            assert self._state is not None
            check_one_per_key(record, self._replica.chain(self._state, first_rival(record)))
            check_running_norm(record, base)
            derive_verdicts(self._replica, self._main, record, base, contributions)
            known = at_hand or self._replica.pull(base.round).load()
            if origin:
                weights = self._take_over(record, known)
            else:
                weights = self._recompute(record, known, contributions)
        except (UntrustedHub, CorruptRecord) as error:
            return Finding(record.round, count, False, "", str(error)), None
        except HubError as error:
            return Finding(record.round, count, None, "", str(error)), None
        found = weights_digest(weights)
        if found != record.weights:
            problem = f"recomputed {found[:12]}, published {record.weights[:12]}"
            return Finding(record.round, count, False, found, problem), None
        return Finding(record.round, count, True, found, origin=origin), weights

    def _check_origin(self, record: Round) -> Origin | None:
        """What a round takes of another hub, compared with that hub where it is at hand."""
        origin = origin_of(record)
        if origin and self._upstream:
            check_taken(record, origin, self._upstream)
        return origin

    def _take_over(self, record: Round, base: Weights) -> Weights:
        """What the step of a round leads to that takes another hub's weights."""
        assert record.update is not None
        with self._replica.scratch() as scratch, self._replica.workspace() as files:
            folder = fetch_locations(scratch, [record.update.location], files)[0]
            weights = advance(base, record, folder)
            return {name: array.copy() for name, array in weights.items()}

    def _recompute(
        self, record: Round, base: Weights, contributions: dict[str, Contribution]
    ) -> Weights:
        place = _deltas(record)
        with self._replica.scratch() as scratch, self._replica.workspace() as files:
            folder = fetch_locations(scratch, [place], files)[0]
            recorded = {file.name: file.sha256 for file in place.files}
            for merged in record.contributions:
                entry = contributions[merged.id]
                if recorded.get(delta_name(merged)) != entry.delta.files[0].sha256:
                    raise UntrustedHub(f"the delta of {merged.id[:12]} is not its contributor's.")
            check_median_norm(record, median_norm(base, record, folder))
            weights = grown(aggregate(base, record, folder, self._find_strategy), record)
            return {name: array.copy() for name, array in weights.items()}


def check_weights(record: Round, contributions: dict[str, Contribution]) -> None:
    """Insist that each contribution weighs what the round's own rule gives it.

    Raises:
        UntrustedHub: One does not, or has another owner; names it.
    """
    claims = []
    for merged in record.contributions:
        entry = contributions[merged.id]
        claims.append(Claim(owner_of(entry), entry.num_examples, record.round - 1 - entry.round))
    wanted = round_weights(record.weighting, claims)
    for merged, claim, weight in zip(record.contributions, claims, wanted, strict=True):
        if merged.owner != claim.owner:
            raise UntrustedHub(
                f"contribution {merged.id[:12]} is said to be {merged.owner[:60]!r}'s, "
                f"by its record it is {claim.owner[:60]!r}'s."
            )
        if (merged.base_round, merged.weight) != (contributions[merged.id].round, weight):
            raise UntrustedHub(
                f"contribution {merged.id[:12]} weighs {merged.weight}, by the rule {weight}."
            )


def derive_verdicts(
    replica: Replica,
    main: str,
    record: Round,
    base: Round,
    contributions: Mapping[str, Contribution],
) -> Verdicts | None:
    """Verdicts and ledger must follow from the attestations that the hub keeps.

    Raises:
        UntrustedHub: They do not.
        HubError: The hub no longer keeps the attestations.
    """
    with replica.scratch() as scratch, replica.workspace() as files:
        return check_evaluation(replica.repo, scratch, files, main, record, base, contributions)


def count_attestations(replica: Replica, record: Round) -> int:
    """Agreeing attestations of independent evaluators that a round rests on.

    Raises:
        HubError, UntrustedHub: As for ``derive_verdicts``.
    """
    if record.round == 0:
        return 0
    main = replica.fetch_main()
    base = read_rounds(replica.repo, main, record.round - 1, record.round - 1)[0]
    check_chain([base, record])
    contributions = read_contributions(replica.repo, main, record)
    return external_attestations(
        record, derive_verdicts(replica, main, record, base, contributions)
    )


def check_running_norm(record: Round, previous: Round) -> None:
    """Insist that a strategy that goes by norms of earlier rounds was given theirs.

    Raises:
        UntrustedHub: It was given others.
    """
    strategy = record.strategy
    if strategy is None or strategy.name not in MEASURES_NORMS:
        return
    found, wanted = strategy.options.get("running_norm"), running_norm(previous)
    if found != wanted:
        raise UntrustedHub(f"its running norm is {found!r}, by the rule {wanted!r}.")


def check_median_norm(record: Round, found: float | None) -> None:
    """Insist on the median norm that the deltas have.

    Raises:
        UntrustedHub: The record states another.
    """
    if record.median_norm != found:
        raise UntrustedHub(
            f"its median norm is said to be {record.median_norm!r}; the deltas' is {found!r}."
        )


def _deltas(record: Round) -> Location:
    if record.update and record.update.kind == "deltas":
        return record.update.location
    if record.archive is None:
        raise HubError("the hub has not kept this round's deltas.")
    return record.archive


def _range(newest: int) -> str:
    if newest > 1:
        return f"the hub has rounds 1 to {newest}."
    return "the hub has round 1 and no other." if newest else "the hub has only round 0."


def _instead(newest: int) -> str:
    if not newest:
        return "moshi-fl audit   (without --round; until a maintainer has published a round)"
    return f"--round {newest} or less; --all audits every round"
