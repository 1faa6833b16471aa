"""A Flower server for the clients of moshi-fl: FedAvg on a model family's weights.

There is no hub here. Flower keeps the connections, moshi-fl brings the model, the data reader and
the training. The weights are an ordinary safetensors file, the same as a hub's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from moshi_fl.flower import to_arrays, to_weights
from moshi_fl.models import get_family, get_preset
from moshi_fl.train import Recipe
from moshi_fl.weights import save_weights
from moshi_sdk.client import job_config

app = ServerApp()


class NewBatches(FedAvg):
    """FedAvg with a seed for each round, so that no round repeats another's batches."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's, with the round's number as the seed."""
        config["seed"] = server_round
        return super().configure_train(server_round, arrays, config, grid)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and, if asked to, save the final weights."""
    run = context.run_config
    family, preset_name = str(run["family"]), str(run["preset"])
    preset = get_preset(family, preset_name)
    task = get_family(family).load(preset.model, preset.tokenizer)
    recipe = Recipe(
        steps=int(run["steps"]),
        batch_size=int(run["batch-size"]),
        learning_rate=float(run["learning-rate"]),
    )
    job = job_config(family, preset.model, preset.tokenizer, recipe)
    result = NewBatches(fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=to_arrays(task.initial_weights(seed=0)),
        num_rounds=int(run["num-rounds"]),
        train_config=ConfigRecord(dict(job)),
        evaluate_config=ConfigRecord(dict(job)),
    )
    for number, metrics in sorted(result.evaluate_metrics_clientapp.items()):
        print(f"round {number}: loss {metrics['loss']:.4f} on the nodes' held-out data")
    if run["save"]:
        save_weights(Path(str(run["save"])), to_weights(result.arrays))
