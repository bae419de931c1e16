"""What a run logged beside the keys that figures are drawn of: a line each, first to last, lowest and highest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlvr_fast.report.section import NOTHING, Section, Table, number, text

KEYS = 120  # rows of the table


@dataclass
class Tally:
    """A key's finite values in the order in which they were logged."""

    count: int = 0
    first: float = math.nan
    last: float = math.nan
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        self.first = self.first if self.count else value
        self.count, self.last = self.count + 1, value
        self.low, self.high = min(self.low, value), max(self.high, value)


def others_section(others: Mapping[tuple[str, str], Tally]) -> Section | None:
    """``others``: (run, key) -> its tally."""
    if not others:
        return None
    rows = [[text(run or NOTHING), text(key, 80), f"{tally.count:,}",
             *(number(value, ".4g") for value in (tally.first, tally.last, tally.low, tally.high))]
            for (run, key), tally in sorted(others.items(), key=lambda item: (item[0][1], item[0][0]))]
    columns: tuple[str, ...] = ("run", "key", "values", "first", "last", "lowest", "highest")
    numeric = frozenset(range(2, 7))
    if not any(run for run, _ in others):
        rows, columns, numeric = [row[1:] for row in rows], columns[1:], frozenset(range(1, 6))
    note = "" if len(rows) <= KEYS else f"{KEYS} of {len(rows):,} rows."
    return Section("others", "Also logged", "Numbers that no figure above is drawn of.",
                   table=Table(columns, rows[:KEYS], numeric, note))
