"""``make fuzz``: mutated contributions, records and files through everything that reads them.

    python -m tests.fuzz                                     a million inputs, some minutes
    python -m tests.fuzz --inputs 5000 --seconds 20          a short run
    python -m tests.fuzz --seed 1 --only gate-delta --index 4711   one input again

Status 1 when an input showed a defect; it is saved with the command that runs it again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ENVIRONMENT
from tests.fuzz import runner
from tests.fuzz.runner import ALLOWANCE, Failure, Plan, Tally
from tests.fuzz.targets import TARGETS, working_in


def main(argv: list[str] | None = None) -> int:
    """Run, print the table, save what failed."""
    options = _options(argv)
    with (
        tempfile.TemporaryDirectory(prefix="moshi-fl-fuzz-") as folder,
        working_in(Path(folder)),
    ):
        if options.index is not None:
            return _again(options)
        plan = Plan(
            options.inputs, options.seed, options.jobs, options.seconds, tuple(options.only)
        )
        start = time.monotonic()
        tallies, failures = runner.run(plan)
        _show(tallies, time.monotonic() - start, options)
        if failures:
            runner.save(failures, options.out)
            _complain(failures, options.out)
    return int(bool(failures))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many, all targets")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--jobs", type=int, default=runner.processes())
    parser.add_argument("--only", action="append", default=[], choices=list(TARGETS))
    parser.add_argument(
        "--index", type=int, help="run this one input again, and show its traceback"
    )
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args(argv)
    if options.index is not None and (len(options.only) != 1 or options.seed is None):
        parser.error("--index needs --seed and one --only")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def _again(options: argparse.Namespace) -> int:
    name = options.only[0]
    made = runner.input_of(name, options.seed, options.index)
    print(repr(made)[:4000])
    start = time.process_time()
    print(TARGETS[name].run(made), f"in {time.process_time() - start:.3f} s")
    return 0


def _show(tallies: dict[str, Tally], seconds: float, options: argparse.Namespace) -> None:
    print(f"seed {options.seed}, {options.jobs} processes, {seconds:.0f} s")
    print("target        inputs   per second  slowest ms  traced KiB  grown KiB   bound KiB")
    for name, tally in tallies.items():
        rate = tally.inputs / tally.seconds if tally.seconds else 0
        bound = (2 * TARGETS[name].limit + ALLOWANCE) >> 10
        print(
            f"{name:12}{tally.inputs:8,}{rate:13,.0f}{tally.slowest * 1e3:12.1f}"
            f"{tally.traced >> 10:12,}{tally.grown >> 10:11,}{bound:12,}"
        )
    print(f"{'all':12}{sum(tally.inputs for tally in tallies.values()):8,}")
    for name, tally in tallies.items():
        shares = [
            f"{word} {count / tally.inputs:.1%}" for word, count in tally.words.most_common(14)
        ]
        print(f"\n{name}: {len(tally.words)} outcomes: {'; '.join(shares)}")


def _complain(failures: list[Failure], out: Path) -> None:
    for failure in failures[:5]:
        print(f"\n{failure.command}\n{failure.what[-1500:]}", file=sys.stderr)
    print(f"\n{len(failures)} input(s) showed a defect; they are in {out}.", file=sys.stderr)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("MOSHI_FL_HOME", tempfile.gettempdir())
    sys.exit(main())
