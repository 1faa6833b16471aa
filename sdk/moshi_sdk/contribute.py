"""Contribute: train the global weights on local data, and send what was learned to the hub.

Stages, each of which leaves its result on disk and is skipped when that is already there: plan,
train (in a Flower ``ClientApp``), measure, encode, sign, send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import UnsetType

import moshi_fl
from moshi_fl.codec import get_codec
from moshi_fl.codec.delta import delta_bytes, encode_delta
from moshi_fl.config import absolute
from moshi_fl.config import home as default_home
from moshi_fl.data import told_left_out
from moshi_fl.errors import ConfigError, HubError, Rejected, TrainingError
from moshi_fl.feedback import Feedback, Merged
from moshi_fl.forge.base import Forge
from moshi_fl.history import HubState
from moshi_fl.hubfile import HubConfig
from moshi_fl.models.common import able_to_read, require_part, trained_part
from moshi_fl.models.family import (
    Corpus,
    DataSummary,
    Explains,
    Task,
    TellsOfReading,
    Windowed,
)
from moshi_fl.policy import NO_DEMANDS, Policy
from moshi_fl.pull_request import forge_of, propose, pushing_to
from moshi_fl.records import Contribution, Metrics, Privacy, dump
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.rules import grown_rows
from moshi_fl.signing import Signer, own_signer
from moshi_fl.snapshot import lengthened
from moshi_fl.submit import (
    Sent,
    delta_location,
    is_merged,
    merged_test,
    signature_of,
    submit,
)
from moshi_fl.text import Figure
from moshi_fl.train import Progress, Recipe
from moshi_fl.weights import Array, Weights, open_weights, save_weights, write_atomic
from moshi_sdk.earlier import earlier_one, first_look, lands_on, make_way, said_of
from moshi_sdk.identity import before_sending, check_key
from moshi_sdk.planning import Options, make_plan, recipe_of
from moshi_sdk.privacy import BUDGET, Account, run_name, stated
from moshi_sdk.runs import Change, Run, RunPlan, Runs
from moshi_sdk.sync import SyncManager

__all__ = ["Listener", "Options", "Outcome", "contribute", "discard", "load_task", "resume"]

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
class Outcome:
    """What became of a contribution.

    Attributes:
        contribution: Its record; ``contribution.id`` names it.
        sent: Where it went; None after a dry run.
        data: What was taken from the user's paths, when they were read this time.
        note: What the hub's having moved on meant for it, if it had.
        url: Its pull request, or the page on which one can be opened; empty without a forge.
        problem: Why there is no pull request, where there should be one.
        trained: Which part of the model was trained.
        tensors: How many tensors the delta carries; None when it is no longer on this machine.
        figures: What its family can tell beside the loss, before and after, by name.
    """

    contribution: Contribution
    sent: Sent | None
    data: DataSummary | None = None
    note: str = ""
    url: str = ""
    problem: str = ""
    trained: str = "all"
    tensors: int | None = None
    figures: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
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
        return self.snapshot.state

    @property
    def config(self) -> HubConfig:
        return self.state.config


def contribute(
    hub: str,
    data: Sequence[Path | str],
    options: Options | None = None,
    *,
    home: Path | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Train on ``data`` and send the delta to ``hub``.

    Doing the same again continues what was interrupted, and sends nothing twice.

    Args:
        hub: Path or URL of the hub.
        data: Files and folders with training data. They never leave this machine.
        options: The contributor's decisions.
        home: Folder of this user's moshi-fl data.
        listener: Hears of stages and steps.

    Raises:
        HubError: The hub cannot be reached or refuses.
        DataError: Nothing usable is in the data.
        TrainingError: Training failed; the last good checkpoint stays.
        Rejected: This key has another contribution to the same round, which is not to be replaced.
        SigningError: The key cannot be used; nothing was sent.
    """
    options, listener, home = options or Options(), listener or Silent(), home or default_home()
    manager = SyncManager(hub, home=home, root=options.root, policy=options.policy)
    signer = own_signer(home, options.key, interactive=options.interactive)
    snapshot = manager.pull()
    listener.stage("sync", _whence(snapshot))
    task = _told_of(able_to_read(load_task(snapshot.state), snapshot.load), listener)
    if options.privacy and not isinstance(task, Windowed):
        raise ConfigError(
            f"models of the family {snapshot.state.config.family} cannot be trained with "
            "differential privacy.",
            hint="leave out --dp",
        )
    require_part(task, options.trains or snapshot.state.config.training.trains)
    paths = tuple(absolute(Path(path)) for path in data)
    corpus = task.read(paths, seed=0, max_bytes=options.max_bytes)
    listener.stage("data", describe(corpus.summary))
    plan = make_plan(snapshot, task, corpus, paths, options, signer.public_key)
    runs = Runs(manager.replica.folder / "runs")
    run = runs.of(plan)
    before = first_look(manager.replica, snapshot, runs, run, options)
    for name, text in (*before_sending(runs.sent(), plan, signer), *said_of(before)):
        listener.stage(name, text)
    run = runs.start(plan, snapshot)
    account = Account(home, snapshot.state.config.hub.id)
    budget = options.privacy.budget if options.privacy else BUDGET
    shared = (manager.replica, snapshot, task, run, listener, signer)
    withdrawn = before.id if before and options.replace else ""
    work = _Work(*shared, account, budget, options.replace, withdrawn, corpus)
    return _finish(work, options.dry_run)


