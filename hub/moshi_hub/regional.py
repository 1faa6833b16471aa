"""A hub that begins with another hub's round, to contribute to that one.

It has the same model, tokenizer and recipe, keys and rules of its own, and round 0 says whose
weights it holds. Its vocabulary grows only when the other one's does: else their models would soon
have different shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from click.core import ParameterSource

from moshi_fl.models.family import Preset
from moshi_fl.replica import Replica
from moshi_fl.upstream import Origin
from moshi_fl.weights import Weights

if TYPE_CHECKING:
    from moshi_hub.create import Plan

NO_GROWTH = 256
"""As ``[vocabulary] max_size``: every vocabulary has as many tokens, so none joins."""

SETTLED = {
    "upstream": ("family", "preset", "model", "source", "seed", "tokenizer"),
    "source": ("family", "seed"),
}
"""What ``moshi-hub init`` takes from the other hub (``--upstream``) or the folder (``--weights``).

A folder without a recipe has that of the preset, so ``--preset`` still says something there.
"""


@dataclass(frozen=True)
class Beginning:
    """A round of another hub, and the settings that go with its model."""

    origin: Origin
    weights: Weights
    preset: Preset

    @property
    def words(self) -> str:
        """What round 0 is, for its commit."""
        return f"round {self.origin.round} of hub {self.origin.hub}"


def refuse_choices(context: click.Context) -> None:
    """Say so when something is asked for that the other hub, or the folder, has settled.

    Raises:
        UsageError: It is.
    """
    given = {
        option.name or "": option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
    }
    for chosen, settled in SETTLED.items():
        for name in settled if chosen in given else ():
            if name in given:
                raise click.UsageError(f"{given[name]} and {given[chosen]} exclude each other.")


def begin_from(plan: Plan, url: str, home: Path) -> Plan:
    """The plan of a hub that begins with the newest round of the hub at ``url``.

    Raises:
        HubError, UntrustedHub: As for any client of that hub.
    """
    snapshot = Replica(plan.url, home).beside(url).pull()
    state = snapshot.state
    config = state.config
    delta = {"codec": config.delta.codec, "max_norm": config.delta.max_norm}
    if config.delta.options:
        delta["options"] = dict(config.delta.options)
    measured = ("sequences", "private_sequences", "precision", "share")
    preset = Preset(
        model=config.model_table,
        training=msgspec.to_builtins(config.training),
        delta=delta,
        evaluation={name: getattr(config.evaluation, name) for name in measured},
        tokenizer=state.tokenizer,
        server_learning_rate=config.aggregation.server_learning_rate,
    )
    beginning = Beginning(Origin.of(snapshot.record), snapshot.load(), preset)
    return replace(plan, family=config.family, beginning=beginning)
