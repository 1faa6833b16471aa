"""Peak memory of a training step against what it must hold at least.

What must be there at once: weights, gradients, both moments of the optimizer, and what autograd
keeps for the backward pass (counted tensor by tensor, each storage once). The peak is the process's
own, read from Linux after a step, less what it was before the model was built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import Row, print_table

MB = 1e6


def resident(key: str) -> int:
    """``VmRSS`` or, since it was last reset, ``VmHWM``, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(family: str) -> dict[str, float]:
    """In this process; of a step after the first, which builds what stays."""
    import torch

    from moshi_fl.models import get_family, get_preset
    from moshi_fl.train.engine import Engine
    from moshi_fl.train.recipe import Recipe

    torch.set_num_threads(1)
    torch.mm(torch.zeros(64, 64), torch.zeros(64, 64))
    before = resident("VmRSS")
    preset = get_preset(family, "base")
    task = get_family(family).load(preset.model, preset.tokenizer)
    module = task.build()
    context = preset.model.get("context") or preset.model["max_seq_len"]
    batch = torch.randint(250, (8, context + 1))
    engine = Engine(module, task.loss, Recipe(steps=10))
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with engine.active():
        engine.step(0, [batch])
        Path("/proc/self/clear_refs").write_text("5")
        engine.step(1, [batch])
        peak = resident("VmHWM")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            task.loss(module, batch)
    weights = sum(p.numel() for p in module.parameters()) * 4
    return {"peak": peak - before, "weights": weights, "activations": sum(kept.values())}


def run() -> list[Row]:
    rows = []
    for family in ("char", "moc"):
        command = [sys.executable, "-m", "benchmarks.bench_memory", family]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        needed = 4 * found["weights"] + found["activations"]
        rows.append(
            Row(
                what=f"peak memory of a training step, {family}/base, batch 8",
                ours=f"{found['peak'] / MB:,.0f} MB",
                rival=f"needed at least {needed / MB:,.0f} MB",
                ratio=needed / found["peak"],
                target="peak <= 1.2x",
                note=f"{found['peak'] / needed:.2f}x; activations "
                f"{found['activations'] / MB:,.0f} MB",
            )
        )
    return rows


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        print_table(run())
