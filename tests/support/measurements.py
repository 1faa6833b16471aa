"""What evaluators in a CI hand on, without any model to measure."""

from __future__ import annotations

from typing import Any

import msgspec

from moshi_hub.results import GateResult, Measurement


def measurement(gate: GateResult, seat: str, **fields: Any) -> Measurement:
    """A measurement by which the contribution helps, but for these fields."""
    assert gate.contribution
    found = Measurement(
        hub=gate.hub,
        head=gate.head,
        contribution=gate.contribution.id,
        evaluator=seat,
        system=f"Linux {seat}",
        software="moshi-fl test",
        pool="b" * 64,
        precision="float64",
        share=0.25,
        sequences=128,
        losses="c" * 64,
        before=2_616_412,
        after=2_610_100,
        gain=6_312,
        standard_error=900,
        outcome="credit",
    )
    return msgspec.structs.replace(found, **fields)
