"""What every benchmark shares: one row of the table, and the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured comparison; ``ratio`` above 1 speaks for us."""

    what: str
    ours: str
    rival: str
    ratio: float
    target: str
    floor: str = ""
    note: str = ""


def print_table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print("| what | ours | rival | ratio | target | floor | note |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.what, row.ours, row.rival, f"{row.ratio:.2f}", row.target, row.floor, row.note)
        print("| " + " | ".join(cells) + " |")
