"""``moshi-fl config``: show or change the user's settings."""

from __future__ import annotations

import click

from moshi_fl import config as settings_file
from moshi_fl.cli import output_options
from moshi_fl.console import Console


@click.group(invoke_without_command=True)
@output_options
def config(console: Console) -> None:
    r"""Show your settings and where each value comes from.

    A flag wins over a MOSHI_FL_* variable, that over config.toml, that over the hub's rules.

    \b
    Examples:
      moshi-fl config
      moshi-fl config set hub https://git.example.org/our/model.git
      moshi-fl config set data ~/code ~/notes
      moshi-fl config unset data
    """
    if click.get_current_context().invoked_subcommand is None:
        console.table(_rows(), ["setting", "value", "origin", "meaning"], name="settings")


def _rows() -> list[dict[str, object]]:
    settings = settings_file.load_settings()
    return [
        {
            "setting": name,
            "value": _in_force(settings, name),
            "origin": settings.origin(name),
            "meaning": meaning,
        }
        for name, meaning in settings_file.SETTINGS.items()
    ]


def _in_force(settings: settings_file.Settings, name: str) -> object:
    """A setting's value; None where it is left to the hub's rules."""
    if name == "precision" and settings.origin(name) == "default":
        return None
    return _shown(name, getattr(settings, name))


def _shown(name: str, value: object) -> object:
    from moshi_fl.store import redact

    return redact(str(value)) if name == "hub" else value


@config.command("set")
@click.argument("key")
@click.argument("value", nargs=-1, required=True)
@output_options
def set_(console: Console, key: str, value: tuple[str, ...]) -> None:
    """Write a setting to config.toml. DATA takes several paths."""
    parsed = settings_file.set_value(key, value)
    console.done(f"Set {key}", **{key: _shown(key, parsed)})


@config.command()
@click.argument("key")
@output_options
def unset(console: Console, key: str) -> None:
    """Remove a setting from config.toml, so that its default holds again."""
    if settings_file.unset_value(key):
        console.done(f"Removed {key}", removed=True)
    else:
        console.note(f"{key} was not set in {settings_file.config_path()}.")
        console.result(removed=False)


@config.command()
@output_options
def path(console: Console) -> None:
    """Print where config.toml lies."""
    console.result(path=settings_file.config_path())