def resume(  # noqa: PLR0913 - one parameter an option
    hub: str,
    *,
    home: Path | None = None,
    listener: Listener | None = None,
    dry_run: bool = False,
    key: Path | None = None,
    interactive: bool = False,
    root: str = "",
    policy: Policy = NO_DEMANDS,
    privacy_budget: float = BUDGET,
    replace: bool = False,
) -> Outcome:
    """Continue the last unfinished contribution to ``hub``, as it was planned.

    Args:
        hub: Path or URL of the hub.
        home: Folder of this user's moshi-fl data.
        listener: Hears of stages and steps.
        dry_run: Send nothing.
        key: The contributor's own SSH key, if it was begun with one.
        interactive: Whether ssh-keygen may ask on the terminal.
        root: Fingerprint that the hub's root of trust must have; empty trusts the one it has.
        policy: What else is demanded of the hub's newest round.
        privacy_budget: Most epsilon, for a run with differential privacy that has not begun.
        replace: Withdraw what this key has open on the same round.

    Raises:
        MoshiError: There is none.
        Rejected: This key has another contribution to the same round, which is not to be replaced.
        SigningError: The key cannot be used, or it is not the one that it was begun with.
    """
    listener, home = listener or Silent(), home or default_home()
    manager = SyncManager(hub, home=home, root=root, policy=policy)
    runs = Runs(manager.replica.folder / "runs")
    run = runs.resume()
    signer = own_signer(home, key, interactive=interactive)
    check_key(run.plan, signer)
    snapshot = manager.pull()
    wanted = Options(dry_run=dry_run, replace=replace)
    before = first_look(manager.replica, snapshot, runs, run, wanted)
    for name, text in (*before_sending(runs.sent(), run.plan, signer), *said_of(before)):
        listener.stage(name, text)
    listener.stage("sync", f"{_whence(snapshot)}; resuming from round {run.plan.base_round}")
    tokenizer = run.tokenizer.read_bytes() if run.tokenizer.exists() else None
    task = able_to_read(load_task(snapshot.state, tokenizer), lambda: open_weights(run.base))
    task = _told_of(task, listener)
    account = Account(home, snapshot.state.config.hub.id)
    shared = (manager.replica, snapshot, task, run, listener, signer)
    withdrawn = before.id if before and replace else ""
    work = _Work(*shared, account, privacy_budget, replace, withdrawn)
    return _finish(work, dry_run)


def discard(hub: str, *, home: Path | None = None) -> RunPlan:
    """Drop the last unfinished contribution to ``hub`` with all its work; what it was about.

    Raises:
        MoshiError: There is none, or a process is working on it.
    """
    manager = SyncManager(hub, home=home or default_home())
    return Runs(manager.replica.folder / "runs").discard().plan


def _told_of(task: Task, listener: Listener) -> Task:
    """The task, whose listener hears how far its reading is."""
    return task.telling(listener.reading) if isinstance(task, TellsOfReading) else task


def _whence(snapshot: Snapshot) -> str:
    trust = "trusting from now on its root" if snapshot.first_contact else "signed under root"
    text = f"round {snapshot.round}, {trust} {snapshot.root}"
    return text if snapshot.online else f"{text}, from the cache: {snapshot.problem}"


def load_task(state: HubState, tokenizer: bytes | None = None) -> Task:
    """The hub's model family, configured; with the newest tokenizer unless another is given."""
    from moshi_fl.models import get_family

    tokenizer = state.tokenizer if tokenizer is None else tokenizer
    return get_family(state.config.family).load(state.config.model_table, tokenizer)


