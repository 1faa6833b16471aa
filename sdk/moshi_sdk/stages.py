"""The stages of a contribution: train, measure, encode, and fit to what the hub has become.

Each leaves its result in the run's folder, and is skipped where that is there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import UnsetType

import moshi_fl
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.errors import Rejected, TrainingError
from moshi_fl.feedback import Feedback, Merged
from moshi_fl.history import HubState
from moshi_fl.hubfile import HubConfig
from moshi_fl.models.common import trained_part
from moshi_fl.models.family import Corpus, Task
from moshi_fl.records import Contribution, Metrics, Privacy, dump
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.rules import grown_rows
from moshi_fl.signing import Signer
from moshi_fl.snapshot import lengthened
from moshi_fl.submit import delta_location, is_merged, merged_test
from moshi_fl.text import Figure
from moshi_fl.train import Progress, Recipe
from moshi_fl.weights import Array, Weights, open_weights, save_weights, write_atomic
from moshi_sdk.earlier import lands_on
from moshi_sdk.planning import recipe_of
from moshi_sdk.privacy import Account, run_name, stated
from moshi_sdk.runs import Change, Run

HELD_OUT_SEQUENCES = 32


class Listener(Protocol):
    """What a caller may want to hear of."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins or ends."""
        ...

    def step(self, progress: Progress) -> None:
        """A training step is done."""
        ...

    def reading(self, done: float, total: float) -> None:
        """So many seconds of sound are encoded, of so many; nothing where all are known."""
        ...


class Silent:
    """A listener that hears nothing."""

    def stage(self, name: str, text: str) -> None:
        """Ignore a stage."""

    def step(self, progress: Progress) -> None:
        """Ignore a step."""

    def reading(self, done: float, total: float) -> None:
        """Ignore a piece of sound."""


@dataclass(frozen=True)
class Work:
    """What all stages share."""

    replica: Replica
    snapshot: Snapshot
    task: Task
    run: Run
    listener: Listener
    signer: Signer
    account: Account
    budget: float  # most epsilon, of a run with differential privacy
    replace: bool = False
    withdrawn: str = ""  # id of the contribution that this one replaces
    corpus: Corpus | None = field(default=None, repr=False)

    @property
    def state(self) -> HubState:
        """The hub as it is."""
        return self.snapshot.state

    @property
    def config(self) -> HubConfig:
        """Its settings."""
        return self.state.config


def train_and_encode(work: Work) -> Contribution:
    """The record of what training on the run's data has changed; its delta lies in the run.

    Raises:
        Rejected: The data is no longer that of the plan.
        TrainingError: Training failed; the last good checkpoint stays.
    """
    corpus = work.corpus or _read_again(work)
    recipe, plan = recipe_of(work.run.plan), work.run.plan
    privacy = _spend(work)
    if not work.run.trained.exists():
        _train(work, corpus, recipe)
    base, trained = open_weights(work.run.base), open_weights(work.run.trained)
    delta = _difference(trained, base)
    if privacy:  # losses and characters follow from data, and no accounting covers them
        work.listener.stage("measure", "not measured: with --dp the record has no losses")
        return _encode(work, delta, plan.base_round, plan.base, privacy=privacy)
    metrics = _measure(work, corpus, base, {**base, **trained}, recipe.device)
    proposed = corpus.summary.proposed_characters[:1000]
    fields = {"metrics": metrics, "proposed_characters": proposed}
    return _encode(work, delta, plan.base_round, plan.base, **fields)


def _difference(trained: Weights, base: Weights) -> dict[str, Array]:
    return {name: np.subtract(trained[name], base[name]) for name in trained}


def _spend(work: Work) -> Privacy | None:
    """Enter a run with differential privacy in the ledger, before it learns anything."""
    plan = work.run.plan
    if isinstance(plan.privacy, UnsetType):
        return None
    privacy = stated(plan.privacy, plan.training.steps)
    name = run_name(work.run.ledger_name)
    ledger = work.account.spend(name, plan.base_round, privacy, work.budget)
    work.listener.stage(
        "privacy",
        f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each window of this data; "
        f"{ledger.total:g} spent in all",
    )
    return privacy


def _measure(work: Work, corpus: Corpus, base: Weights, trained: Weights, device: str) -> Metrics:
    pool = work.task.pool(corpus, HELD_OUT_SEQUENCES, seed=0, held_out=True)
    before, after = (_measured(work.task, weights, pool, device) for weights in (base, trained))
    metrics = Metrics(held_out_before=before.loss, held_out_after=after.loss)
    said = f"loss on your held-out part {before.loss:.4f} -> {after.loss:.4f}"
    work.listener.stage("measure", said)
    told = [name for name in before.figures if name in after.figures]
    if told:
        found = {n: Change(round(before.figures[n], 6), round(after.figures[n], 6)) for n in told}
        changes = (f"{n} {Figure(c.before)} -> {Figure(c.after)}" for n, c in found.items())
        work.listener.stage("measure", "; ".join(changes))
        work.run.keep_figures(found)
    return metrics


def _read_again(work: Work) -> Corpus:
    plan = work.run.plan
    paths = [Path(path) for path in plan.data]
    corpus = work.task.read(paths, seed=0, max_bytes=plan.max_bytes)
    if corpus.fingerprint != plan.fingerprint:
        raise Rejected(
            "the data has changed since this contribution was started, so it cannot be resumed.",
            hint="moshi-fl contribute --data PATH   (starts a new one on the data as it is now)",
        )
    return corpus


