"""What each strategy loses to each attack, in real federated runs of ten contributors.

``python -m benchmarks.bench_attacks [--quick] [--every] [--json FILE]``: quick plays the main
columns against three attackers only; every plays all strategies against one and two, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.attacks import proofs
from benchmarks.attacks.table import (
    DEFAULT,
    Cell,
    acceptance,
    machine_readable,
    markdown,
    measure,
    play,
    refusals,
    rows,
)
from benchmarks.attacks.world import LATE, World
from benchmarks.common import Row, print_table


def run(quick: bool = False, every: bool = False, json_file: Path | None = None) -> list[Row]:
    """Play all runs; print the whole table, give the rows with targets."""
    torch.set_num_threads(1)
    world = World()
    cells = measure(world, quick=quick, every=every, tell=tell)
    if json_file:
        json_file.write_text(json.dumps(machine_readable(cells), indent=1))
    show(world, cells)
    late = play(World(LATE), DEFAULT)
    return [*rows(cells), acceptance("in a hub that hardly learns any more", [late.run])]


def show(world: World, cells: list[Cell]) -> None:
    print(f"Held-out loss after {world.geometry.rounds} rounds ", end="")
    print(f"(before the first: {world.loss(world.start):.4f}); in brackets the payload's share.\n")
    print(markdown(cells))
    print("\n| file | must be refused as | is refused as |\n|---|---|---|")
    for broken, found in refusals(world):
        print(f"| {broken.name} | {broken.code} | {found} |")
    print(f"\n{proofs.markdown()}\n")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    print_table(run(given.quick, given.every, given.json))
