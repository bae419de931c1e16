"""Guarded and plain runs as a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

MODES = ("plain", "scale")
NAMES = {"plain": "plain TRL", "scale": "StepGuard, mode scale"}
COLOURS = {"plain": "#D55E00", "scale": "#0072B2"}


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """One row per rate and mode: each seed's success at the end, its least, how long the guarded steps were, costs."""
    rows = ["| learning rate | run | success: start | least | end | losing steps | steps' share of the rate | guard's "
            "share of the time | CPU ms a step |", "|---|---|---|---|---|---|---|---|---|"]
    for rate in sorted({run["learning_rate"] for run in runs}):
        for mode in MODES:
            own = [run["steps"] for run in runs if (run["learning_rate"], run["mode"]) == (rate, mode)]
            if not own:
                continue
            steps = [step for run in own for step in run]
            scales = sorted(step["scale"] for step in steps if "scale" in step)
            span = f"{scales[0]:.2g} to {scales[-1]:.2g}" if scales else "1"
            cost = f"{fmean(run[-1]['cost_share'] for run in own):.0%}" if scales else ""
            lost = sum(step["before"] - step["after"] > 0.02 for step in steps)
            rows.append(f"| {rate:g} | {NAMES[mode]} | {_each(run[0]['before'] for run in own)} | "
                        f"{_each(min(step['after'] for step in run) for run in own)} | "
                        f"{_each(run[-1]['after'] for run in own)} | {lost} of {len(steps)} | {span} | {cost} | "
                        f"{1e3 * fmean(step['cpu'] for step in steps):.0f} |")
    return "\n".join(rows) + "\n"


def _each(values: Any) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Exact success over updates: a panel per rate, a line per run."""
    import matplotlib  # here: the runs themselves need none

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = sorted({run["learning_rate"] for run in runs})
    figure, axes = plt.subplots(1, len(rates), figsize=(max(3.1 * len(rates), 4.5), 3.2), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, rate in zip(axes[0], rates, strict=True):
        for mode in MODES:
            own = [run["steps"] for run in runs if (run["learning_rate"], run["mode"]) == (rate, mode)]
            for i, steps in enumerate(own):
                axis.plot([steps[0]["before"], *(step["after"] for step in steps)], color=COLOURS[mode],
                          label=NAMES[mode] if i == 0 else None)
        axis.set(title=f"AdamW at {rate:g}", xlabel="updates applied", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("exact success, held-out prompts")
    axes[0][0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
