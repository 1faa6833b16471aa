"""``moshi-fl tokenize``: make a tokenizer from texts, and token shards from texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moshi_fl.cli import output_options
from moshi_fl.console import Console
from moshi_fl.errors import DataError
from moshi_fl.text import Size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_fl.data import Sources
    from moshi_fl.subwords import Subwords

PATHS = click.argument(
    "paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
TOTAL_BYTES = 1 << 40  # unlike a contribution, shards may be large


@click.group(invoke_without_command=True)
@click.pass_context
def tokenize(context: click.Context) -> None:
    r"""Turn texts into what `python -m moshi_fl.train` reads.

    \b
    Examples:
      moshi-fl tokenize train ~/code --vocab-size 4096 --out tokenizer.json
      moshi-fl tokenize shards ~/code --tokenizer tokenizer.json --out data --val-out held-out
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@tokenize.command()
@PATHS
@click.option("--vocab-size", type=click.IntRange(260, 65536), default=4096, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@output_options
def train(console: Console, paths: tuple[Path, ...], vocab_size: int, out: Path) -> None:
    r"""Learn a tokenizer.json from PATHS: which byte sequences are frequent.

    Equal texts give an equal file. Hugging Face `tokenizers` reads it, and
    `moshi-hub init --tokenizer` takes it.
    """
    _refuse_present(out)
    sources = _read(console, paths)
    from moshi_fl.subwords import Subwords
    from moshi_fl.weights import write_atomic

    subwords = Subwords.train((source.text for source in sources.taken), vocab_size)
    write_atomic(out, subwords.to_bytes())
    console.done(f"Wrote {out}", tokens=subwords.size, file=Size(out.stat().st_size))
    console.hint(f"moshi-fl tokenize shards PATHS --tokenizer {out} --out DIR")


@tokenize.command()
@PATHS
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json. [default: one token for each byte]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of shards.")
@click.option("--val-out", type=click.Path(path_type=Path), help="Hold files out, to here.")
@click.option("--shard-tokens", type=click.IntRange(1), default=100_000_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, help="Which files are held out.")
@output_options
def shards(
    console: Console,
    paths: tuple[Path, ...],
    tokenizer: Path | None,
    out: Path,
    val_out: Path | None,
    shard_tokens: int,
    seed: int,
) -> None:
    """Write the texts under PATHS as .npy shards.

    An end mark follows each text. The same is left out as of a contribution: what .gitignore says,
    binaries, secrets and so on. With --val-out, about a tenth of the files goes there instead.
    """
    from moshi_fl import data
    from moshi_fl.subwords import Subwords

    _refuse_present(out)
    if val_out:
        _refuse_present(val_out)
        _refuse_nested(out.resolve(), val_out.resolve())
    subwords = _tokenizer(tokenizer) if tokenizer else Subwords.bytes_only()
    sources = _read(console, paths)
    texts: Sequence[str] = [source.text for source in sources.taken]
    figures: dict[str, Any] = {}
    if val_out:
        split = data.split(sources, seed=seed)
        texts = split.training
        figures["held_out_tokens"] = _write(
            console, subwords, split.held_out, val_out, shard_tokens
        )
    figures["tokens"] = _write(console, subwords, texts, out, shard_tokens)
    count = figures["tokens"] + figures.get("held_out_tokens", 0)
    per_token = round(sources.bytes / count, 2)
    console.done(f"Wrote {out}", **figures, vocab_size=subwords.size, bytes_per_token=per_token)
    console.hint(f"python -m moshi_fl.train CONFIG --set data_dir={out}")


def _tokenizer(path: Path) -> Subwords:
    from moshi_fl.subwords import Subwords, start_of

    return Subwords.from_bytes(start_of(path), name=str(path))


def _refuse_nested(one: Path, other: Path) -> None:
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise DataError(
            f"{one} and {other} must be apart.", hint="Give --val-out a folder beside --out."
        )


def _refuse_present(path: Path) -> None:
    if path.exists():
        raise DataError(f"{path} is there already.", hint="Give another --out, or remove it.")


def _read(console: Console, paths: tuple[Path, ...]) -> Sources:
    from moshi_fl.data import read_sources, told_left_out

    sources = read_sources(paths, max_bytes=TOTAL_BYTES)
    left = told_left_out(sources.skipped, sources.left_out)
    console.note(
        f"{len(sources.taken)} files, {sources.bytes:,} bytes"
        + (f"; left out: {left}" if left else "")
    )
    return sources


def _write(
    console: Console, subwords: Subwords, texts: Sequence[str], out: Path, shard_tokens: int
) -> int:
    """Shards of these texts; how many tokens they have."""
    import numpy as np

    from moshi_fl.shards import TokenShards, write_shards

    end = np.array([subwords.end], np.uint16)

    def pieces() -> Iterator[NDArray[np.uint16]]:
        with console.progress("Tokens", len(texts), unit="files") as bar:
            for number, text in enumerate(texts, 1):
                yield subwords.encode(text)
                yield end
                bar.update(number)

    write_shards(pieces(), out, tokens_per_shard=shard_tokens)
    return len(TokenShards.open(out))
