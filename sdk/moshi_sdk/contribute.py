"""Contribute: train the global weights on local data, and send what was learned to the hub.

Stages, each of which leaves its result on disk and is skipped when that is already there: plan,
train (in a Flower ``ClientApp``), measure, encode, sign, send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from moshi_fl.config import absolute
from moshi_fl.config import home as default_home
from moshi_fl.data import told_left_out
from moshi_fl.errors import ConfigError, HubError
from moshi_fl.forge.base import Forge
from moshi_fl.history import HubState
from moshi_fl.models import task_of
from moshi_fl.models.common import able_to_read, require_part
from moshi_fl.models.family import DataSummary, Task, TellsOfReading, Windowed
from moshi_fl.policy import NO_DEMANDS, Policy
from moshi_fl.pull_request import forge_of, propose, pushing_to
from moshi_fl.records import Contribution
from moshi_fl.replica import Snapshot
from moshi_fl.signing import own_signer
from moshi_fl.submit import Sent, signature_of, submit
from moshi_fl.weights import open_weights
from moshi_sdk.earlier import earlier_one, first_look, lands_on, make_way, said_of
from moshi_sdk.identity import before_sending, check_key
from moshi_sdk.planning import Options, make_plan
from moshi_sdk.privacy import BUDGET, Account
from moshi_sdk.runs import Change, RunPlan, Runs
from moshi_sdk.stages import Listener, Silent, Work, fit_to_present, remember, train_and_encode
from moshi_sdk.sync import SyncManager

__all__ = ["Listener", "Options", "Outcome", "contribute", "discard", "load_task", "resume"]


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
        withdrawn: Id of the contribution that it replaced on the hub; empty where it replaced none.
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
    withdrawn: str = ""


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
        MoshiError: Another process makes a contribution of this key to the same round.
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
    runs = Runs(manager.replica.folder / "runs")
    with _alone(runs, signer.public_key, snapshot.round, options.dry_run):
        paths = tuple(absolute(Path(path)) for path in data)
        corpus = task.read(paths, seed=0, max_bytes=options.max_bytes)
        listener.stage("data", describe(corpus.summary))
        plan = make_plan(snapshot, task, corpus, paths, options, signer.public_key)
        run = runs.of(plan)
        before = first_look(manager.replica, snapshot, runs, run, options)
        said = said_of(before, replace=options.replace)
        for name, text in (*before_sending(runs.sent(), plan, signer), *said):
            listener.stage(name, text)
        run = runs.start(plan, snapshot)
        account = Account(home, snapshot.state.config.hub.id)
        budget = options.privacy.budget if options.privacy else BUDGET
        shared = (manager.replica, snapshot, task, run, listener, signer)
        withdrawn = before.id if before and options.replace else ""
        work = Work(*shared, account, budget, options.replace, withdrawn, corpus)
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
        MoshiError: There is none, or another process makes one of this key to the same round.
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
    number = lands_on(snapshot.state, run.plan.base_round)
    with _alone(runs, run.plan.key, number, dry_run):
        wanted = Options(dry_run=dry_run, replace=replace)
        before = first_look(manager.replica, snapshot, runs, run, wanted)
        said = said_of(before, replace=replace)
        for name, text in (*before_sending(runs.sent(), run.plan, signer), *said):
            listener.stage(name, text)
        listener.stage("sync", f"{_whence(snapshot)}; resuming from round {run.plan.base_round}")
        tokenizer = run.tokenizer.read_bytes() if run.tokenizer.exists() else None
        task = able_to_read(load_task(snapshot.state, tokenizer), lambda: open_weights(run.base))
        task = _told_of(task, listener)
        account = Account(home, snapshot.state.config.hub.id)
        shared = (manager.replica, snapshot, task, run, listener, signer)
        withdrawn = before.id if before and replace else ""
        work = Work(*shared, account, privacy_budget, replace, withdrawn)
        return _finish(work, dry_run)


def discard(hub: str, *, home: Path | None = None) -> RunPlan:
    """Drop the last unfinished contribution to ``hub`` with all its work; what it was about.

    Raises:
        MoshiError: There is none, or a process is working on it.
    """
    manager = SyncManager(hub, home=home or default_home())
    return Runs(manager.replica.folder / "runs").discard().plan


def _alone(runs: Runs, key: str, number: int, dry_run: bool) -> AbstractContextManager[None]:
    """Nobody overtakes what is to be sent; a dry run is in nobody's way."""
    return nullcontext() if dry_run else runs.sending(key, number)


def _told_of(task: Task, listener: Listener) -> Task:
    """The task, whose listener hears how far its reading is."""
    return task.telling(listener.reading) if isinstance(task, TellsOfReading) else task


def _whence(snapshot: Snapshot) -> str:
    trust = "trusting from now on its root" if snapshot.first_contact else "signed under root"
    text = f"round {snapshot.round}, {trust} {snapshot.root}"
    return text if snapshot.online else f"{text}, from the cache: {snapshot.problem}"


def load_task(state: HubState, tokenizer: bytes | None = None) -> Task:
    """The hub's model family, configured; with the newest tokenizer unless another is given."""
    return task_of(state.config, state.tokenizer if tokenizer is None else tokenizer)


def describe(summary: DataSummary) -> str:
    """One line about what was taken and what was left."""
    files = "1 file" if summary.files == 1 else f"{summary.files} files"
    text = f"{files}, {summary.bytes:,} bytes, {summary.tokens:,} tokens"
    left = told_left_out(summary.skipped, summary.left_out)
    return f"{text}; left out: {left}" if left else text


def _finish(work: Work, dry_run: bool) -> Outcome:
    summary = work.corpus.summary if work.corpus else None
    with work.run.at_work():
        contribution = work.run.contribution()
        if contribution is None:
            contribution = train_and_encode(work)
        if dry_run:
            return _outcome(work, contribution, summary)
        contribution, note = fit_to_present(work, contribution)
        made = replace(_outcome(work, contribution, summary), note=note)
        signature = signature_of(work.run.signature, contribution, work.signer)
        forge = forge_of(work.replica)
        with _kept():
            sent, withdrawn = _send(work, contribution, signature, forge)
        remember(work, contribution)
        work.run.mark_sent()
    url, problem = propose(forge, contribution)
    return replace(made, sent=sent, url=url, problem=problem, withdrawn=withdrawn)


def _send(work: Work, contribution: Contribution, signature: str, forge: Forge) -> tuple[Sent, str]:
    """Where it went, and the id of what was withdrawn for it."""
    to = pushing_to(forge, work.replica)
    place = (work.run.plan.key, contribution.round, contribution.id)
    before = earlier_one(work.replica, work.state, to, *place)
    old = make_way(before, replace=work.replace)
    shared = (work.replica, work.state, contribution, signature, work.run.delta, to)
    sent = submit(*shared, withdraw=old)
    return sent, before.id if before else ""


@contextmanager
def _kept() -> Iterator[None]:
    """Whoever has trained and cannot send is told that nothing is lost."""
    try:
        yield
    except HubError as error:
        ready = "Your contribution is ready and stays here; contribute --resume sends it."
        error.hint = f"{error.hint} {ready}".lstrip()
        raise


def _outcome(work: Work, contribution: Contribution, summary: DataSummary | None) -> Outcome:
    delta = work.run.delta
    return Outcome(
        contribution,
        None,
        summary,
        trained=work.run.plan.part,
        tensors=len(open_weights(delta)) if delta.exists() else None,
        figures=work.run.figures(),
    )
