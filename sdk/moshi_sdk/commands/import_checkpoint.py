"""``moshi-fl import-checkpoint``: Kyutai's released files as the beginning of a hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from moshi_fl.cli import output_options
from moshi_fl.console import Console
from moshi_fl.text import Count, Size


@click.command("import-checkpoint")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; a new one."
)
@click.option(
    "--preset",
    help="Take codec and tokenizer alone, with a new language model of this size, such as small.",
)
@click.option("--lora-rank", type=click.IntRange(0), help="Of the adapters; 0: none. [default: 64]")
@click.option("--ttt-layers", type=click.IntRange(0), help="Turn so many top layers into TTT.")
@click.option(
    "--ttt-mode",
    type=click.Choice(["replace", "gated", "parallel"]),
    help="In place of attention, the same with a gate, or beside it. [default: gated]",
)
@click.option("--ttt-kind", type=click.Choice(["linear", "mlp"]), help="[default: linear]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is new."
)
@output_options
def import_checkpoint(
    console: Console, folder: Path, out: Path, preset: str | None, seed: int, **model: Any
) -> None:
    r"""Turn Kyutai's released files in DIR into a folder that a hub can begin with.

    DIR holds the language model (model.safetensors), Mimi (tokenizer-*.safetensors), the text
    tokenizer (tokenizer_spm_32k_3.model) and, unless it is the 7B of September 2024, config.json.
    All is checked, widened to float32 and written tensor by tensor.

    \b
    Examples:
      moshi-fl import-checkpoint ~/moshiko --out moshiko
      moshi-fl import-checkpoint ~/moshiko --out hybrid --ttt-layers 16
      moshi-fl import-checkpoint ~/mimi --out small --preset small
    """
    from moshi_fl.models.speech.imported import Choices, import_checkpoint

    changes = {key: value for key, value in model.items() if value is not None}
    found = import_checkpoint(folder, out, Choices(preset, changes, seed))
    size = sum(path.stat().st_size for path in found.folder.iterdir())
    console.done(
        f"Wrote {out}", parameters=Count(found.parameters), size=Size(size), trains=found.part
    )
    console.hint(f"moshi-hub init HUB --weights {shlex.quote(str(out))}   (makes a hub of it)")
