"""Model families by name.

Built-in families are listed here; others are found through the entry-point group
``moshi_fl.families``, so that an installed package adds one without touching this file.
Importing this module imports no model code.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from moshi_fl.errors import ConfigError
from moshi_fl.text import suggestion

if TYPE_CHECKING:
    from moshi_fl.hubfile import HubConfig
    from moshi_fl.models.family import Family, Preset, Task

ENTRY_POINTS = "moshi_fl.families"
_BUILT_IN = {
    "char": "moshi_fl.models.char_family:FAMILY",
    "moc": "moshi_fl.models.moc_family:FAMILY",
    "speech": "moshi_fl.models.speech.family:FAMILY",
}


def known_families() -> list[str]:
    """Names that ``get_family`` accepts, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=ENTRY_POINTS).names})


def get_family(name: str) -> Family:
    """The family of this name; built-in names cannot be taken over by an installed package.

    Raises:
        ConfigError: There is none, or the package that provides it cannot be imported.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return cast("Family", getattr(import_module(module), attribute))
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return cast("Family", point.load())
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"model family {name!r} ({point.value}): {error}.") from error
    raise ConfigError(
        f"there is no model family {name!r}; {suggestion(name, known_families())}",
        hint="Correct its name, or install the package that provides it.",
    )


def task_of(config: HubConfig, tokenizer: bytes) -> Task:
    """A hub's model family, configured by its ``[model]`` table and this tokenizer file.

    Raises:
        ConfigError: The family is not installed here, or refuses a key of the table.
    """
    return get_family(config.family).load(config.model_table, tokenizer)


def get_preset(family: str, name: str) -> Preset:
    """A family's ready-made settings.

    Raises:
        ConfigError: There is no such family or preset; names those there are.
    """
    presets = get_family(family).presets
    if name not in presets:
        raise ConfigError(
            f"family {family!r} has no preset {name!r}.",
            hint=f"--preset {' | '.join(presets)}",
        )
    return presets[name]
