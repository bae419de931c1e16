"""Figures from the CSV files alone, on any machine with matplotlib: python bench/gpu/plots.py CSV ... [--output DIR]

One PNG per kernel: a panel for each shape and kind of logits, a bar for each provider with its p20 to p80, and beside
it the share of the floor's rate and the error.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

COLOURS = {"ours": "#1f6fb4", "peer": "#9aa5b1", "floor": "#d9a441"}
FLOORS = ("bf16 product", "library product of", "device copy", "rlvr_fast token_stats")


def panels_of(rows: list[dict[str, str]]) -> dict[str, dict[tuple[str, str], list[dict[str, str]]]]:
    """kernel -> (shape, logits) -> the milliseconds of each provider, with "share" added where there is one."""
    shares = {(row["kernel"], row["provider"], row["shape"], row["logits"]): row["median"] for row in rows
              if row["metric"] == "share of floor"}
    panels: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["metric"] == "milliseconds" and row["median"]:
            share = shares.get((row["kernel"], row["provider"], row["shape"], row["logits"]), "")
            panels[row["kernel"]][row["shape"], row["logits"]].append(row | {"share": share})
    return panels


def role(provider: str) -> str:
    """Whose bar it is; "rlvr_fast token_stats" is what the gap is compared with."""
    if provider.startswith(FLOORS):
        return "floor"
    return "ours" if provider.startswith("rlvr_fast") else "peer"


def label(row: dict[str, str]) -> str:
    parts = [f"{float(row['median']):.3g} ms"]
    if row["share"]:
        parts.append(f"{100 * float(row['share']):.0f} %")
    if row["error"]:
        parts.append(f"err {float(row['error']):.0e}")
    return "  " + ", ".join(parts)


def draw(kernel: str, panels: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = sum(len(rows) for rows in panels.values())
    figure = Figure(figsize=(10, 0.32 * bars + 1.0 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [len(rows) + 1 for rows in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, ((shape, logits), rows) in zip(axes, panels.items(), strict=True):
        rows = sorted(rows, key=lambda row: -float(row["median"]))
        medians = [float(row["median"]) for row in rows]
        spread = [[float(row["median"]) - float(row["p20"]) for row in rows],
                  [float(row["p80"]) - float(row["median"]) for row in rows]]
        drawn = axis.barh([row["provider"] for row in rows], medians, xerr=spread, ecolor="#444444",
                          color=[COLOURS[role(row["provider"])] for row in rows])
        axis.bar_label(drawn, [label(row) for row in rows], fontsize=8)
        drawn_from = "" if logits == "none" else f", {logits} logits"
        axis.set_title(f"{shape}, {rows[0]['dtype']}{drawn_from}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.35)
    axes[-1].set_xlabel("milliseconds (median, p20 to p80); share of the floor's rate; error against float64")
    figure.suptitle(f"{kernel}, {next(iter(panels.values()))[0]['gpu']}", fontsize=11)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="folder of the PNGs; default beside the first CSV")
    options = parser.parse_args(arguments)
    there = [path for path in options.csv if path.exists()]
    for path in options.csv:
        if path not in there:
            print(f"no {path}")
    rows = []
    for path in there:
        with path.open(newline="") as file:
            rows.extend(csv.DictReader(file))
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"no figures: {error}; run this file on the CSVs where matplotlib is installed")
        return 0
    output = options.output or options.csv[0].parent
    output.mkdir(parents=True, exist_ok=True)
    for kernel, panels in panels_of(rows).items():
        path = output / f"{'_'.join(kernel.replace('+', ' ').split())}.png"
        draw(kernel, panels, path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
