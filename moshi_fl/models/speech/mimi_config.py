"""Settings of Mimi; the defaults are those of the codec that Kyutai released."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moshi_fl.errors import ConfigError
from moshi_fl.models.common import quoted, require_counts, require_numbers, settings_from
from moshi_fl.models.speech.quantizer import QuantizerConfig
from moshi_fl.models.speech.seanet import SeanetConfig
from moshi_fl.models.speech.transformer import TransformerConfig

# Keys of the reference that can have one value only.
SEANET_FIXED = {
    "causal": True,
    "activation": "ELU",
    "norm": "none",
    "pad_mode": "constant",
    "true_skip": True,
    "disable_norm_outer_blocks": 0,
}
TRANSFORMER_FIXED = {"causal": True, "conv_layout": True}


@dataclass(frozen=True)
class MimiConfig:
    """Kyutai's released codec, unless told otherwise.

    Raises:
        ConfigError: A value out of range, or parts that do not fit together.
    """

    sample_rate: int = 24000  # Hz
    frame_rate: float = 12.5  # Hz
    seanet: SeanetConfig = field(default_factory=SeanetConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(
            d_model=512,
            num_heads=8,
            num_layers=8,
            dim_feedforward=2048,
            context=250,
            positional_embedding="rope",
            layer_scale=0.01,
        )
    )

    def __post_init__(self) -> None:
        require_counts(self, ("sample_rate",), name="Mimi")
        require_numbers(self, ("frame_rate",), name="Mimi", above_zero=True)
        found = self.stride * self.frame_rate * self.seanet.hop  # a third has no last digit
        if not math.isclose(found, self.sample_rate) or self.stride < 1:
            raise ConfigError(
                f"Mimi: sample_rate = {self.sample_rate} must be a multiple of "
                f"{self.seanet.hop} (the product of the ratios) times frame_rate = "
                f"{self.frame_rate}."
            )

    @property
    def stride(self) -> int:
        """Latents of SEANet in a frame."""
        return round(self.sample_rate / self.seanet.hop / self.frame_rate)

    @property
    def frame_size(self) -> int:
        """Samples in a frame."""
        return self.seanet.hop * self.stride

    @classmethod
    def from_reference(cls, table: Mapping[str, Any]) -> MimiConfig:
        """Settings under the names of the reference implementation.

        Raises:
            ConfigError: An unknown key, or a kind of model that this is not.
        """
        sections = ("sample_rate", "frame_rate", "seanet", "quantizer", "transformer")
        missing = [name for name in sections if name not in table]
        if missing:
            raise ConfigError(f"configuration: {missing[0]!r} is missing.")
        for name in sections[2:]:
            if not isinstance(table[name], Mapping):
                raise ConfigError(f"{name} = {quoted(table[name])} must be a table.")
        seanet = _without(table["seanet"], SEANET_FIXED, "seanet")
        if isinstance(seanet.get("ratios"), list):
            seanet["ratios"] = tuple(seanet["ratios"])
        width = seanet.get("dimension", SeanetConfig.dimension)
        ends = {"input_dimension": width, "output_dimension": width}
        quantizer = _without(table["quantizer"], ends, "quantizer")
        fixed = TRANSFORMER_FIXED | {"input_dimension": width, "output_dimensions": [width]}
        return cls(
            table["sample_rate"],
            table["frame_rate"],
            settings_from(SeanetConfig, seanet, name="seanet"),
            settings_from(QuantizerConfig, quantizer, name="quantizer"),
            settings_from(
                TransformerConfig,
                _without(table["transformer"], fixed, "transformer"),
                name="transformer",
            ),
        )


def _without(table: Mapping[str, Any], fixed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The table without keys that can have one value only."""
    for key, value in fixed.items():
        if key in table and table[key] != value:
            raise ConfigError(f"{name}: {key} = {quoted(table[key])} must be {value!r}.")
    return {key: value for key, value in table.items() if key not in fixed}
