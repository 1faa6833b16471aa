"""A user's settings: where each value comes from, and how ``config.toml`` is changed.

Everything that moshi-fl keeps for a user lies in one folder: ``MOSHI_FL_HOME`` or ``~/.moshi-fl``
(cached rounds, unfinished work, ``config.toml``), readable by its owner alone.

A value is taken from the first of: command-line flag, ``MOSHI_FL_*`` variable, ``config.toml``,
the hub's own rules, the default. ``Settings.origin`` says which it was.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moshi_fl import tomlfile
from moshi_fl.errors import ConfigError, WrongOption
from moshi_fl.text import nearest

MAX_CONTRIBUTOR_LENGTH = 200  # what a record accepts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if not value.isprintable():
        raise ValueError("must be one printable line")
    return value


def _contributor(value: Any) -> str:
    name = _text(value).strip()
    if not name or len(name) > MAX_CONTRIBUTOR_LENGTH:
        raise ValueError(f"must have 1 to {MAX_CONTRIBUTOR_LENGTH} characters")
    return name


def _paths(value: Any) -> tuple[str, ...]:
    parts = value.split(os.pathsep) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"must be paths (several on one line are separated by {os.pathsep!r})")
    return tuple(part for part in parts if part)


def _device(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", value):
        raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
    return value


def _precision(value: Any) -> str:
    if value not in ("fp32", "bf16", "auto"):
        raise ValueError("must be fp32, bf16 or auto")
    return str(value)


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
        if type(number) is not int or not low <= number <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return number

    return parse


def _setting(default: Any, help_text: str, parse: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse})


@dataclass(frozen=True)
class Settings:
    """What a user may set once and for all; every field is a key of ``config.toml``."""

    hub: str = _setting("", "URL or path of the hub", _text)
    contributor: str = _setting("", "your name in contribution records; public", _contributor)
    signing_key: str = _setting(
        "", "your SSH key (or its .pub), instead of one made for you", _text
    )
    data: tuple[str, ...] = _setting((), "files and folders to train on", _paths)
    device: str = _setting("auto", "auto, cpu, mps, cuda or cuda:N", _device)
    precision: str = _setting("fp32", "fp32, bf16 or auto; default: the hub's", _precision)
    threads: int = _setting(0, "CPU threads for training; 0 lets torch choose", _whole(0, 1024))
    min_attestations: int = _setting(
        0, "refuse rounds with fewer agreeing attestations of independent people", _whole(0, 100)
    )
    github_api: str = _setting("", "API of a GitHub Enterprise server that hosts hubs", _text)
    keep_rounds: int = _setting(2, "rounds kept in the cache per hub", _whole(1, 100_000))
    _origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, name: str) -> str:
        """Where a value comes from: a flag, a variable, a line of a file, ``hub``, ``default``."""
        return self._origins.get(name, "default")

    @property
    def own_key(self) -> Path | None:
        """The user's own SSH key; None when moshi-fl shall use the one it made for them."""
        return Path(self.signing_key).expanduser() if self.signing_key else None

    def with_policy(self, **policy: object) -> Settings:
        """The hub's values where the user said nothing; only once the hub's rules are known."""
        unset = {k: _checked(k, v, "hub.toml") for k, v in policy.items() if self._is_unset(k)}
        return replace(self, **unset, _origins={**self._origins, **dict.fromkeys(unset, "hub")})

    def _is_unset(self, name: str) -> bool:
        return self.origin(name) == "default"


SETTINGS: dict[str, str] = {f.name: f.metadata["help"] for f in fields(Settings) if f.metadata}
"""Name of each setting to what it means."""
_PARSERS: dict[str, Callable[[Any], Any]] = {
    f.name: f.metadata["parse"] for f in fields(Settings) if f.metadata
}


_FLAGS = {"signing_key": "--key"}  # those that are not named as their setting


def home() -> Path:
    """The folder of everything that moshi-fl keeps; it need not exist yet."""
    folder = Path(os.environ.get("MOSHI_FL_HOME") or "~/.moshi-fl")
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{folder}: {error}.", hint="Set MOSHI_FL_HOME to a folder.") from error


def ensure_home() -> Path:
    """The same, created with mode 0700 when it is missing.

    Raises:
        ConfigError: It cannot be created, or something else has its name.
    """
    path = home()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create {path}: {error.strerror}.",
            hint="Set MOSHI_FL_HOME to a folder that you can write to.",
        ) from error
    return path


