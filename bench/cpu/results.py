"""From pytest-benchmark's report to rows: one CSV, one table."""

from __future__ import annotations

import csv
import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rlvr_fast.bench.provenance import git_sha, versions

if TYPE_CHECKING:  # suites look for their peers when they are imported, which takes seconds
    from rlvr_fast.bench.suite import Provider, Suite
    from rlvr_fast.bench.workload import Shape

COLUMNS = ("kernel", "provider", "shape", "dtype", "metric", "p20", "median", "p80", "ratio_to_gemm",
           "extra_memory_share", "error", "error_of", "rounds", "device", "threads", "versions", "git_sha", "date",
           "note")
PACKAGES = ("rlvr-fast", "torch", "numpy", "trl", "transformers", "pytest-benchmark")
TARGETS = {("token_stats", "rlvr_fast native"): (1.05, 0.05), ("gradient_gap hidden", "rlvr_fast native"): (1.20, 0.15)}
NAN = math.nan
Row = Mapping[str, Any]
"""One line of the CSV, by COLUMNS."""


def rows_of(report: Mapping[str, Any], suites: Sequence[Suite], shape: Shape, threads: int,
            memory: Mapping[Any, int | str]) -> list[Row]:
    """Rows for milliseconds per call and, where the work is known, GFLOP/s; a row with a note where nothing was timed.

    Args:
        report: pytest-benchmark's JSON.
        memory: bytes, or the reason why there are none, by ``provider.run``.
    """
    seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        key = info["kernel"], info["provider"]
        seconds[key][info["round"]] = entry["stats"]["median"]
        if "error" in info:
            errors[key].append(info["error"])
    common = {"shape": f"{shape.n_tokens}x{shape.vocabulary}x{shape.width}", "dtype": "float32",
              "device": report["machine_info"]["cpu"].get("brand_raw", platform.machine()), "threads": threads,
              "versions": versions(PACKAGES), "git_sha": git_sha(), "date": report["datetime"]}
    rows: list[Row] = []
    for suite in suites:
        floor = seconds[suite.name, suite.floor.name]
        for provider in suite.providers:
            key = suite.name, provider.name
            figures = common | {"kernel": suite.name, "provider": provider.name, "error_of": suite.error_of}
            if provider.missing is not None or not seconds[key]:
                note = provider.missing or "failed: see the messages above"
                rows.append(figures | {"metric": "milliseconds", "note": note})
                continue
            size = memory.get(provider.run)
            figures |= {
                "ratio_to_gemm": float(np.median([taken / floor[turn] for turn, taken in seconds[key].items()])),
                "extra_memory_share": size / shape.full_bytes if isinstance(size, int) else NAN,
                "error": float(np.max(errors[key])), "rounds": len(seconds[key]),
                "note": size if isinstance(size, str) else ""}
            times = np.percentile(list(seconds[key].values()), (20, 50, 80))
            rows.append(figures | {"metric": "milliseconds"} | _spread(1e3 * times))
            flops = _flops(suite, provider, shape)
            if flops is not None:
                rows.append(figures | {"metric": "GFLOP/s"} | _spread(1e-9 * flops / times[::-1]))
    return rows


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def table_of(rows: Sequence[Row], threads: int) -> Table:
    """One line per kernel and provider."""
    first = rows[0]
    table = Table(title=f"N x V x D = {first['shape']}, {first['dtype']}, {first['device']}, {threads} threads")
    for name in ("provider", "ms", "p20 - p80", "x gemm", "GFLOP/s", "extra memory", "error"):
        table.add_column(name, justify="left" if name == "provider" else "right", no_wrap=name != "error")
    rates = {(row["kernel"], row["provider"]): row["median"] for row in rows if row["metric"] == "GFLOP/s"}
    kernel = None
    for row in (row for row in rows if row["metric"] == "milliseconds"):
        if row["kernel"] != kernel:
            kernel = row["kernel"]
            table.add_section()
            table.add_row(f"[bold]{kernel}[/bold]", "", "", "", "", "of [N, V]", row["error_of"])
        if "median" not in row:
            table.add_row(f"  {row['provider']}", "missing", "", "", "", "", row["note"])
            continue
        rate = rates.get((kernel, row["provider"]))
        table.add_row(f"  {row['provider']}", f"{row['median']:.4g}", f"{row['p20']:.4g} - {row['p80']:.4g}",
                      f"{row['ratio_to_gemm']:.3g}", "" if rate is None else f"{rate:.1f}",
                      _or_empty(row["extra_memory_share"], ".1%"), _or_empty(row["error"], ".1e"))
    return table


def missing_providers(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Who was not measured, by the reason: "kernel: provider"."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if "median" not in row:
            found[row["note"]].append(f"{row['kernel']}: {row['provider']}")
    return dict(found)


def target_lines(rows: Sequence[Row]) -> list[str]:
    """Every target beside what was measured."""
    lines = []
    for row in rows:
        target = TARGETS.get((row["kernel"], row["provider"]))
        if target is None or row["metric"] != "milliseconds" or "median" not in row:
            continue
        ratio, share = row["ratio_to_gemm"], row["extra_memory_share"]
        verdict = "met" if ratio <= target[0] and share <= target[1] else "not met"
        lines.append(f"{row['kernel']}, {row['provider']}: {ratio:.2f}x the bare product (target {target[0]:.2f}), "
                     f"{share:.1%} of an [N, V] buffer (target {target[1]:.0%}): {verdict}")
    return lines


def _flops(suite: Suite, provider: Provider, shape: Shape) -> float | None:
    if provider is suite.floor:
        return shape.product_flops
    return None if suite.flops is None else suite.flops(shape)


def _spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("p20", "median", "p80"), map(float, values), strict=True))


def _or_empty(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
