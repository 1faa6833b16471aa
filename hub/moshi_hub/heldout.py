"""The hub's held-out data: kept on the maintainer's machine, never in the repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moshi_fl.errors import DataError
from moshi_fl.hubfile import HubConfig
from moshi_fl.replica import Replica
from moshi_fl.weights import Weights, sha256_bytes, write_atomic
from moshi_hub.propose import Evaluator

POOL_SEED = 0


def pool_path(replica: Replica) -> Path:
    """File of the pool on this machine, whether it exists or not."""
    return replica.folder / "held-out.pool"


def store_pool(replica: Replica, config: HubConfig, tokenizer: bytes, paths: Sequence[Path]) -> str:
    """Draw evaluation sequences from files and keep them on this machine.

    Returns:
        SHA-256 of the pool.

    Raises:
        DataError: Nothing usable is in the files.
    """
    from moshi_fl.models import get_family

    task = get_family(config.family).load(config.model_table, tokenizer)
    corpus = task.read(paths, seed=POOL_SEED)
    pool = task.pool(corpus, config.evaluation.sequences, seed=POOL_SEED, held_out=False)
    write_atomic(pool_path(replica), pool)
    return sha256_bytes(pool)


def evaluator_for(replica: Replica) -> Callable[[HubConfig], Evaluator | None]:
    """What measures held-out loss on this machine, given the hub's settings."""

    def choose(config: HubConfig) -> Evaluator | None:
        path = pool_path(replica)
        return _evaluator(config, path.read_bytes()) if path.exists() else None

    return choose


def _evaluator(config: HubConfig, pool: bytes) -> Evaluator:
    def evaluate(weights: Weights, tokenizer: bytes) -> tuple[float, int, str]:
        import torch

        from moshi_fl.models import get_family
        from moshi_fl.models.common import load_weights

        task = get_family(config.family).load(config.model_table, tokenizer)
        module = task.build()
        load_weights(module, weights)
        losses = task.evaluate(module, pool, torch.device("cpu"))
        if not len(losses):
            raise DataError("the held-out pool is empty.", hint="moshi-hub init --eval-data DIR")
        return float(losses.mean()), len(losses), sha256_bytes(pool)

    return evaluate
