"""What each strategy loses to each attack: all runs of the grid, and the tables made of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.attacks.defences import ALONE, Alone, Default, Defence
from benchmarks.attacks.federation import Federation, Run
from benchmarks.attacks.files import BROKEN, Broken, Honest
from benchmarks.attacks.gate import Gate
from benchmarks.attacks.threats import THREATS, Threat
from benchmarks.attacks.world import World
from benchmarks.common import Row

DEFAULT, NO_VERDICTS = "default", "default, no verdicts"
COLUMNS = (*ALONE, NO_VERDICTS, DEFAULT)
MAIN = ("fedavg", NO_VERDICTS, DEFAULT)
MOST = 3
"""Hostile contributors of ten: as many as the default tolerates."""
BACKDOOR, ACCEPTANCE = 0.1, 0.95
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One run: who attacked, how many of them, what defended, and what came of it."""

    threat: str
    hostile: int
    defence: str
    run: Run


def defence(world: World, name: str, folder: Path) -> Defence:
    """A column of the table."""
    if name in ALONE:
        return Alone(world, name)
    return Default(world, folder, verdicts=name == DEFAULT)


def play(world: World, name: str, threat: Threat | None = None, hostile: int = 0) -> Cell:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = Federation(world, defence(world, name, Path(folder)), threat, hostile).play()
    return Cell(threat.name if threat else "nobody", hostile, name, run)


def grid(*, quick: bool, every: bool) -> Iterator[tuple[int, str]]:
    """Numbers of attackers and columns, the most telling first.

    A quick grid is the main columns against the most attackers; the usual one has all columns for
    those and the main ones for fewer; ``every`` has all for all.
    """
    rest = tuple(name for name in COLUMNS if name not in MAIN)
    numbers = range(MOST, 0, -1)
    for hostile in numbers:
        if hostile == MOST or not quick:
            yield from ((hostile, name) for name in MAIN)
    for hostile in numbers:
        if not quick and (every or hostile == MOST):
            yield from ((hostile, name) for name in rest)


def measure(world: World, *, quick: bool, every: bool, tell: Tell) -> list[Cell]:
    """The clean runs, then the grid, attack by attack."""
    cells = []
    for name in MAIN if quick else COLUMNS:
        cells.append(play(world, name))
        tell(line(cells[-1]))
    for hostile, name in grid(quick=quick, every=every):
        for threat in THREATS:
            cells.append(play(world, name, threat, hostile))
            tell(line(cells[-1]))
    return cells


def line(cell: Cell) -> str:
    """One run, for people who wait."""
    run = cell.run
    refused = f"{run.hostile_refused}/{run.hostile_sent} refused {run.reasons or ''}"
    return (
        f"{cell.threat}, {cell.hostile} hostile, {cell.defence}: {loss(cell)} "
        f"backdoor {run.backdoor}; {refused}; honest accepted {run.acceptance:.3f} {run.broke}"
    )


def loss(cell: Cell) -> str:
    """Its loss, or what it says instead of one."""
    return "no round" if cell.run.broke else f"{cell.run.loss:.4f}"


def find(cells: Sequence[Cell], threat: str, hostile: int, name: str) -> Cell | None:
    """One run of many."""
    wanted = (threat, hostile, name)
    return next((c for c in cells if (c.threat, c.hostile, c.defence) == wanted), None)


def markdown(cells: Sequence[Cell]) -> str:
    """Held-out loss by attack and column; in brackets the share of the payload."""
    lines = [
        "| attack | hostile | " + " | ".join(COLUMNS) + " |",
        "|---|--:|" + "--:|" * len(COLUMNS),
    ]
    seen = dict.fromkeys((cell.threat, cell.hostile) for cell in cells)
    for threat, hostile in seen:
        shown = [_shown(find(cells, threat, hostile, name)) for name in COLUMNS]
        lines.append(f"| {threat} | {hostile} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    payload = "" if cell.run.backdoor is None else f" ({cell.run.backdoor:.2f})"
    return loss(cell) + payload


def rows(cells: Sequence[Cell]) -> list[Row]:
    """The default beside FedAvg, with targets."""
    clean = next(c.run.loss for c in cells if (c.hostile, c.defence) == (0, "fedavg"))
    found = []
    for threat in THREATS:
        for hostile in range(1, MOST + 1):
            ours = find(cells, threat.name, hostile, DEFAULT)
            rival = find(cells, threat.name, hostile, "fedavg")
            if ours and rival:
                found += _compare(threat, ours, rival, clean)
    return [*found, _acceptance(cells)]


def _compare(threat: Threat, ours: Cell, rival: Cell, clean: float) -> Iterator[Row]:
    what = f"{threat.name}, {ours.hostile} of 10 hostile"
    run = ours.run
    over = run.loss - clean
    reasons = ", ".join(f"{name} {count}" for name, count in run.reasons.items()) or "none"
    yield Row(
        f"{what}: held-out loss",
        loss(ours),
        f"fedavg {loss(rival)}",
        rival.run.loss / run.loss,
        f"<= clean + {threat.allowed}: {'met' if over <= threat.allowed else 'missed'}",
        f"{clean:.4f}, nobody hostile",
        f"{over:+.4f}; hostile refused {run.hostile_refused} of {run.hostile_sent} ({reasons})",
    )
    if run.backdoor is not None and rival.run.backdoor is not None:
        yield Row(
            f"{what}: payload written",
            f"{run.backdoor:.2f}",
            f"fedavg {rival.run.backdoor:.2f}",
            (rival.run.backdoor + 0.01) / (run.backdoor + 0.01),
            f"< {BACKDOOR}: {'met' if run.backdoor < BACKDOOR else 'missed'}",
        )


def _acceptance(cells: Sequence[Cell]) -> Row:
    ours = [cell.run for cell in cells if cell.defence == DEFAULT]
    return acceptance("all runs", ours)


def acceptance(which: str, runs: Sequence[Run]) -> Row:
    """How many of the honest contributions the default took."""
    sent, refused = sum(run.honest_sent for run in runs), sum(run.honest_refused for run in runs)
    share, worst = 1 - refused / sent, min(run.acceptance for run in runs)
    reasons = ", ".join(sorted({reason for run in runs for reason in run.honest_reasons}))
    return Row(
        f"honest contributions accepted by gate, selection and verdicts, {which}",
        f"{share:.1%}",
        "",
        share / ACCEPTANCE,
        f">= {ACCEPTANCE:.0%}: {'met' if share >= ACCEPTANCE else 'missed'}",
        "",
        f"{refused} of {sent} refused ({reasons or 'none'}); worst run {worst:.1%}",
    )


def refusals(world: World) -> list[tuple[Broken, str]]:
    """What the gate says of each broken file."""
    honest = Honest(world.trained(world.start, 9, 1), world.codec, world.shapes)
    with tempfile.TemporaryDirectory() as folder:
        gate = Gate(world, Path(folder))
        gate.open(0, world.start)
        verdicts = [(broken, gate.judge(9, broken.make(honest))) for broken in BROKEN]
    return [(broken, ", ".join(f.code for f in verdict.findings)) for broken, verdict in verdicts]


def machine_readable(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """All runs, for JSON."""
    return [asdict(cell) for cell in cells]
