"""A small source tree and a tiny model, for simulations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from moshi_sdk.simulate import Options, Simulation, Start, from_preset

MODEL = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32, "context": 24}
QUICK = Options(clients=3, rounds=2, steps=4, batch_size=4, learning_rate=2e-2)


def write_code(root: Path) -> Path:
    """Four top-level directories of different sizes, and two files beside them: 20 files."""
    for directory, count in (("api", 6), ("core", 4), ("docs", 3), ("web/js", 5)):
        (root / directory).mkdir(parents=True)
        for number in range(count):
            text = f"def {directory[:3]}{number}(value):\n    return value + {number}\n"
            (root / directory / f"f{number}.py").write_text(text * (8 + number))
    (root / "setup.py").write_text("name = 'code'\nversion = 1\n" * 12)
    (root / "main.py").write_text("import api, core\napi.run(core)\n" * 12)
    return root


def tiny_start() -> Start:
    """A model that trains in no time, measured on few texts."""
    tiny = from_preset(model=MODEL)
    evaluation = msgspec.structs.replace(tiny.config.evaluation, sequences=12)
    return replace(tiny, config=msgspec.structs.replace(tiny.config, evaluation=evaluation))


def losses(result: Simulation) -> list[float]:
    """Held-out losses from round 0 on."""
    return [entry.held_out_loss for entry in result.rounds]