def _train(work: Work, corpus: Corpus, recipe: Recipe) -> None:
    from moshi_fl.flower import arrays_in, local_context, train_message
    from moshi_sdk.client import ONLY_TRAINED, app, job_config, watched

    state = work.state
    tokenizer = work.run.tokenizer.read_bytes() if work.run.tokenizer.exists() else state.tokenizer
    config = job_config(state.config.family, state.config.model_table, tokenizer, recipe)
    message = train_message(open_weights(work.run.base), {**config, ONLY_TRAINED: True})
    context = local_context(checkpoint=str(work.run.checkpoint))
    with watched(work.listener.step, corpus):
        try:
            reply = app(message=message, context=context)
        except TrainingError as error:
            lower = "a lower learning rate (--lr)"
            hint = f"Try again with {lower}; nothing was sent. --discard drops this run."
            raise TrainingError(str(error), hint=hint) from error
    save_weights(work.run.trained, arrays_in(reply))
    work.run.checkpoint.unlink(missing_ok=True)


class _Measured(NamedTuple):
    """What is found of a model on a pool; ``figures`` where its family can say more."""

    loss: float
    figures: Mapping[str, float]


def _measured(task: Task, weights: Weights, pool: bytes, device: str) -> _Measured:
    import torch

    from moshi_fl.models.common import explained, model_of

    module, place = model_of(task, weights).to(device), torch.device(device)
    loss = round(float(task.evaluate(module, pool, place).mean()), 6)
    return _Measured(loss, explained(task, module, pool, place))


def _encode(work: Work, delta: Weights, number: int, base: str, **fields: Any) -> Contribution:
    """Encode a delta against a round, and make the record with these further fields."""
    rules, plan = work.config.delta, work.run.plan
    codec = get_codec(rules.codec, rules.options)
    carry = _carry(work) or {}
    waiting = {name: part for name, part in carry.items() if name not in delta}
    carry = {name: part for name, part in carry.items() if name in delta}
    entries, rest = encode_delta(delta, codec, carry)
    data = delta_bytes(entries, codec)
    # What earlier ones could not say of a part that did not train now waits until it does again.
    save_weights(work.run.carry, {**waiting, **rest})
    write_atomic(work.run.delta, data)
    contribution = Contribution(
        hub=work.config.hub.id,
        round=number,
        base=base,
        family=plan.family,
        codec=rules.codec,
        contributor=plan.contributor,
        key=plan.key,
        delta=delta_location(work.replica.repo, work.state.refs, number, data),
        num_examples=plan.training.steps * plan.training.batch_size,
        training=plan.training,
        software=f"moshi-fl {moshi_fl.__version__}",
        **fields,
    )
    write_atomic(work.run.record, dump(contribution))
    trained = trained_part(work.task)(entries)
    work.listener.stage("encode", f"{len(data):,} bytes as {rules.codec}; {trained}")
    return contribution


def _carry(work: Work) -> Weights | None:
    """What earlier contributions could not say, unless it would break a promise of privacy."""
    feedback = Feedback(work.replica.folder / "feedback")
    base = feedback.base(_merged(work))
    if work.run.plan.is_private and not feedback.is_private(base):
        work.listener.stage(
            "privacy", "what the codec could not say of earlier contributions without --dp is left"
        )
        return None
    return feedback.load(base)


def _merged(work: Work) -> Merged:
    """Whether a contribution became part of a round: what is withdrawn never will."""
    test = merged_test(work.replica, work.state)
    return lambda entry, number: False if entry == work.withdrawn else test(entry, number)


def fit_to_present(work: Work, contribution: Contribution) -> tuple[Contribution, str]:
    """Rebase a contribution whose base has become too old; without retraining."""
    age = work.state.newest.round - contribution.round
    if age <= 0:
        return contribution, ""
    if is_merged(work.replica, work.state, contribution):
        return contribution, ""
    if lands_on(work.state, contribution.round) == contribution.round:
        return contribution, f"the hub moved {age} round(s) on{_discount(work.config, age)}"
    return _rebase(work, contribution, age)


def _discount(config: HubConfig, age: int) -> str:
    """What its age costs a contribution, where the strategy goes by weights at all."""
    rules = config.aggregation
    if rules.strategy not in {"fedavg", "flower:FedAvg"}:
        return ""
    return f"; it counts {rules.staleness_discount**age:.0%} for that"


def _rebase(work: Work, contribution: Contribution, age: int) -> tuple[Contribution, str]:
    newest = work.state.newest
    delta = _difference(open_weights(work.run.trained), open_weights(work.run.base))
    later = work.replica.chain(work.state, work.run.plan.base_round + 1)
    rows = grown_rows(later)
    rebased = _encode(
        work,
        lengthened(delta, newest.vocabulary_tensors, rows),
        newest.round,
        newest.weights,
        privacy=contribution.privacy,
        proposed_characters=contribution.proposed_characters,
        rebased_from=contribution.round,
    )
    return rebased, f"the hub moved {age} rounds on; the delta was rebased to round {newest.round}"


def remember(work: Work, contribution: Contribution) -> None:
    """Keep what the codec could not say, for the next contribution."""
    feedback = Feedback(work.replica.folder / "feedback")
    before = feedback.base(_merged(work))
    if work.run.carry.exists() and before != contribution.id:
        carry, private = open_weights(work.run.carry), work.run.plan.is_private
        feedback.sent(contribution.id, contribution.round, carry, before, private=private)
