"""``python -m moshi_fl.train config.yaml``: train a model on token shards."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from moshi_fl.cli import output_options, run
from moshi_fl.console import Console
from moshi_fl.errors import MoshiError


@click.command("python -m moshi_fl.train", context_settings={"max_content_width": 100})
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option("--resume", is_flag=True, help="Fail when there is no checkpoint to continue from.")
@click.option("--fresh", is_flag=True, help="Begin anew; an earlier run is moved aside.")
@click.option("--dry-run", is_flag=True, help="Check everything and show it; train nothing.")
@output_options
def main(
    console: Console,
    config: Path,
    changes: tuple[str, ...],
    resume: bool,
    fresh: bool,
    dry_run: bool,
) -> None:
    r"""Train the model that CONFIG describes; an interrupted run continues by itself.

    \b
    Examples:
      python -m moshi_fl.train config.yaml --set device=cpu --dry-run
      python -m moshi_fl.train config.yaml --set model.n_layers=2 --set max_steps=100
      torchrun --nproc-per-node 2 -m moshi_fl.train config.yaml
    """
    if resume and fresh:
        raise click.UsageError("--resume and --fresh exclude each other.")
    if int(os.environ.get("RANK", "0")) == 0:
        _train(console, config, changes, resume=resume, fresh=fresh, dry_run=dry_run)
        return
    console.quiet = True  # process 0 speaks for all
    try:
        _train(console, config, changes, resume=resume, fresh=fresh, dry_run=dry_run)
    except MoshiError:
        raise SystemExit(1) from None


def _train(
    console: Console,
    config: Path,
    changes: tuple[str, ...],
    *,
    resume: bool,
    fresh: bool,
    dry_run: bool,
) -> None:
    from contextlib import ExitStack

    from moshi_fl.train.distributed import open_world
    from moshi_fl.train.folder import RunFolder
    from moshi_fl.train.settings import read_settings
    from moshi_fl.train.trainer import Run, pick_device, prepare

    settings, idle = read_settings(config, changes)
    if idle:
        console.note(f"without meaning here: {', '.join(idle)}")
    device = pick_device(settings.device)
    with open_world(device) as world, ExitStack() as stack:
        with world.together():
            ready = prepare(settings, device, world, real=not dry_run)
            parameters = sum(p.numel() for p in ready.module.parameters())
            console.note(
                f"{settings.family}, {parameters:,} parameters; {ready.recipe.precision} "
                f"on {device}; {ready.batch} x {ready.what.context} tokens a step, "
                f"{len(ready.data.training.tokens):,} tokens of data"
            )
        if dry_run:
            console.done("Ready; nothing was trained", parameters=parameters, batch=ready.batch)
            return
        folder = RunFolder(Path(settings.out_dir), settings.keep_checkpoints)
        with world.together():
            if world.rank == 0:
                stack.enter_context(folder.held())
        words = [str(config), *(word for change in changes for word in ("--set", change))]
        console.resume_command = f"python -m moshi_fl.train {shlex.join(words)}"
        work = Run(ready, folder, console.note)
        steps = work.go(fresh=fresh, resume=resume)
        if world.rank == 0:
            console.done("Trained", steps=steps, folder=str(folder.path))


if __name__ == "__main__":
    sys.exit(run(main))
