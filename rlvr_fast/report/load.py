"""A run's logs as columns: one float64 array per role of ``keys.ROLES``, for each run that the logs hold."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_fast.analyze import analyze
from rlvr_fast.report import keys
from rlvr_fast.report.files import find_files, read_json, rows_of
from rlvr_fast.report.others import Tally

PROMPTS = 200  # rows of the table of prompts


@dataclass(frozen=True, eq=False)
class Column:
    """[S] float64, NaN where a step does not have it: a figure, its standard error, the ends of its interval.

    ``sources``: key -> number of steps that it gave.
    """

    value: np.ndarray
    stderr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sources: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Series:
    """One training run: S steps in rising order, its columns by role (those that have a value), its verdicts.

    ``bins``: the latest reading by success rate, low end -> its figures.
    """

    name: str
    step: np.ndarray
    columns: Mapping[str, Column]
    verdict: list[str | None]
    reason: list[str | None]
    bins: tuple[Mapping[str, float], ...] = ()
    bins_step: int | None = None

    def get(self, role: str) -> Column | None:
        return self.columns.get(role)


@dataclass(frozen=True, eq=False)
class Recorded:
    """Everything that was read.

    ``others``: (run, key) -> the numbers of keys that have no role; ``unknown``: all such keys and how many rows had
    them; ``notes``: what was odd.
    """

    source: str
    series: tuple[Series, ...]
    rollouts: Mapping[str, Any] | None
    details: Mapping[str, Any]
    others: Mapping[tuple[str, str], Tally]
    unknown: Counter[str]
    n_rows: int
    notes: list[str] = field(default_factory=list)


def load(run: str | Path, *, rollouts: str | os.PathLike[str] | None = None,
         columns: Mapping[str, str | None] | None = None, threshold: float | None = None) -> Recorded:
    """Read a run; see ``write_report`` for what it may be.

    Raises:
        ValueError: naming the file, line or key of what cannot be read; if nothing can be shown.
    """
    files = find_files(run, rollouts)
    notes: list[str] = []
    unknown: Counter[str] = Counter()
    known: Counter[str] = Counter()
    others: dict[tuple[str, str], Tally] = {}
    merged: dict[str, dict[int, dict[str, object]]] = {}
    n_rows = _merge((row for path in files.steps for row in rows_of(path, notes)), merged, known, unknown, others,
                    notes)
    found = None if files.rollouts is None else analyze(files.rollouts, columns=dict(columns or {}),
                                                        threshold=threshold, prompts=PROMPTS)
    if files.unread and files.rollouts is not None:
        notes.append(f"Rollouts are from {files.rollouts.name} alone; {len(files.unread)} more of them lie beside it. "
                     "A folder of them is read as one dump.")
    details = {} if files.details is None else read_json(files.details)
    if not isinstance(details, dict):
        raise ValueError(f"{files.details} must hold a JSON object, as rf.RunLog writes it")
    if files.steps and not n_rows and found is None and not details:
        raise ValueError(f"{', '.join(map(str, files.steps))}: no steps in it yet")
    if n_rows and not any(known[key] for key in known if key not in keys.STEP_KEYS) and found is None and not details:
        raise ValueError(f"{', '.join(map(str, files.steps))}: none of its keys is known to the report. It has: "
                         f"{_list(list(unknown))}. Log GapMonitor.compute() or StepGuard.metrics(), e.g. by rf.RunLog")
    if found is not None and len(merged) <= 1:
        rows = merged.setdefault(next(iter(merged), ""), {})
        logged = _roles_of(rows.values())
        for row in found["steps"]:
            mine = rows.setdefault(row["step"], {}) if not logged or row["step"] in rows else {}
            mine |= {name: value for name, value in row.items()
                     if name != "step" and name not in mine and _role(name) not in logged}
    series = tuple(_series(name, rows, notes) for name, rows in merged.items() if rows)
    return Recorded(str(run), series, found, details, others, unknown, n_rows, notes)


def _merge(rows: Iterable[Mapping[str, object]], merged: dict[str, dict[int, dict[str, object]]], known: Counter[str],
           unknown: Counter[str], others: dict[tuple[str, str], Tally], notes: list[str]) -> int:
    """Rows by run and step; a later row of the same step adds to it and overrides."""
    count = unplaced = repeated = 0
    for count, raw in enumerate(rows, 1):
        row: dict[str, object] = {}
        rest: dict[str, object] = {}
        for name, value in _flat(raw):
            (row if keys.is_known(name) else rest)[name] = value
        known.update(row.keys())
        unknown.update(rest.keys())
        run = _text(next((row[name] for name in keys.RUN_KEYS if name in row), "")) or ""
        for name, value in rest.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
                others.setdefault((run, name), Tally()).add(float(value))
        step = next((row[name] for name in keys.STEP_KEYS if name in row), count - 1)
        number = _number(step)
        if number is None or number != number or not float(number).is_integer() or abs(number) > 2**53:
            unplaced += 1
            continue
        mine = merged.setdefault(run, {}).setdefault(int(number), {})
        repeated += any(name in mine and name not in keys.STEP_KEYS and name not in keys.RUN_KEYS for name in row)
        mine |= row
    if unplaced:
        notes.append(f"{unplaced:,} of {count:,} rows have a step that is no whole number, and are left out.")
    if repeated:
        notes.append(f"{repeated:,} rows repeat a step that was logged before, as after a restart; the last one "
                     "counts.")
    return count


def _flat(row: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterable[tuple[str, object]]:
    for name, value in row.items():
        if isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{prefix}{name}/", depth + 1)
        else:
            yield keys.bare(f"{prefix}{name}"), value


def _series(name: str, rows: Mapping[int, Mapping[str, object]], notes: list[str]) -> Series:
    steps = sorted(rows)
    ordered = [rows[step] for step in steps]
    columns: dict[str, Column] = {}
    odd: Counter[str] = Counter()
    for role, choices in keys.ROLES.items():
        if role == "success" and not all(0 <= (_number(row.get("reward")) or 0) <= 1 for row in ordered):
            choices = tuple(key for key in choices if key.value != "reward")
            notes.append("reward is not between 0 and 1 and therefore no success rate.")
        column = _column(ordered, choices, odd, role in keys.UNBOUNDED)
        if column is not None:
            columns[role] = column
            if len(column.sources) > 1:
                parts = ", ".join(f"{key} ({count:,} steps)" for key, count in column.sources.items())
                notes.append(f"{f'Run {name}: ' if name else ''}{role.replace('_', ' ')} comes from several keys, "
                             f"which may not be comparable: {parts}.")
    for key, count in odd.items():
        notes.append(f"{key} is no finite number in {count:,} steps.")
    bins, bins_step = _bins(steps, ordered)
    verdicts, reasons = (
        [next((_text(row[key]) for key in choices if key in row and _text(row[key])), None) for row in ordered]
        for choices in (keys.VERDICT_KEYS, keys.REASON_KEYS))
    return Series(name, np.array(steps, dtype=np.int64), columns, verdicts, reasons, bins, bins_step)


def _column(rows: list[Mapping[str, object]], choices: tuple[keys.Key, ...], odd: Counter[str],
            unbounded: bool) -> Column | None:
    table = np.full((4, len(rows)), math.nan)
    sources: Counter[str] = Counter()
    for at, row in enumerate(rows):
        for key in choices:
            logged = row.get(key.value)
            if logged is None:
                continue
            number = _number(logged)
            if number is None or (math.isinf(number) and not unbounded):
                odd[key.value] += 1
            elif not math.isnan(number):
                table[0, at] = number
                for part, name in enumerate(key[1:], 1):
                    error = None if name is None else _number(row.get(name))
                    table[part, at] = math.nan if error is None else error
                sources[key.value] += 1
                break
    value, stderr, low, high = table
    return Column(value, stderr, low, high, sources) if sources else None


def _bins(steps: list[int], rows: list[Mapping[str, object]]) -> tuple[tuple[dict[str, float], ...], int | None]:
    """The meter's latest reading by success rate, from keys rlvr/step/meter/bin_<low>_<high>/<figure>."""
    for step, row in zip(reversed(steps), reversed(rows), strict=True):
        found: dict[str, dict[str, float]] = {}
        for key, value in row.items():
            label, _, figure = key.removeprefix(keys.BIN).partition("/")
            number = _number(value)
            if key.startswith(keys.BIN) and figure and number is not None:
                found.setdefault(label, {})[figure] = number
        table = []
        for label, figures in found.items():
            ends = [end for end in map(_number, label.split("_")) if end is not None]
            if len(ends) == 2 == len(label.split("_")) and math.isfinite(figures.get("end_slope", math.nan)):
                table.append({"low": ends[0], "high": ends[1]} | figures)
        if table:
            return tuple(sorted(table, key=lambda one: one["low"])), step
    return (), None


def _roles_of(rows: Iterable[Mapping[str, object]]) -> set[str | None]:
    return {_role(name) for row in rows for name in row}


def _role(name: str) -> str | None:
    return next((role for role, choices in keys.ROLES.items() if any(name in key for key in choices)), None)


def _number(value: object) -> float | None:
    """A float, also from texts such as "Infinity" and "0.2"; None for what is no number."""
    if isinstance(value, bool | int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None if value is None else str(value)


def _list(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