def describe(summary: DataSummary) -> str:
    """One line about what was taken and what was left."""
    files = "1 file" if summary.files == 1 else f"{summary.files} files"
    text = f"{files}, {summary.bytes:,} bytes, {summary.tokens:,} tokens"
    left = told_left_out(summary.skipped, summary.left_out)
    return f"{text}; left out: {left}" if left else text


def _finish(work: _Work, dry_run: bool) -> Outcome:
    summary = work.corpus.summary if work.corpus else None
    with work.run.at_work():
        contribution = work.run.contribution()
        if contribution is None:
            contribution = _train_and_encode(work)
        if dry_run:
            return _outcome(work, contribution, summary)
        contribution, note = _fit_to_present(work, contribution)
        made = replace(_outcome(work, contribution, summary), note=note)
        signature = signature_of(work.run.signature, contribution, work.signer)
        forge = forge_of(work.replica)
        with _kept():
            sent = _send(work, contribution, signature, forge)
        _remember(work, contribution)
        work.run.mark_sent()
    url, problem = propose(forge, contribution)
    return replace(made, sent=sent, url=url, problem=problem)


def _send(work: _Work, contribution: Contribution, signature: str, forge: Forge) -> Sent:
    to = pushing_to(forge, work.replica)
    place = (work.run.plan.key, contribution.round, contribution.id)
    before = earlier_one(work.replica, work.state, to, *place)
    old = make_way(before, replace=work.replace)
    shared = (work.replica, work.state, contribution, signature, work.run.delta, to)
    return submit(*shared, withdraw=old)


@contextmanager
def _kept() -> Iterator[None]:
    """Whoever has trained and cannot send is told that nothing is lost."""
    try:
        yield
    except HubError as error:
        ready = "Your contribution is ready and stays here; contribute --resume sends it."
        error.hint = f"{error.hint} {ready}".lstrip()
        raise


def _outcome(work: _Work, contribution: Contribution, summary: DataSummary | None) -> Outcome:
    delta = work.run.delta
    return Outcome(
        contribution,
        None,
        summary,
        trained=work.run.plan.part,
        tensors=len(open_weights(delta)) if delta.exists() else None,
        figures=work.run.figures(),
    )


def _train_and_encode(work: _Work) -> Contribution:
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


def _spend(work: _Work) -> Privacy | None:
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


def _measure(work: _Work, corpus: Corpus, base: Weights, trained: Weights, device: str) -> Metrics:
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


def _read_again(work: _Work) -> Corpus:
    plan = work.run.plan
    paths = [Path(path) for path in plan.data]
    corpus = work.task.read(paths, seed=0, max_bytes=plan.max_bytes)
    if corpus.fingerprint != plan.fingerprint:
        raise Rejected(
            "the data has changed since this contribution was started, so it cannot be resumed.",
            hint="moshi-fl contribute --data PATH   (starts a new one on the data as it is now)",
        )
    return corpus


def _train(work: _Work, corpus: Corpus, recipe: Recipe) -> None:
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

    from moshi_fl.models.common import model_of

    module, place = model_of(task, weights).to(device), torch.device(device)
    loss = round(float(task.evaluate(module, pool, place).mean()), 6)
    figures = task.figures(module, pool, place) if isinstance(task, Explains) else {}
    return _Measured(loss, figures)


def _encode(work: _Work, delta: Weights, number: int, base: str, **fields: Any) -> Contribution:
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


def _carry(work: _Work) -> Weights | None:
    """What earlier contributions could not say, unless it would break a promise of privacy."""
    feedback = Feedback(work.replica.folder / "feedback")
    base = feedback.base(_merged(work))
    if work.run.plan.is_private and not feedback.is_private(base):
        work.listener.stage(
            "privacy", "what the codec could not say of earlier contributions without --dp is left"
        )
        return None
    return feedback.load(base)


def _merged(work: _Work) -> Merged:
    """Whether a contribution became part of a round: what is withdrawn never will."""
    test = merged_test(work.replica, work.state)
    return lambda entry, number: False if entry == work.withdrawn else test(entry, number)


def _fit_to_present(work: _Work, contribution: Contribution) -> tuple[Contribution, str]:
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


def _rebase(work: _Work, contribution: Contribution, age: int) -> tuple[Contribution, str]:
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


def _remember(work: _Work, contribution: Contribution) -> None:
    feedback = Feedback(work.replica.folder / "feedback")
    before = feedback.base(_merged(work))
    if work.run.carry.exists() and before != contribution.id:
        carry, private = open_weights(work.run.carry), work.run.plan.is_private
        feedback.sent(contribution.id, contribution.round, carry, before, private=private)
