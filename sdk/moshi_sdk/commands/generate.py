"""``moshi-fl generate``: continue a text with the global model, or with one trained by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moshi_fl.cli import Real, output_options
from moshi_fl.console import Console
from moshi_fl.errors import ConfigError
from moshi_sdk.chosen import Choice, model_options

if TYPE_CHECKING:
    from torch import nn

    from moshi_fl.models.family import Sampling, Task


@click.command()
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=Real(0), default=0.7, show_default=True)
@click.option("--top-k", type=click.IntRange(1), help="Choose among this many tokens only.")
@click.option("--top-p", type=Real(0, 1, min_open=True), help="Nucleus sampling.")
@click.option("--min-p", type=Real(0, 1), help="Least share of the likeliest one.")
@click.option(
    "--repetition-penalty",
    type=Real(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: less of what was said.",
)
@click.option("--suffix", help="Write what stands between PROMPT and this text.")
@click.option("--int8", is_flag=True, help="Weights in eight bits: faster, a little less exact.")
@click.option("--seed", type=click.IntRange(0), help="Makes the answer repeatable.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@model_options
@output_options
def generate(
    console: Console, *, prompt: str | None, suffix: str | None, choice: Choice, **sampled: Any
) -> None:
    r"""Continue PROMPT (or standard input) with the hub's model, piece by piece as it is made.

    \b
    Examples:
      moshi-fl generate 'def main(' --max-tokens 80
      moshi-fl generate 'def area(w, h):' --suffix 'return size'
      git diff | moshi-fl generate --temperature 0
      moshi-fl generate 'import ' --weights out/best --tokenizer tokenizer.json
    """
    text = prompt if prompt is not None else _piped()
    chosen = choice.load()
    from moshi_fl.models.family import Sampling

    sampling = Sampling(**sampled)
    pieces = _answer(chosen.task, chosen.module, text, suffix, sampling)
    first = next(pieces, "")  # what cannot be continued is not repeated either
    if not console.json_mode:
        console.write(text)
    console.write(first)
    for piece in pieces:
        console.write(piece)
    if suffix and not console.json_mode:
        console.write(suffix)
    if console.json_mode:
        console.result(prompt=text, round=chosen.round)
    else:
        console.write("\n")


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
