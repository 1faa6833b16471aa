"""``moshi-fl simulate``: many virtual contributors in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moshi_fl.cli import Real, output_options, pairs, plot_option, set_option
from moshi_fl.config import ensure_home, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError
from moshi_fl.text import Count, Duration, Size
from moshi_fl.weights import count_parameters, write_atomic
from moshi_sdk.options import pick_device, use_threads

if TYPE_CHECKING:
    from moshi_sdk.simulate import Client, Federation, RoundResult, Start, Turn

SHOWN_PROBLEMS = 5
COLUMNS = {
    "round": "round",
    "held_out_loss": "held-out loss",
    "client_loss": "client loss",
    "bytes_up": "up per client",
    "clients": "clients",
    "seconds": "time",
}


@click.command()
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True),
    help="File or folder to share out; may be given several times. It never leaves this machine.",
)
@click.option("--hub", metavar="URL", help="Start from this hub's model and rules; send nothing.")
@click.option("--family", help="Model family. [default: char]")
@click.option("--preset", help="Ready-made settings of the family. [default: tiny]")
@set_option
@click.option("--clients", type=click.IntRange(1), default=10, show_default=True, help="How many.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How many.")
@click.option(
    "--fraction",
    type=Real(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the clients that take part in a round.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps per client and round.")
@click.option("--lr", "learning_rate", type=Real(0, min_open=True), help="Peak learning rate.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows per step.")
@click.option(
    "--trains", metavar="PART", help="What of the model: all, or a part such as lora or ttt."
)
@click.option("--device", help="auto, cpu, mps, cuda or cuda:N.")
@click.option(
    "--split",
    type=click.Choice(["iid", "directory"]),
    default="iid",
    show_default=True,
    help="Deal out files at random, or whole top-level directories.",
)
@click.option("--strategy", help="fedavg, median, trimmed-mean, or flower:NAME.")
@click.option(
    "--strategy-option",
    "strategy_options",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="What the strategy takes, such as trim=0.2; may be given several times.",
)
@click.option("--codec", help="topk, int8, f16 or f32.")
@click.option(
    "--codec-option",
    "codec_options",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="What the codec takes, such as keep=32; may be given several times.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Decides all that is drawn.",
)
@plot_option("Write the losses as an SVG chart.")
@output_options
def simulate(console: Console, plot: Path | None, **flags: Any) -> None:
    r"""Train one model with many virtual contributors in this process.

    Real training, codecs with error feedback and aggregation; only Git is left out, so it runs in
    seconds and needs no hub. A part of the data goes to no client: the global model is measured on
    it. What is not given comes from the preset, or from the hub.

    \b
    Examples:
      moshi-fl simulate --data ~/code --clients 4 --steps 20
      moshi-fl simulate --data ~/code --split directory --codec topk --plot loss.svg
      moshi-fl simulate --data ~/code --strategy flower:FedAdam --strategy-option eta=0.01
      moshi-fl simulate --data ~/calls --family speech --set ttt_layers=1 --trains ttt
    """
    settings = load_settings(data=flags.pop("data"), device=flags.pop("device"))
    if not settings.data:
        raise ConfigError("no data is given.", hint="--data PATH (a file or a folder)")
    use_threads(settings.threads)
    from moshi_sdk.simulate import Federation, Options, Simulation

    start = _start(*(flags.pop(name) for name in ("hub", "family", "preset", "model")))
    options = Options(device=pick_device(settings.device), **flags)
    federation = Federation(settings.data, options, start=start)
    _describe(console, federation)
    results: list[RoundResult] = []
    try:
        _run(console, federation, results)
    finally:  # an interrupted simulation still tells what it found
        if results:
            _report(console, federation, results)
    if plot:
        made = Simulation(federation.label, tuple(results), federation.clients, federation.weights)
        write_atomic(plot, made.svg().encode(), shared=True)
    _conclude(console, results, plot)


def _start(
    hub: str | None, family: str | None, preset: str | None, model: Mapping[str, Any]
) -> Start:
    from moshi_sdk.simulate import from_hub, from_preset

    if not hub:
        return from_preset(family or "char", preset or "tiny", model=model)
    if family or preset or model:
        raise click.UsageError("--hub settles the model; leave out --family, --preset and --set.")
    return from_hub(hub, home=ensure_home())


def _describe(console: Console, federation: Federation) -> None:
    """Say what is simulated, and which clients have too little data."""
    options, config = federation.options, federation.config
    files = sum(len(client.share.files) for client in federation.clients)
    console.note(
        f"Data    {files:,} files to {options.clients} clients ({options.split}); "
        f"{len(federation.held_out.files)} held out"
    )
    console.note(
        f"Model   {config.family}, {Count(count_parameters(federation.weights))} parameters; "
        f"{federation.label}, {federation.steps} steps, training {federation.trains}"
    )
    problems = [f"client {c.number}: {c.problem}" for c in federation.clients if c.problem]
    for problem in problems[:SHOWN_PROBLEMS]:
        console.warn(problem)
    if len(problems) > SHOWN_PROBLEMS:
        console.warn(f"{len(problems) - SHOWN_PROBLEMS} more clients have too little data.")


def _run(console: Console, federation: Federation, results: list[RoundResult]) -> None:
    with console.progress("Simulating", federation.options.rounds, unit="rounds") as bar:

        def on_step(turn: Turn) -> None:
            done = (turn.place + turn.progress.step / turn.progress.steps) / turn.clients
            bar.update(turn.round - 1 + done, client=turn.client, loss=f"{turn.progress.loss:.3f}")

        for result in federation.run(on_step):
            results.append(result)
            bar.update(result.round, held_out=f"{result.held_out_loss:.3f}")


def _report(console: Console, federation: Federation, results: list[RoundResult]) -> None:
    rows = [
        {
            "round": result.round,
            "held_out_loss": result.held_out_loss,
            "client_loss": result.client_loss,
            "bytes_up": result.bytes_up if result.bytes_up is None else Size(result.bytes_up),
            "clients": len(result.clients) if result.round else None,
            "seconds": Duration(result.seconds),
            "trained": list(result.clients),
        }
        for result in results
    ]
    console.table(rows, COLUMNS, name="rounds")
    if console.json_mode:
        console.table(list(map(_client, federation.clients)), name="clients")


def _client(client: Client) -> dict[str, object]:
    return {
        "client": client.number,
        "data": client.share.name,
        "files": len(client.share.files),
        "bytes": client.share.bytes,
        "examples": client.examples,
        "problem": client.problem,
    }


def _conclude(console: Console, results: list[RoundResult], plot: Path | None) -> None:
    first, last = results[0].held_out_loss, results[-1].held_out_loss
    facts: dict[str, object] = {"loss_before": first, "loss_after": last}
    facts["seconds"] = Duration(sum(result.seconds for result in results))
    if plot:
        facts["plot"] = str(plot)
    count = len(results) - 1
    console.done(f"{count} round{'s' * (count != 1)} simulated", **facts)
