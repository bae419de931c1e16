"""Committed measurements as Markdown: tables, bars and where each came from. Nothing here holds a figure."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

from site_tools import svg
from site_tools.markdown import row as table_row

Row = dict[str, str]
# What the bars show: a column of the row, or a metric's median; with the line that it is compared to.
BARS = (("ratio_to_gemm", "times the bare product", 1.0), ("times a plain step, CPU time", "times a plain step", 1.0),
        ("spearman over prompts", "rank correlation with all parameters", None))
FAR_BELOW = 0.05  # of the bare product
DETAIL = "self ms beyond"  # the profile of where time goes: in the CSV, not here
NUMBERS = ("p20", "median", "p80", "ratio_to_gemm", "extra_memory_share", "error")
FIDELITY = ("spearman over prompts", "ratio to all parameters")
NO_GPU = ("**No GPU figure has been measured yet.** The Triton and CUDA kernels compile ahead of time and pass in the "
          "interpreter; no committed measurement comes from a GPU.")
BOOTSTRAP = "95 % bootstrap over prompts "  # how the file writes these intervals
TITLES = {"model_gap_cost": "The gap over all weights inside a training step",
          "model_gap_cost_smollm2": "The same at SmolLM2-135M's shape",
          "model_gap_fidelity": "What cheaper levels say about the gap over all weights"}
EXTRAS = {"ratio_to_gemm": "× product", "extra_memory_share": "extra memory / [N, V]", "error": "error"}


def files(bench: Path) -> list[Path]:
    return sorted((bench / "results").glob("*.csv"))


def results(bench: Path) -> str:
    """Markdown sections, one for each committed CSV."""
    return "\n\n".join(_section(path) for path in files(bench))


def fidelity(bench: Path) -> str:
    """How cheaper levels rank prompts, beside the gap over all parameters."""
    rows = [row for path in files(bench) for row in _read(path) if row["metric"] in FIDELITY]
    lines = [table_row("squared gap norm of", "rank correlation over prompts (95 % bootstrap)",
                       "of the norm over all weights: median (p20 to p80)"), "|---|---|---|"]
    for provider, own in _by(rows, "provider").items():
        by_metric = {row["metric"]: row for row in own}
        rank, size = (by_metric.get(metric) for metric in FIDELITY)
        note = "" if rank is None or not rank["note"] else f" ({rank['note'].removeprefix(BOOTSTRAP)})"
        lines.append(table_row(provider, f"{_spread(rank)}{note}", _spread(size)))
    return "\n".join(lines)


def gpu_targets(bench: Path) -> str:
    """What a GPU run is to reach, beside what committed GPU measurements say; "not measured" where there is none."""
    targets = _module(bench, "gpu.targets")
    rows = [row for path in files(bench) for row in _read(path) if row.get("gpu")]
    figures = targets.figures_of(rows)
    state = f"Measured on {_join(rows, 'gpu')}." if rows else NO_GPU
    return "\n".join([state, "", f"Shape N × V × D = {targets.SHAPE}, bf16; the worst of random and peaked logits "
                      "counts. `bench/gpu.sh OUTDIR` on a CUDA machine measures all of it; predictions with their "
                      "arithmetic: {download}`bench/NOTES.md <../bench/NOTES.md>`.", "",
                      table_row("target", "goal", "measured", "verdict"), "|---|---|---|---|",
                      *(table_row(*target.line(figures)) for target in targets.targets())])


# -- parts ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _section(path: Path) -> str:
    rows = _read(path)
    if not rows:
        raise ValueError(f"{path} holds no measurements")
    lines = [f"## {_title(path.stem)}", "", _provenance(path, rows), ""]
    lines += [f"- **Target**: {line}" for line in _targets(path.parents[1], rows)] + [""]
    for kernel, own in _by(rows, "kernel").items():
        for shape, measured in _by(own, "shape").items():
            title = kernel if shape in path.stem else f"{kernel}, {shape}"
            lines += [f"### {title}", "", *_bars(kernel, measured), *_table(measured), ""]
    return "\n".join(lines)


def _title(stem: str) -> str:
    if stem.startswith("cpu_"):
        return f"Kernels on a CPU, N × V × D = {stem.removeprefix('cpu_').replace('x', ' × ')}"
    return TITLES.get(stem, stem)


def _provenance(path: Path, rows: list[Row]) -> str:
    machine = [f"{_join(rows, name)} {label}".strip() for name, label in
               (("device", ""), ("gpu", ""), ("driver", "driver"), ("threads", "thread(s)")) if _join(rows, name)]
    revisions = ", ".join(f"`{sha[:9]}{'-dirty' if sha.endswith('-dirty') else ''}`"
                          for sha in _values(rows, "git_sha"))
    dates = ", ".join(sorted({date[:10] for date in _values(rows, "date")}))
    return (f"`bench/results/{path.name}`: measured {dates} on {', '.join(machine)}; revision {revisions}; "
            f"{_join(rows, 'versions')}.")


def _targets(bench: Path, rows: list[Row]) -> list[str]:
    """The targets that the benchmarks themselves state for these rows, beside what was measured."""
    numbers = [{key: _number(value) if key in NUMBERS else value for key, value in row.items() if value}
               for row in rows]
    if "ratio_to_gemm" in numbers[0]:
        return importlib.import_module("rlvr_fast.bench.results").target_lines(numbers)
    if any(row["metric"] == "times a plain step, CPU time" for row in rows):
        return _module(bench, "model_gap.cost").target_lines(numbers)
    return []


def _bars(kernel: str, rows: list[Row]) -> list[str]:
    for name, label, mark in BARS:
        found = {row["provider"]: _number(row["median"]) for row in rows if row["metric"] == name} or \
            {row["provider"]: _number(row[name]) for row in rows if row.get(name)}
        known = {provider: value for provider, value in found.items() if not math.isnan(value)}
        if len(known) < 2:
            continue
        if name == "ratio_to_gemm" and sorted(known.values())[-2] < FAR_BELOW:  # nothing to see beside a product
            label, mark = "milliseconds", None
            known = {row["provider"]: _number(row["median"]) for row in rows
                     if row["metric"] == label and known.get(row["provider"], 1.0) < FAR_BELOW}
        drawn = [(provider, value, f"{value:.3g}", "own" if provider.startswith("rlvr_fast") else "other")
                 for provider, value in known.items()]
        picture = svg.bars(drawn, f"{kernel}: {label}, by provider", mark=mark, mark_label=label if mark else "")
        own = " The project's own in blue." if any(style == "own" for *_, style in drawn) else ""
        caption = f"{label[0].upper()}{label[1:]}; medians.{own}"
        return ["````{raw} html", f'<div class="diagram">{picture}</div>', "````", "", f"*{caption}*", ""]
    return []


def _table(rows: list[Row]) -> list[str]:
    """One line per provider (and kind of logits), one column per metric, and what the file has beside them."""
    metrics = [metric for metric in _values(rows, "metric") if not metric.startswith(DETAIL)]
    extras = [name for name in EXTRAS if any(not math.isnan(_number(row.get(name, ""))) for row in rows)]
    lines = [table_row("provider", *metrics, *(EXTRAS[name] for name in extras)),
             "|---" + "|---:" * (len(metrics) + len(extras)) + "|"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["provider"], row.get("logits", "")].append(row)
    usual = Counter(own[0].get("git_sha", "") for own in groups.values()).most_common(1)[0][0]
    apart = False
    for (provider, kind), own in groups.items():
        by_metric = {row["metric"]: row for row in own}
        other_run = own[0].get("git_sha", "") != usual
        apart |= other_run
        cells = [_spread(by_metric.get(metric)) for metric in metrics]
        cells += [_written(name, next((row[name] for row in own if row.get(name)), "")) for name in extras]
        lines.append(table_row(f"{provider} {kind and f'({kind})'}".strip() + r" \*" * other_run, *cells))
    errors = _values(rows, "error_of")
    notes = [f"{row['provider']}: {row['note']}" for row in rows if row.get("note") and not row["median"]]
    if apart:
        notes.append(r"\* Of another run, at another revision: its ratios compare with the others, its times do not.")
    if errors and "error" in extras:
        notes.insert(0, f"Error: {'; '.join(errors)}.")
    return [*lines, "", " ".join(notes)]


def _spread(row: Row | None) -> str:
    if row is None or not row["median"]:
        return ""
    low, median, high = (_short(row.get(name) or "") for name in ("p20", "median", "p80"))
    return median if not low or low == high else f"{median} ({low} to {high})"


def _short(value: str) -> str:
    number = _number(value)
    return "" if math.isnan(number) else f"{number:.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


def _written(name: str, value: str) -> str:
    number = _number(value)
    if math.isnan(number):
        return ""
    shown = {"ratio_to_gemm": f"{number:.2f}" if number >= 0.1 else f"{number:.2g}",
             "extra_memory_share": f"{number:.1%}"}.get(name, f"{number:.1e}")
    return shown.replace("e-", "e\u2212")


def _number(value: str) -> float:
    return float(value) if value else math.nan


def _values(rows: list[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows if row.get(name)))


def _join(rows: list[Row], name: str) -> str:
    return ", ".join(_values(rows, name))


def _by(rows: list[Row], name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[name]].append(row)
    return found


def _module(bench: Path, name: str) -> ModuleType:
    """A module of bench/, whose programs import each other by their plain names."""
    sys.path.insert(0, str(bench))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(bench))
