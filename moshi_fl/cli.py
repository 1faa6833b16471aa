"""The frame of both commands: a group that loads its subcommands lazily, and one ``main``.

``--help`` imports no subcommand, so it answers at once although training needs torch.
``run`` is the only place where errors are caught.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from moshi_fl import __version__
from moshi_fl.console import Console
from moshi_fl.errors import Exit, MoshiError
from moshi_fl.text import nearest

F = TypeVar("F", bound=Callable[..., Any])
Table = Mapping[str, tuple[str, str]]
"""Name of a subcommand to ``("package.module:function", "What it does in one line.")``."""

# What a person can repair; every other OSError is a bug and keeps its traceback.
_REPAIRABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class LazyGroup(click.Group):
    """A click group whose subcommands are imported only when they are called."""

    def __init__(self, *args: Any, table: Table, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order in which people need them."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand."""
        if cmd_name not in self._table:
            return None
        target, short_help = self._table[cmd_name]
        module, _, function = target.partition(":")
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command), target
        command.short_help = short_help
        # Docstrings are raw strings; click's mark for "do not wrap" is the character itself.
        command.help = (command.help or "").replace("\\b\n", "\b\n")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a subcommand; an unknown one is answered with the nearest."""
        name = args[0]
        if name in self._table or name.startswith("-"):
            return super().resolve_command(ctx, args)
        near = nearest(name, self._table)
        ending = f" Did you mean {near!r}?" if near else ""
        raise click.UsageError(f"No such command {name!r}.{ending}", ctx)


def group(name: str, table: Table, help_text: str) -> LazyGroup:
    """A command line's root, with ``--help`` and ``--version``."""
    root = LazyGroup(
        name,
        table=table,
        help=help_text,
        callback=_help_without_command,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    return click.version_option(__version__, "-V", "--version", prog_name=name)(root)


@click.pass_context
def _help_without_command(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class Real(click.FloatRange):
    """A finite number in a range: of nan, every comparison with a bound is silent."""

    name = "float range"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; what is none is wrong usage."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def output_options(function: F) -> F:
    """``--json`` and ``--quiet``; the function gets the console as its first argument."""

    def switch(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
            console = ctx.find_object(Console)
            assert console is not None
            setattr(console, name, getattr(console, name) or value)

        return callback

    passing = click.make_pass_decorator(Console)(function)
    for flags, name, help_text in (
        (("-q", "--quiet"), "quiet", "No notes and no progress; only data, warnings and errors."),
        (("--json",), "json_mode", "Print one JSON document instead of text."),
    ):
        passing = click.option(
            *flags,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=switch(name),
            help=help_text,
        )(passing)
    return passing  # type: ignore[return-value]


def hub_option(function: F) -> F:
    """``--hub``: which hub; the settings supply it when it is not given."""
    return click.option(
        "--hub", metavar="URL", help="URL or path of the hub. [default: the setting 'hub']"
    )(function)


def plot_option(help_text: str) -> Callable[[F], F]:
    """``--plot``: a chart's file, refused before all the work if it could not be written."""

    def fitting(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() != ".svg":
            raise click.BadParameter("the chart is an SVG; let the name end in .svg.", ctx, param)
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"folder {str(path.parent)!r} does not exist.", ctx, param)
        return path

    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option("--plot", type=kind, callback=fitting, metavar="FILE", help=help_text)


def run(root: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; errors become sentences here, only here."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console()
    status = _invoke(root, args, console)
    try:
        console.finish()
    except OSError as error:
        return _output_lost(console, error)
    return status


def _invoke(root: click.Command, args: list[str], console: Console) -> int:
    try:
        status = root.main(args, prog_name=root.name, obj=console, standalone_mode=False)
        return int(status) if isinstance(status, int) else int(Exit.DONE)
    except MoshiError as error:
        return _report(console, str(error), error.hint, error.exit_code)
    except click.ClickException as error:
        console.json_mode = console.json_mode or "--json" in args
        hint = _help_command(root, error) if isinstance(error, click.UsageError) else ""
        return _report(console, error.format_message(), hint, Exit(error.exit_code))
    except click.Abort:
        hint = console.resume_command and f"{console.resume_command}   ({console.resume_note})"
        return _report(console, "interrupted.", hint, Exit.INTERRUPTED)
    except BrokenPipeError as error:
        return _output_lost(console, error)
    except OSError as error:
        if error.errno not in _REPAIRABLE:
            _confess(root, console)
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _report(console, f"{where}{error.strerror}.", _repair(error), Exit.FAILED)
    except Exception:
        _confess(root, console)
        raise


def _repair(error: OSError) -> str:
    if not error.filename:
        return ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "Make room there and do the same again; what was complete is kept."
    return "Check to whom it belongs and what they may do with it."


def _help_command(root: click.Command, error: click.UsageError) -> str:
    return f"{error.ctx.command_path if error.ctx else root.name} --help"


def _report(console: Console, message: str, hint: str, exit_code: Exit) -> int:
    console.error(message, hint=hint, exit_code=exit_code)
    return int(exit_code)


def _confess(root: click.Command, console: Console) -> None:
    console.error(
        "this is a bug in moshi-fl; the lines below say where.",
        hint=f"Report them together with the output of `{_doctor(root)} doctor --json`.",
    )
    console.finish()


def _doctor(root: click.Command) -> str:
    """Whose ``doctor`` to ask: that of the command itself, or of the contributor's."""
    return str(root.name) if isinstance(root, click.Group) else "moshi-fl"


def _output_lost(console: Console, error: OSError) -> int:
    """Nobody reads our output any more (``| head``), which is fine, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest goes nowhere, quietly
    if not isinstance(error, BrokenPipeError):
        console.error(f"the output cannot be written: {error.strerror}.")
    return int(Exit.FAILED)


def pairs(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, bool | int | float | str]:
    """Read options ``NAME=VALUE``, where a value is a number, true, false or a word."""
    found = {}
    for text in values:
        name, _, value = text.partition("=")
        if not name or not value:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE.", ctx, param)
        found[name] = _scalar(value)
    return found


set_option = click.option(
    "--set",
    "model",
    multiple=True,
    callback=pairs,
    metavar="KEY=VALUE",
    help="A key of [model] to have otherwise than the preset; may be given several times.",
)


def _scalar(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
