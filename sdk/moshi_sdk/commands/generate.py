"""``moshi-fl generate``: continue a text with the global model, or with one trained by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moshi_fl.cli import hub_option, output_options
from moshi_fl.config import Settings, load_settings
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError
from moshi_sdk.options import pick_device, settings_for, sync_manager, use_threads

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Sampling, Task
    from moshi_fl.weights import Weights


@click.command()
@click.argument("prompt", required=False)
@hub_option
@click.option("--round", "number", type=click.IntRange(0), help="Use this round.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True)
@click.option("--top-k", type=click.IntRange(1), help="Choose among this many tokens only.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Least share of the likeliest one.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: less of what was said.",
)
@click.option("--suffix", help="Write what stands between PROMPT and this text.")
@click.option("--int8", is_flag=True, help="Weights in eight bits: faster, a little less exact.")
@click.option("--seed", type=click.IntRange(0), help="Makes the answer repeatable.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--device", help="auto, cpu, mps, cuda or cuda:N.")
@click.option("--offline", is_flag=True, help="Use the round on this machine; ask no hub.")
@click.option(
    "--weights",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Use no hub, but what python -m moshi_fl.train left here: its folder best or final.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --weights: what its shards were made with. [default: bytes]",
)
@output_options
def generate(  # noqa: PLR0913 - one parameter an option
    console: Console,
    *,
    prompt: str | None,
    hub: str | None,
    number: int | None,
    device: str | None,
    offline: bool,
    suffix: str | None,
    weights: Path | None,
    tokenizer: Path | None,
    **choices: object,
) -> None:
    r"""Continue PROMPT (or standard input) with the hub's model, piece by piece as it is made.

    \b
    Examples:
      moshi-fl generate 'def main(' --max-tokens 80
      moshi-fl generate 'def area(w, h):' --suffix 'return size'
      git diff | moshi-fl generate --temperature 0
      moshi-fl generate 'import ' --weights out/best --tokenizer tokenizer.json
    """
    if weights and (hub or offline or number is not None):
        raise click.UsageError("--weights takes no hub: leave out --hub, --round and --offline.")
    if tokenizer and not weights:
        raise click.UsageError("--tokenizer goes with --weights; a hub has its own.")
    text = prompt if prompt is not None else _piped()
    if weights:
        settings, number = load_settings(device=device), None
        from moshi_sdk.trained import load_trained

        task, values = load_trained(weights, tokenizer)
    else:
        settings = settings_for(hub=hub, device=device)
        task, values, number = _from_hub(settings, number, offline=offline)
    module = _module(task, values, settings)
    from moshi_fl.models.family import Sampling

    sampling = Sampling(**choices)  # type: ignore[arg-type]
    if not console.json_mode:
        console.write(text)
    for piece in _answer(task, module, text, suffix, sampling):
        console.write(piece)
    if suffix and not console.json_mode:
        console.write(suffix)
    if console.json_mode:
        console.result(prompt=text, round=number)
    else:
        console.write("\n")


def _from_hub(
    settings: Settings, number: int | None, *, offline: bool
) -> tuple[Task, Weights, int]:
    snapshot = sync_manager(settings).pull(number, offline=offline)
    from moshi_sdk.contribute import load_task

    return load_task(snapshot.state), snapshot.load(), snapshot.round


def _module(task: Task, weights: Weights, settings: Settings) -> nn.Module:
    from moshi_fl.models.common import load_weights

    use_threads(settings.threads)
    module = task.build()
    load_weights(module, weights)
    return module.to(pick_device(settings.device))


def _answer(
    task: Task, module: nn.Module, text: str, suffix: str | None, sampling: Sampling
) -> Iterator[str]:
    if suffix is None:
        return task.generate(module, text, sampling)
    from moshi_fl.models.family import FillsIn

    if not isinstance(task, FillsIn):
        raise ConfigError(
            "this model cannot write between two texts.",
            hint="Leave out --suffix; models of the family char can.",
        )
    return task.fill_in(module, text, suffix, sampling)


def _piped() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, or pipe one in.")
    return sys.stdin.read()
