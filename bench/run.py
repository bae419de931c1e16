"""Microbenchmarks on the CPU: rlvr_fast beside a bare product, torch eager, torch.compile, autograd and TRL.

    python bench/run.py [--quick] [--output DIR] [--shape N,V,D] [--rounds K] [--threads T] [--kernel NAME ...]

Times come from pytest-benchmark (bench/test_interleaved.py), peak memory from processes of their own (bench/memory.py).
Prints one table and writes DIR/cpu_NxVxD.csv. Exit status 1 if a provider failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import memory
import resident_memory
from conftest import DEFAULT_ROUNDS, DEFAULT_SHAPE, DEFAULT_THREADS
from registry import SUITES
from results import rows_of, table_of, target_lines, write_csv
from rich.console import Console
from workload import Shape

HERE = Path(__file__).resolve().parent
QUICK_SHAPE, QUICK_ROUNDS = "512,8192,256", 3


def main() -> int:
    options = _options()
    shape = Shape.parse(options.shape)
    suites = [suite for suite in SUITES.values() if suite.name in (options.kernel or SUITES)]
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads)))
    console = Console(width=None if sys.stdout.isatty() else 150)

    status, report = _timings(options)
    if not report.get("benchmarks"):
        console.print("nothing was timed: see the messages above", markup=False)
        return status or 1
    console.print("peak memory, one process per provider ...")
    rows = rows_of(report, suites, shape, options.threads, _memory(suites, shape, options.threads))
    path = options.output / f"cpu_{shape.n_tokens}x{shape.vocabulary}x{shape.width}.csv"
    write_csv(rows, path)
    console.print(table_of(rows, options.threads))
    for row in rows:
        if row["metric"] == "milliseconds" and "median" in row and row["note"]:
            console.print(f"{row['kernel']}, {row['provider']}: no memory figure: {row['note']}", markup=False)
    if options.shape == DEFAULT_SHAPE:
        for line in target_lines(rows):
            console.print(line, markup=False, highlight=False)
    console.print(f"written to {path}", markup=False)
    return status


def _timings(options: argparse.Namespace) -> tuple[int, dict]:
    """Run the timing suites in one process: (exit status, pytest-benchmark's report)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "test_interleaved.py"), "-q", "-o", "addopts=",
                   "-p", "no:randomly", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-disable-gc",
                   "--benchmark-quiet", f"--benchmark-json={report}", f"--shape={options.shape}",
                   f"--rounds={options.rounds}", f"--threads={options.threads}",
                   *(f"--kernel={name}" for name in options.kernel or ())]
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        text = report.read_text() if report.exists() else ""
        return status, json.loads(text) if text else {}


def _memory(suites: list, shape: Shape, threads: int) -> dict:
    """Peak extra bytes, or the reason why there are none, by ``provider.run``; what suites share is measured once."""
    places = {provider.run: (suite.name, index) for suite in suites for index, provider in enumerate(suite.providers)
              if provider.missing is None}
    reason = resident_memory.unavailable()
    if reason is not None:
        return dict.fromkeys(places, reason)
    return dict(zip(places, memory.peak_extra_bytes(list(places.values()), shape, threads), strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"shape {QUICK_SHAPE}, {QUICK_ROUNDS} rounds")
    parser.add_argument("--output", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--shape", metavar="N,V,D", help=f"default {DEFAULT_SHAPE}")
    parser.add_argument("--rounds", type=int, help=f"times that every provider runs; default {DEFAULT_ROUNDS}")
    parser.add_argument("--threads", type=int, default=min(DEFAULT_THREADS, os.cpu_count() or 1))
    parser.add_argument("--kernel", action="append", choices=list(SUITES), help="only this one; may be repeated")
    options = parser.parse_args()
    options.shape = options.shape or (QUICK_SHAPE if options.quick else DEFAULT_SHAPE)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else DEFAULT_ROUNDS)
    try:
        Shape.parse(options.shape)
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
