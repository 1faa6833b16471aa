"""The hub's held-out data: sealed until it is retired, kept by those who evaluate.

Its hash is public from the first round that is measured on it, so that it cannot change unnoticed.
Its content is not, so that nobody can train on it. When it is retired, it is published, and
whoever wants can measure again what was said about it. A CI has it from ``moshi_hub.sealed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_fl.errors import ConfigError, DataError
from moshi_fl.history import HubState, Refs
from moshi_fl.hubfile import HubConfig
from moshi_fl.models import task_of
from moshi_fl.replica import Replica, Snapshot
from moshi_fl.store import ANY, NOREPLY, Author, RefUpdate
from moshi_fl.weights import Weights, sha256_bytes, write_atomic
from moshi_hub.propose import Evaluator

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Task
    from moshi_fl.plot import Chart

POOL_SEED = 0
POOL_FILE = "held-out.pool"
MAX_POOL_BYTES = 64 << 20


def pool_path(replica: Replica) -> Path:
    """File of the pool on this machine, whether it exists or not."""
    return replica.folder / POOL_FILE


def store_pool(
    replica: Replica,
    config: HubConfig,
    tokenizer: bytes,
    paths: Sequence[Path],
    weights: Weights | None = None,
) -> str:
    """Draw evaluation sequences from files and keep them on this machine.

    They are those that all evaluators measure, and twice as many as one measures for itself.

    Args:
        replica: The hub's copy on this machine.
        config: The hub's settings.
        tokenizer: Its tokenizer.
        paths: The files.
        weights: The hub's, for a family that reads data with a part of its model; None takes
            those of its newest round.

    Returns:
        SHA-256 of the pool.

    Raises:
        DataError: Nothing usable is in the files.
    """
    from moshi_fl.models.common import able_to_read

    task = task_of(config, tokenizer)
    task = able_to_read(task, lambda: replica.pull().load() if weights is None else weights)
    corpus = task.read(paths, seed=POOL_SEED)
    pool = task.pool(corpus, _wanted(config), seed=POOL_SEED, held_out=False)
    replica.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(pool_path(replica), pool)
    return sha256_bytes(pool)


def _wanted(config: HubConfig) -> int:
    return config.evaluation.sequences + 2 * config.evaluation.private_sequences


def too_few(replica: Replica, state: HubState) -> str:
    """A sentence when the pool on this machine has fewer sequences than the settings ask for."""
    from moshi_fl.models.family import CutsPools

    task = task_of(state.config, state.tokenizer)
    if not isinstance(task, CutsPools):
        return ""
    found, wanted = task.pool_size(read_pool_file(replica)), _wanted(state.config)
    if found >= wanted:
        return ""
    return (
        f"The held-out data gives {found} sequences; the settings ask for {wanted}. Verdicts on so "
        "few say little: give more. (moshi-hub pool new --eval-data PATH)"
    )


def read_pool_file(replica: Replica) -> bytes:
    """The pool on this machine.

    Raises:
        DataError: There is none.
    """
    path = pool_path(replica)
    if not path.exists():
        raise DataError(
            "there is no held-out pool on this machine.",
            hint="moshi-hub pool new --eval-data PATH, or: moshi-hub pool import FILE",
        )
    return path.read_bytes()


def import_pool(replica: Replica, source: Path) -> str:
    """Keep a pool that a maintainer exported; returns its SHA-256.

    Raises:
        DataError: It is too large.
    """
    if source.stat().st_size > MAX_POOL_BYTES:
        raise DataError(f"{source}: larger than a pool can be ({MAX_POOL_BYTES} bytes).")
    data = source.read_bytes()
    replica.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(pool_path(replica), data)
    return sha256_bytes(data)


def retire_pool(replica: Replica, refs: Refs, by: str) -> str:
    """Publish the pool on a ref of the hub, and stop using it; returns its SHA-256.

    A sealed one goes with the same push: jobs must not go on with what is public.
    """
    data, repo = read_pool_file(replica), replica.repo
    name = sha256_bytes(data)
    ref = refs.pool(name)
    author = Author(by or "moshi-fl", NOREPLY)
    commit = repo.commit(
        repo.tree({POOL_FILE: repo.put(data)}), message=f"{ref}\n", author=author, when=0
    )
    sealed = repo.remote_refs(refs.sealed_pool)
    gone = [RefUpdate(sealed_ref, None, was) for sealed_ref, was in sealed.items()]
    repo.push([RefUpdate(ref, commit, ANY), *gone])
    pool_path(replica).rename(replica.folder / f"retired-{name[:16]}.pool")
    return name


def figures_of(replica: Replica, snapshot: Snapshot) -> dict[str, float]:
    """Loss of a round on the pool in nats per token, and what else its family can tell, by name.

    Raises:
        DataError: There is no pool on this machine.
    """
    import torch

    from moshi_fl.models.common import explained

    pool, device = read_pool_file(replica), torch.device("cpu")
    task, module = _task_and_model(snapshot)
    losses = task.evaluate(module, pool, device)
    more = explained(task, module, pool, device)
    figures = {name.replace(" ", "_"): value for name, value in more.items()}
    return {"loss": float(losses.mean()), **figures}


def chart_of(replica: Replica, snapshots: Sequence[Snapshot]) -> Chart:
    """A chart of what a family can tell of some rounds.

    Raises:
        ConfigError: It can tell nothing that could be drawn.
        DataError: There is no pool on this machine.
    """
    import torch

    from moshi_fl.models.family import Explains

    models = {f"round {entry.round}": _task_and_model(entry) for entry in snapshots}
    task = next(iter(models.values()))[0]
    if not isinstance(task, Explains):
        raise ConfigError(
            "models of this family have nothing to draw but their loss.",
            hint="moshi-hub report   (draws the loss of all rounds)",
        )
    modules = {name: module for name, (_, module) in models.items()}
    return task.chart(modules, read_pool_file(replica), torch.device("cpu"))


def _task_and_model(snapshot: Snapshot) -> tuple[Task, nn.Module]:
    from moshi_fl.models.common import model_of

    state = snapshot.state
    task = task_of(state.config, state.tokenizer)
    return task, model_of(task, snapshot.load())


def evaluator_for(replica: Replica) -> Callable[[HubConfig], Evaluator | None]:
    """What measures held-out loss on this machine, given the hub's settings."""

    def choose(config: HubConfig) -> Evaluator | None:
        path = pool_path(replica)
        return _evaluator(config, path.read_bytes()) if path.exists() else None

    return choose


def _evaluator(config: HubConfig, pool: bytes) -> Evaluator:
    def evaluate(weights: Weights, tokenizer: bytes) -> tuple[float, int, str]:
        import torch

        from moshi_fl.models.common import model_of
        from moshi_hub.measure import few_threads

        task = task_of(config, tokenizer)
        module = model_of(task, weights)
        with few_threads(module):
            losses = task.evaluate(module, pool, torch.device("cpu"))
        if not len(losses):
            raise DataError("the held-out pool is empty.", hint="moshi-hub init --eval-data DIR")
        return float(losses.mean()), len(losses), sha256_bytes(pool)

    return evaluate
