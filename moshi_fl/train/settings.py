"""The trainer's YAML file: the keys of the MoC reference with its defaults, and a few of our own.

Read strictly: an unknown key is an error that names the nearest known one and the line. Numbers
that YAML 1.1 leaves as text (``1e6``) are numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moshi_fl.errors import ConfigError
from moshi_fl.text import suggestion
from moshi_fl.train.recipe import Recipe

MAX_BYTES = 1 << 18
IDLE = (
    *("save_latest_always", "num_epochs", "num_workers"),
    *("pin_memory", "persistent_workers", "prefetch_factor"),
)
"""Keys of the reference that have no meaning here."""


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how; one field for each key."""

    model: dict[str, Any] = field(default_factory=dict)
    family: str = "moc"  # or char
    data_dir: str = "data/"
    val_dir: str = ""  # held-out shards
    val_share: float = 0.0  # without val_dir: this share of data_dir, from its end, is held out
    val_interval: int = 1000  # steps
    val_batches: int = 20
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 2000
    max_steps: int = 600_000
    batch_size: int = 16  # sequences at once, in each process
    gradient_accumulation_steps: int = 1
    grad_clip: float = 1.0
    precision: str = "auto"
    seed: int = 1337
    device: str = "cuda"
    compile_model: bool = True
    out_dir: str = "checkpoints"
    log_interval: int = 20  # steps
    save_interval: int = 1000  # steps
    keep_checkpoints: int = 3  # newest; 0 keeps all
    peak_flops: float = 0.0  # of one device; 0 measures
    tensorboard: bool = False
    wandb_project: str = ""
    wandb_entity: str = ""
    wandb_run_name: str = ""
    save_latest_always: bool = True
    num_epochs: int = 1
    num_workers: int = 4
    pin_memory: bool = True
    persistent_workers: bool = True
    prefetch_factor: int = 2

    def __post_init__(self) -> None:
        for key in ("log_interval", "save_interval", "val_interval", "val_batches"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} = {getattr(self, key)} must be at least 1.")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share = {self.val_share} must be from 0 to below 1.")
        if self.keep_checkpoints < 0 or self.peak_flops < 0:
            raise ConfigError("keep_checkpoints and peak_flops must be 0 or more.")

    def recipe(self, device: str) -> Recipe:
        """How to train on a device."""
        return Recipe(
            steps=self.max_steps,
            batch_size=self.batch_size,
            accumulation=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_fraction=min(self.warmup_steps / max(self.max_steps, 1), 1.0),
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            gradient_clip=self.grad_clip,
            precision=self.precision,
            compile=self.compile_model,
            seed=self.seed,
            device=device,
        ).settled()


def read_settings(path: Path, changes: Sequence[str] = ()) -> tuple[Settings, list[str]]:
    """Settings from a file, with ``key=value`` or ``model.key=value`` on top; keys without meaning.

    Raises:
        ConfigError: Unreadable, not YAML, an unknown key, or a value of the wrong kind.
    """
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_BYTES} bytes.")
    try:
        text = data.decode("utf-8-sig")
        table, lines = yaml.safe_load(text), _lines(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {_one_line(error)}.") from error
    table = {} if table is None else table
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected keys with values, such as max_steps: 1000.")
    for change in changes:
        _change(table, change)
    values = {
        str(key): _checked(str(key), value, _place(path, lines, str(key)))
        for key, value in table.items()
    }
    return Settings(**values), [key for key in IDLE if key in values]


def _lines(node: yaml.Node | None) -> dict[str, int]:
    """Line of each top key."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _place(path: Path, lines: Mapping[str, int], key: str) -> str:
    return f"{path}, line {lines[key]}" if key in lines else f"{path} and --set"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _change(table: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: not a value.") from error
    if not equals:
        raise ConfigError(f"--set {change}: expected key=value.")
    top, _, inner = key.partition(".")
    if not inner:
        table[top] = value
    elif isinstance(table.setdefault(top, {}), dict):
        table[top] = {**table[top], inner: value}
    else:
        raise ConfigError(f"--set {change}: {top} has no keys of its own.")


def _checked(key: str, value: Any, where: str) -> Any:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    if key not in kinds:
        raise ConfigError(f"{where}: unknown key {key!r}; {suggestion(key, kinds)}")
    try:
        return _CONVERTERS[kinds[key]](value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {key} = {value!r} {error}.") from error


def _number(value: Any) -> float:
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("must be a whole number")
    return int(number)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError("must be text")
    return value or ""


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("must have keys of its own")
    return value


_CONVERTERS = {
    "int": _whole,
    "float": _number,
    "bool": _flag,
    "str": _text,
    "dict[str, Any]": _table,
}
