"""``python -m benchmarks [--only NAME] [--quick]``: every ``bench_*`` module, one table.

``--quick`` is for those that have a short version: they take less in, by the same rules.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys

import benchmarks
from benchmarks.common import Row, print_table


def names() -> list[str]:
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removeprefix("bench_") for name in found if name.startswith("bench_"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=names())
    parser.add_argument(
        "--quick", action="store_true", help="the short version, where there is one"
    )
    given = parser.parse_args()
    chosen = given.only or names()
    rows: list[Row] = []
    for name in chosen:
        print(f"running {name} ...", file=sys.stderr, flush=True)
        run = importlib.import_module(f"benchmarks.bench_{name}").run
        short = given.quick and "quick" in inspect.signature(run).parameters
        rows += run(quick=True) if short else run()
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
