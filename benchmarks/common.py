"""What every benchmark shares: one row of the table, and the table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured comparison; ``ratio`` above 1 speaks for us, NaN for nothing."""

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
        ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        cells = (row.what, row.ours, row.rival, ratio, row.target, row.floor, row.note)
        print("| " + " | ".join(cells) + " |")