def config_path() -> Path:
    """Where the settings file lies; it need not exist."""
    return home() / "config.toml"


def load_settings(**flags: object) -> Settings:
    """Settings from all sources.

    Args:
        flags: Values from the command line; ``None`` (or an empty tuple) means not given.

    Raises:
        ConfigError: A key or a value cannot be used; names the flag, the variable or the line.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, (value, origin) in _given(flags).items():
        values[name] = _checked(name, value, origin)
        origins[name] = origin
    if "contributor" not in values:
        values["contributor"] = _pseudonym(ensure_home())
    return Settings(**values, _origins=origins)


def _given(flags: Mapping[str, object]) -> dict[str, tuple[object, str]]:
    text, table = tomlfile.read(config_path())
    given: dict[str, tuple[object, str]] = {
        name: (value, tomlfile.place(config_path(), text, name)) for name, value in table.items()
    }
    for name in _PARSERS:
        variable = f"MOSHI_FL_{name.upper()}"
        if os.environ.get(variable):
            given[name] = (os.environ[variable], variable)
    for name, value in flags.items():
        if value is not None and value != ():
            given[name] = (value, _FLAGS.get(name) or f"--{name.replace('_', '-')}")
    return given


def _checked(name: str, value: object, origin: str) -> Any:
    parse = parser_of(name, origin)
    try:
        return parse(value)
    except ValueError as error:
        kind = WrongOption if origin.startswith("--") else ConfigError
        raise kind(f"{origin}: {name} {error}, not {value!r}.") from error


def parser_of(name: str, origin: str = "") -> Callable[[Any], Any]:
    """What checks a setting's value (it raises ``ValueError``).

    Raises:
        ConfigError: There is no such setting; suggests the nearest.
    """
    if name in _PARSERS:
        return _PARSERS[name]
    near = nearest(name.replace("-", "_"), _PARSERS)
    hint = f"Did you mean {near}?" if near else f"Settings: {', '.join(_PARSERS)}."
    raise ConfigError(f"{origin + ': ' if origin else ''}unknown setting {name!r}.", hint=hint)


def _pseudonym(folder: Path) -> str:
    """A stable name that tells nothing about its bearer, made on first use.

    Records are public and permanent, so a name from the system or from Git's settings
    is never used unasked.
    """
    path = folder / "pseudonym"
    try:
        if not path.exists():
            fresh = folder / f".tmp-{secrets.token_hex(8)}"
            fresh.touch(mode=0o600)
            fresh.write_text(f"anonymous-{secrets.token_hex(4)}\n", encoding="utf-8")
            try:
                path.hardlink_to(fresh)  # of two first runs at the same moment, one wins
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return _contributor(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot use {path}: {error}.", hint="moshi-fl config set contributor NAME"
        ) from error


def absolute(data: Path) -> Path:
    """A path to data that means the same in another folder.

    Also where it is several in one, with weights: ``calls.jsonl:2,studio:0.5``.
    """
    if data.expanduser().exists():
        return data.expanduser().absolute()
    parts = (Path(part.strip()).expanduser().absolute() for part in str(data).split(","))
    return Path(",".join(map(str, parts)))


def set_value(name: str, words: Sequence[str]) -> Any:
    """Write one setting to ``config.toml``, given as on a command line; returns the parsed value.

    Paths become absolute: the next command may run in another folder.

    Raises:
        ConfigError: Unknown name, unusable value, or a file that is broken already.
    """
    if name == "data":
        words = [str(absolute(Path(word))) for word in words]
    elif len(words) > 1:
        raise ConfigError(f"{name} takes one value, not {len(words)}.")
    elif name == "signing_key" or (name == "hub" and Path(words[0]).expanduser().is_dir()):
        words = [str(Path(words[0]).expanduser().absolute())]
    value = _checked(name, words if name == "data" else words[0], "config set")
    ensure_home()
    tomlfile.put(config_path(), name, list(value) if isinstance(value, tuple) else value)
    return value


def unset_value(name: str) -> bool:
    """Remove one setting from ``config.toml``; False when it was not there.

    Raises:
        ConfigError: Unknown name that is not in the file either, or a file that is broken.
    """
    _, table = tomlfile.read(config_path())
    if name not in table:
        parser_of(name)
        return False
    tomlfile.drop(config_path(), name)
    return True
