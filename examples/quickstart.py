"""The same round as ``quickstart.sh``, from Python: hub, contributors, merge, sync, audit, text.

    python examples/quickstart.py            about a minute on two cores
    python examples/quickstart.py --steps 3  only to see it run

Everything happens in a temporary folder on this machine, without network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from moshi_fl.models.common import load_weights
from moshi_fl.models.family import Sampling
from moshi_fl.replica import Replica
from moshi_fl.strategies import find_strategy
from moshi_hub.create import Plan, create
from moshi_hub.heldout import evaluator_for
from moshi_hub.merge import Options as MergeOptions
from moshi_hub.merge import merge
from moshi_sdk.audit import Auditor
from moshi_sdk.contribute import Options, contribute, load_task
from moshi_sdk.sync import SyncManager

LIBRARY = Path(json.__file__).parents[1]  # code that every machine with Python has


def make_hub(hub: str, home: Path) -> None:
    """A maintainer makes a hub; the held-out files stay on this machine."""
    plan = Plan(
        url=hub, family="char", preset="tiny", name="quickstart", eval_data=(LIBRARY / "json",)
    )
    snapshot = create(plan, home)
    print(f"round 0: {snapshot.record.parameters:,} random weights")


def train(hub: str, home: Path, name: str, data: Path, steps: int) -> None:
    """A contributor trains on data of their own and sends the delta."""
    outcome = contribute(hub, [data], Options(steps=steps, contributor=name), home=home)
    metrics = outcome.contribution.metrics
    print(
        f"{name}: {outcome.contribution.id[:12]}, {outcome.contribution.delta.bytes:,} bytes, "
        f"own held-out loss {metrics.held_out_before:.3f} to {metrics.held_out_after:.3f}"
    )


def make_round(hub: str, home: Path) -> None:
    """The maintainer verifies and merges what is open, and publishes the result."""
    replica = Replica(hub, home)
    outcome = merge(
        replica,
        MergeOptions(publish=True),
        evaluator=evaluator_for(replica),
        find_strategy=find_strategy,
    )
    record = outcome.proposal.record
    assert record.evaluation is not None  # make_hub gave held-out files
    before, after = record.evaluation.before, record.evaluation.after
    print(f"round {record.round}: held-out loss {before:.3f} to {after:.3f}")


def use(hub: str, home: Path, prompt: str) -> None:
    """Anyone recomputes the round, brings the model here, and lets it continue a text."""
    manager = SyncManager(hub, home=home)
    snapshot = manager.pull()
    auditor = Auditor(manager.replica, find_strategy=find_strategy)
    for finding in auditor.audit(1, snapshot.round):
        print(
            f"audit of round {finding.round}: {'identical' if finding.identical else 'DIFFERENT'}"
        )
    task = load_task(snapshot.state)
    module = task.build()
    load_weights(module, snapshot.load())
    pieces = task.generate(module, prompt, Sampling(max_tokens=60, temperature=0.7, seed=1))
    print(prompt + "".join(pieces))


def main() -> None:
    """Run the whole round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps of each contributor")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory(prefix="quickstart-") as name:
        folder = Path(name)
        hub = str(folder / "hub.git")
        make_hub(hub, folder / "maria")
        train(hub, folder / "alice", "alice", LIBRARY / "http", steps)
        train(hub, folder / "bob", "bob", LIBRARY / "email", steps)
        make_round(hub, folder / "maria")
        use(hub, folder / "bob", "def ")


if __name__ == "__main__":
    main()
