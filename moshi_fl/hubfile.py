"""``hub.toml``: what a hub trains and by which rules. Parsed strictly; errors name key and line."""

from __future__ import annotations

import re
import tomllib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from moshi_fl.errors import ConfigError
from moshi_fl.records import HubId, Name, Scalar, Text
from moshi_fl.text import suggestion

Positive = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0, le=1e30)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Tables = dict[str, dict[str, Any]]

MAX_HUBFILE_BYTES = 1 << 16


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; a key that it does not declare is an error."""


class Hub(_Table, frozen=True, kw_only=True):
    """``[hub]``: who this hub is and where its weights lie."""

    format: Literal[1]
    id: HubId
    name: Text
    refs: Literal["refs/moshi/", "refs/heads/moshi/"] = "refs/moshi/"


class TrainingRules(_Table, frozen=True, kw_only=True):
    """``[training]``: the recipe that contributors follow unless they say otherwise."""

    steps: Positive = 200
    batch_size: Positive = 8
    accumulation: Positive = 1
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    weight_decay: Annotated[float, Meta(ge=0, le=1e30)] = 0.01
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    gradient_clip: PositiveFloat = 1.0
    warmup_fraction: Fraction = 0.05
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    trains: Name = "all"
    """What of the model: ``all``, or a part that its family has, such as ``lora``."""


class DeltaRules(_Table, frozen=True, kw_only=True):
    """``[delta]``: the codec of contributions and the limits that ``verify`` enforces."""

    codec: Name = "topk"
    options: dict[str, Scalar] = {}
    max_norm: PositiveFloat = 100.0
    max_staleness: Annotated[int, Meta(ge=0)] = 2


class AggregationRules(_Table, frozen=True, kw_only=True):
    """``[aggregation]``: how accepted contributions become the next round."""

    strategy: str = "fedavg"
    options: dict[str, Scalar] = {}
    server_learning_rate: PositiveFloat = 1.0
    min_contributions: Positive = 1
    max_contributions: Positive = 1000
    weighting: Literal["equal", "examples"] = "equal"
    min_owners: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    max_examples: Positive = 100_000
    staleness_discount: Fraction = 0.5


class StorageRules(_Table, frozen=True, kw_only=True):
    """``[storage]``: when whole weights are published, and how long old ones stay."""

    keyframes: Literal["auto", "every-round"] = "auto"
    keep_rounds: Annotated[int, Meta(ge=0)] = 0
    """Rounds whose deltas stay for audit; 0 keeps all."""


class EvaluationRules(_Table, frozen=True, kw_only=True):
    """``[evaluation]``: how contributions are measured on held-out data, and by whom."""

    sequences: Annotated[int, Meta(ge=2, le=10_000)] = 256
    private_sequences: Annotated[int, Meta(ge=0, le=1000)] = 32
    precision: Literal["float64", "float32"] = "float64"
    share: Annotated[float, Meta(gt=0, le=1)] = 0.25
    gate: bool = True
    evaluators: Literal["local", "appointed"] = "local"
    quorum: Annotated[int, Meta(ge=1, le=6)] = 2
    hours: Annotated[float, Meta(gt=0, le=10_000)] = 24.0


class VocabularyRules(_Table, frozen=True, kw_only=True):
    """``[vocabulary]``: when proposed characters join the vocabulary."""

    min_proposals: Positive = 2
    max_size: Annotated[int, Meta(ge=256)] = 4096


class TrustRules(_Table, frozen=True, kw_only=True):
    """``[trust]``: how long signatures hold, in days."""

    timestamp_days: Annotated[int, Meta(ge=1, le=3650)] = 90
    metadata_days: Annotated[int, Meta(ge=1, le=3650)] = 365


class HubConfig(_Table, frozen=True, kw_only=True):
    """The whole file."""

    hub: Hub
    model: dict[str, Any]
    training: TrainingRules = TrainingRules()
    delta: DeltaRules = DeltaRules()
    aggregation: AggregationRules = AggregationRules()
    storage: StorageRules = StorageRules()
    evaluation: EvaluationRules = EvaluationRules()
    vocabulary: VocabularyRules = VocabularyRules()
    trust: TrustRules = TrustRules()

    @property
    def family(self) -> str:
        """Name of the model family."""
        return str(self.model["family"])

    @property
    def model_table(self) -> dict[str, Any]:
        """The family's own settings."""
        return {key: value for key, value in self.model.items() if key != "family"}


def parse_hubfile(text: str, *, name: str = "hub.toml") -> HubConfig:
    """Read a ``hub.toml``.

    Raises:
        ConfigError: Not TOML, an unknown key (with the nearest known one), a wrong type or value;
            names the key and the line.
    """
    if len(text) > MAX_HUBFILE_BYTES:
        raise ConfigError(f"{name}: {len(text)} characters, the limit is {MAX_HUBFILE_BYTES}.")
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number too long
        raise ConfigError(f"{name}: {error}.") from error
    try:
        config = msgspec.convert(tables, HubConfig)
    except msgspec.ValidationError as error:
        raise _located(str(error), text, name) from error
    if not isinstance(config.model.get("family"), str):
        raise ConfigError(f'{name}: [model] needs family = "…".')
    return config


def changed_settings(old: HubConfig, new: HubConfig) -> list[str]:
    """What differs between two files, as ``table.key: old -> new``."""
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    return [
        f"{table}.{key}: {before[table].get(key)!r} -> {after[table].get(key)!r}"
        for table in after
        for key in sorted({*before[table], *after[table]})
        if before[table].get(key) != after[table].get(key)
    ]


def _located(message: str, text: str, name: str) -> ConfigError:
    what, _, where = message.partition(" - at `$")
    path = [part for part in where.rstrip("`").split(".") if part]
    unknown = re.search(r"unknown field `(.*)`", what)
    if unknown:
        path.append(unknown[1])
        what = f"unknown key {unknown[1]!r}; {_suggestion(path)}"
    line = line_of(text, path)
    place = f"{name}, line {line}" if line else name
    end = "" if unknown else "."
    return ConfigError(f"{place}: {'.'.join(path)}: {what}{end}")


def _suggestion(path: list[str]) -> str:
    kind: Any = HubConfig
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if len(path) > 1 and isinstance(known.get(path[0]), type):
        known = {field.name: field.type for field in msgspec.structs.fields(known[path[0]])}
    return suggestion(path[-1], known)


def line_of(text: str, path: list[str]) -> int | None:
    """Line (from 1) where the key, or at least its table, is written; None when it is not."""
    table, found = "", None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            table = header[1].strip()
            found = number if table == ".".join(path) else found
        key = re.match(r"\s*([\w-]+)\s*=", line)
        if key and [*filter(None, table.split(".")), key[1]] == path:
            return number
    return found
