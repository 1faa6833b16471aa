"""``moshi-hub pool``: the sealed held-out data."""

from __future__ import annotations

from pathlib import Path

import click

from moshi_fl.cli import hub_option, output_options, plot_option
from moshi_fl.console import Console
from moshi_fl.text import Figure, Size
from moshi_hub.options import maintainer, replica_for


@click.group(invoke_without_command=True)
@hub_option
@output_options
def pool(console: Console, hub: str | None) -> None:
    r"""Show, make, pass on or retire the sealed held-out data that contributions are measured on.

    \b
    Examples:
      moshi-hub pool
      moshi-hub pool new --eval-data ~/held-out
      moshi-hub pool export pool.json
      moshi-hub pool import pool.json
      moshi-hub pool seal
      moshi-hub pool measure --round 3
      moshi-hub pool retire
    """
    if click.get_current_context().invoked_subcommand is None:
        from moshi_fl.weights import sha256_bytes
        from moshi_hub.heldout import read_pool_file

        data = read_pool_file(replica_for(hub))
        console.result(pool=sha256_bytes(data), size=Size(len(data)))


@pool.command()
@hub_option
@click.option(
    "--eval-data",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Held-out files; they stay on this machine.",
)
@output_options
def new(console: Console, hub: str | None, eval_data: tuple[Path, ...]) -> None:
    """Draw a new pool from files; the one before stays in use until then."""
    from moshi_hub.heldout import store_pool, too_few

    replica = replica_for(hub)
    state = replica.look()
    sha256 = store_pool(replica, state.config, state.tokenizer, eval_data)
    console.done("Drew a held-out pool; it stays on this machine", pool=sha256)
    if few := too_few(replica, state):
        console.warn(few)


@pool.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@hub_option
@output_options
def export(console: Console, hub: str | None, file: Path) -> None:
    """Write the pool to FILE, for an appointed evaluator. Whoever has it can train on it."""
    from moshi_fl.weights import sha256_bytes, write_atomic
    from moshi_hub.heldout import read_pool_file

    data = read_pool_file(replica_for(hub))
    write_atomic(file, data)
    console.done(f"Wrote {file}", pool=sha256_bytes(data), size=Size(len(data)))


@pool.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@hub_option
@output_options
def import_(console: Console, hub: str | None, file: Path) -> None:
    """Keep the pool in FILE, which a maintainer exported, to evaluate on it."""
    from moshi_hub.heldout import import_pool

    console.done("Kept the pool", pool=import_pool(replica_for(hub), file))


@pool.command()
@hub_option
@click.option("--round", "number", type=click.IntRange(0), help="Measure this round.")
@plot_option("Draw what the family can tell of it and of the round before, as an SVG chart.")
@output_options
def measure(console: Console, hub: str | None, number: int | None, plot: Path | None) -> None:
    """Measure a round on the pool: its loss, and what else its family can tell of a model."""
    from moshi_fl.weights import write_atomic
    from moshi_hub.heldout import chart_of, figures_of

    replica = replica_for(hub)
    snapshot = replica.pull(number)
    found = figures_of(replica, snapshot)
    told = {name: Figure(value) for name, value in found.items() if name != "loss"}
    console.result(round=snapshot.round, loss=found["loss"], **told)
    if plot:
        before = [replica.pull(snapshot.round - 1)] if snapshot.round else []
        write_atomic(plot, chart_of(replica, [*before, snapshot]).svg().encode(), shared=True)
        console.note(f"Wrote {plot}")


@pool.command()
@hub_option
@output_options
def seal(console: Console, hub: str | None) -> None:
    """Put the pool on the hub, encrypted, and print its key: a secret of your CI.

    With MOSHI_HUB_POOL_KEY set, that key is used again.
    """
    from moshi_hub.sealed import POOL_KEY, seal_pool

    replica = replica_for(hub)
    state = replica.look()
    console.line(seal_pool(replica, state.refs, state.config.hub.id, maintainer()))
    console.note(f"Give it to the CI as {POOL_KEY}. Whoever has it can train on the pool.")


@pool.command()
@hub_option
@output_options
def retire(console: Console, hub: str | None) -> None:
    """Publish the pool on the hub and stop using it: everybody can then measure again."""
    from moshi_hub.heldout import retire_pool

    replica = replica_for(hub)
    sha256 = retire_pool(replica, replica.look().refs, maintainer())
    console.done("Published the pool; nothing is measured on it any more", pool=sha256)
    console.hint(
        "moshi-hub pool new --eval-data PATH   (the next); for a CI, then: moshi-hub pool seal"
    )
