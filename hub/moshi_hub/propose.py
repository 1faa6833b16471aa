"""From accepted contributions to a proposed round: weights, files and an almost finished record.

Computes only; nothing here talks to a hub. The locations in the record are filled in by
``moshi_hub.publish``, which knows the commits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

import moshi_fl
from moshi_fl.errors import HubError
from moshi_fl.history import HubState
from moshi_fl.hubfile import HubConfig, StorageRules
from moshi_fl.records import (
    Contribution,
    Evaluation,
    Growth,
    Location,
    Merged,
    Round,
    Strategy,
    Update,
    digest,
)
from moshi_fl.restore import StrategyFinder, aggregate, delta_name, median_norm
from moshi_fl.rules import Claim, accepted_characters, owner_of, round_weights, weighting
from moshi_fl.snapshot import encode_keyframe, encode_step, grow
from moshi_fl.tokenizer import CharVocabulary
from moshi_fl.weights import Weights, count_parameters, sha256_bytes, weights_digest
from moshi_hub.judging import Decided
from moshi_hub.verify import Rules

STEP_WORTH_TRYING = 0.1
"""Below this fraction of the weights' bytes, the deltas are surely smaller than their step."""

ROUNDS_PER_KEYFRAME = 64
"""However small the updates are: the manifest holds at most twice as many rounds, and every client
fetches it in every round."""

Evaluator = Callable[[Weights, bytes], tuple[float, int, str]]
"""Mean held-out loss, number of sequences and digest of the pool, for weights and a tokenizer."""


@dataclass(frozen=True)
class Proposal:
    """The next round before it has a place on the hub.

    ``deltas`` holds one file per contribution, named by id. When ``update_files`` is a step, they
    are published beside it, for audit.
    """

    record: Round
    config: HubConfig
    tokenizer: bytes
    weights: Weights
    contributions: Mapping[str, Contribution]
    deltas: Path
    update_files: tuple[Path, ...]
    keyframe_files: tuple[Path, ...] = ()
    decided: Decided | None = None
    """The evaluation that the contributions passed; None when they were not evaluated."""
    left_out: tuple[str, ...] = ()
    """Ids that the maintainer excluded."""

    @property
    def delta_files(self) -> tuple[Path, ...]:
        """The contributions' deltas."""
        return tuple(self.deltas / delta_name(merged) for merged in self.record.contributions)


def propose(
    state: HubState,
    rules: Rules,
    base: Weights,
    contributions: Sequence[Contribution],
    folder: Path,
    *,
    strategy: Strategy,
    find_strategy: StrategyFinder,
    evaluate: Evaluator | None,
) -> Proposal:
    """Make the next round.

    Args:
        state: The hub as it stands.
        rules: Rules of the open round, with the settings that main has now.
        base: Weights of the newest round.
        contributions: Those to take in, all verified.
        folder: Working folder; ``folder/deltas/<id>.safetensors`` are the verified deltas.
        strategy: How to aggregate.
        find_strategy: Looks up a strategy by name.
        evaluate: Measures held-out loss; None when there is no held-out data here.
    """
    merged = weigh(contributions, rules)
    record = draft(state, rules, merged, strategy)
    weights = aggregate(base, record, folder / "deltas", find_strategy)
    kind, files = _update_files(base, weights, record, folder)
    growth, tokenizer = growth_of(state, rules.config, contributions)
    if growth:
        tensors = record.vocabulary_tensors
        weights = grow(weights, tensors, growth.characters, growth.byte_row)
    keyframe: tuple[Path, ...] = ()
    update_bytes = sum(path.stat().st_size for path in files)
    if needs_keyframe(rules.config.storage, state.manifest.rounds, update_bytes):
        keyframe = keyframe_files(weights, folder / "keyframe")
    record = msgspec.structs.replace(
        record,
        weights=weights_digest(weights),
        parameters=count_parameters(weights),
        tokenizer=sha256_bytes(tokenizer),
        update=msgspec.structs.replace(_update_of(record), kind=kind),
        median_norm=median_norm(base, record, folder / "deltas"),
        growth=growth,
        evaluation=evaluation_of(evaluate, (base, state.tokenizer), (weights, tokenizer)),
    )
    by_id = {contribution.id: contribution for contribution in contributions}
    return Proposal(
        record, rules.config, tokenizer, weights, by_id, folder / "deltas", files, keyframe
    )


def weigh(contributions: Sequence[Contribution], rules: Rules) -> tuple[Merged, ...]:
    """Each contribution's place in the round, in order of id."""
    ordered = sorted(contributions, key=lambda contribution: contribution.id)
    claims = [
        Claim(owner_of(entry), entry.num_examples, rules.round - entry.round) for entry in ordered
    ]
    weights = round_weights(weighting(rules.config.aggregation), claims)
    return tuple(
        Merged(
            id=entry.id,
            owner=claim.owner,
            base_round=entry.round,
            weight=weight,
            missing_rows=rules.bases[entry.round].missing_rows,
        )
        for entry, claim, weight in zip(ordered, claims, weights, strict=True)
    )


