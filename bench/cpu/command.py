"""The command behind ``rlvr-fast bench``: times, then peak memory, then a table and a CSV file, or JSON.

Times come from pytest-benchmark (``timings``), peak memory from processes of their own (``memory``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from rlvr_fast import _validate as check
from rlvr_fast.bench import memory, resident_memory, timings
from rlvr_fast.bench.environment import environment
from rlvr_fast.bench.registry import SUITES
from rlvr_fast.bench.results import missing_providers, rows_of, table_of, target_lines, write_csv
from rlvr_fast.bench.suite import Suite
from rlvr_fast.bench.workload import Shape
from rlvr_fast.command_line import as_json, check_file, progress, writable_folder

DEFAULT_SHAPE, DEFAULT_ROUNDS, DEFAULT_THREADS = "2048,49152,576", 6, 2
QUICK_SHAPE, QUICK_ROUNDS = "512,8192,256", 3
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run(*, output: Path, quick: bool, kernels: Sequence[str], shape: str | None, rounds: int | None,
        threads: int | None, json_file: str | None) -> int:
    """Measure, print and write ``output``/cpu_NxVxD.csv.

    Returns:
        1 if a provider failed, else 0.

    Raises:
        ValueError, OSError: naming the option.
    """
    text = shape or (QUICK_SHAPE if quick else DEFAULT_SHAPE)
    parsed = Shape.parse(text)
    rounds = rounds or (QUICK_ROUNDS if quick else DEFAULT_ROUNDS)
    threads = threads or min(DEFAULT_THREADS, os.cpu_count() or 1)
    for name in kernels:
        check.choice("--kernel", name, tuple(SUITES))
    check_file("--json", json_file)
    folder = writable_folder(output)
    suites = [suite for suite in SUITES.values() if suite.name in (kernels or SUITES)]

    columns = TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn()
    with environment(dict.fromkeys(THREADS, str(threads))), progress(*columns, quiet=json_file == "-") as bar:
        task = bar.add_task("loading", total=2.0)
        timed = timings.measure([suite.name for suite in suites], text, rounds, threads, lambda done, turn: bar.update(
            task, completed=done, description=escape(turn)))
        if timed.status or not timed.report.get("benchmarks"):
            print(timed.output, file=sys.stderr)
        if not timed.report.get("benchmarks"):
            print("rlvr-fast: nothing was timed: see the messages above", file=sys.stderr)
            return 1
        peaks = _memory(suites, parsed, threads, lambda done: bar.update(
            task, completed=1 + done, description="peak memory, one process per provider"))
    rows = rows_of(timed.report, suites, parsed, threads, peaks)
    path = folder / f"cpu_{parsed.n_tokens}x{parsed.vocabulary}x{parsed.width}.csv"
    write_csv(rows, path)
    content = as_json({"csv": str(path), "missing": missing_providers(rows), "rows": rows})
    if json_file == "-":
        sys.stdout.write(content)
    else:
        _show(rows, threads, path, targets=text == DEFAULT_SHAPE)
    if json_file not in (None, "-"):
        Path(str(json_file)).write_text(content, encoding="utf-8")
    return 1 if timed.status else 0


def _show(rows: Sequence[Mapping[str, Any]], threads: int, path: Path, *, targets: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table_of(rows, threads))
    for row in rows:
        if row["metric"] == "milliseconds" and "median" in row and row["note"]:
            console.print(f"{row['kernel']}, {row['provider']}: no memory figure: {row['note']}", markup=False)
    for reason, names in missing_providers(rows).items():
        console.print(f"not measured ({reason}): {'; '.join(names)}", markup=False, soft_wrap=True)
    for line in target_lines(rows) if targets else ():
        console.print(line, markup=False)
    console.print(f"written to {path}", markup=False, soft_wrap=True)


def _memory(suites: Sequence[Suite], shape: Shape, threads: int, done: Callable[[float], None]) -> dict[Any, int | str]:
    """Peak extra bytes, or the reason why there are none, by ``provider.run``; what suites share is measured once."""
    places = {provider.run: (suite.name, index) for suite in suites for index, provider in enumerate(suite.providers)
              if provider.missing is None}
    reason = resident_memory.unavailable()
    if reason is not None:
        return dict.fromkeys(places, reason)
    return dict(zip(places, memory.peak_extra_bytes(list(places.values()), shape, threads, done), strict=True))