def draft(state: HubState, rules: Rules, merged: tuple[Merged, ...], strategy: Strategy) -> Round:
    """The next round's record as far as it is known before aggregation."""
    newest, delta = state.newest, rules.config.delta
    nowhere = Location(ref=state.refs.update(newest.round + 1), commit="0" * 40, files=())
    return Round(
        hub=newest.hub,
        round=newest.round + 1,
        previous=digest(newest),
        weights=newest.weights,
        parameters=newest.parameters,
        tokenizer=newest.tokenizer,
        vocabulary_tensors=newest.vocabulary_tensors,
        update=Update(
            kind="deltas", location=nowhere, codec=delta.codec, codec_options=delta.options
        ),
        strategy=strategy,
        weighting=weighting(rules.config.aggregation),
        contributions=merged,
        created=utc_now(),
        software=software(),
    )


def software() -> str:
    """Name and version, as records state them."""
    return f"moshi-fl {moshi_fl.__version__}"


def utc_now() -> str:
    """The present second, as records write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _update_of(record: Round) -> Update:
    if record.update is None:
        raise ValueError("a draft always has an update")
    return record.update


def _update_files(
    base: Weights, weights: Weights, record: Round, folder: Path
) -> tuple[str, tuple[Path, ...]]:
    """The smaller way to publish a round: the deltas themselves, or the step that they make.

    A strategy of Flower's may round differently on another machine, so its result is always
    published as a step.
    """
    deltas = tuple(folder / "deltas" / delta_name(merged) for merged in record.contributions)
    size = sum(path.stat().st_size for path in deltas)
    total = sum(array.nbytes for array in base.values())
    exact = record.strategy is not None and ":" not in record.strategy.name
    if exact and size <= STEP_WORTH_TRYING * total:
        return "deltas", deltas
    out = folder / "step"
    out.mkdir()
    step = tuple(out / file.name for file in encode_step(base, weights, out))
    if exact and size <= sum(path.stat().st_size for path in step):
        shutil.rmtree(out)
        return "deltas", deltas
    return "step", step


def keyframe_files(weights: Weights, folder: Path) -> tuple[Path, ...]:
    """Write a keyframe's files into a new folder."""
    folder.mkdir()
    return tuple(folder / file.name for file in encode_keyframe(weights, folder))


def growth_of(
    state: HubState, config: HubConfig, contributions: Sequence[Contribution]
) -> tuple[Growth | None, bytes]:
    """Characters that join the vocabulary in this round, and the tokenizer that knows them."""
    if not state.newest.vocabulary_tensors:
        return None, state.tokenizer
    vocabulary = CharVocabulary.from_bytes(state.tokenizer)
    known = set(vocabulary.characters)
    proposals = ["".join(set(entry.proposed_characters) - known) for entry in contributions]
    characters = accepted_characters(config.vocabulary, vocabulary.size, proposals)
    if not characters:
        return None, state.tokenizer
    growth = Growth(characters=characters, byte_row=vocabulary.byte_row)
    return growth, vocabulary.grown(characters).to_bytes()


def needs_keyframe(rules: StorageRules, rounds: Sequence[Round], update_bytes: int) -> bool:
    """Whether the next round carries whole weights.

    It does when the updates since the last keyframe would exceed half of it, so that a cold start
    never costs more than one and a half keyframes, at any age; and after ``ROUNDS_PER_KEYFRAME``.
    """
    if rules.keyframes == "every-round":
        return True
    since = update_bytes
    for record in rounds[:-ROUNDS_PER_KEYFRAME:-1]:
        if record.keyframe:
            return 2 * since > record.keyframe.bytes
        since += record.update.location.bytes if record.update else 0
    return True


def evaluation_of(
    evaluate: Evaluator | None, before: tuple[Weights, bytes], after: tuple[Weights, bytes]
) -> Evaluation | None:
    """Held-out loss of two models, each with its tokenizer; None where it cannot be measured.

    Raises:
        HubError: A loss is not finite. No record can say it, so no client could read the round.
    """
    if evaluate is None:
        return None
    old, _, _ = evaluate(*before)
    new, sequences, pool = evaluate(*after)
    for loss, which in ((old, "the newest round"), (new, "the proposed round")):
        if not math.isfinite(loss):
            raise HubError(
                f"the held-out loss of {which} is {loss}: no round is proposed.",
                hint="moshi-hub merge --exclude ID   (leaves out a contribution that spoils it)",
            )
    return Evaluation(before=old, after=new, sequences=sequences, pool=pool)
