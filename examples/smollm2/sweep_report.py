"""The sweep over learning rates and guards as a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted, also where there is no display

import matplotlib.pyplot as plt

from rlvr_fast.demo.plots import STYLE

NAMES = {"warn": "no guard (it only tells)", "scale": "scale", "backtrack": "backtrack"}
COLOURS = {"warn": "#D55E00", "scale": "#0072B2", "backtrack": "#009E73"}


def markdown(runs: Sequence[dict]) -> str:
    """One row per run: success at the start, its least and at the end, losing steps and how many were announced."""
    rows = ["| learning rate | guard | success: start | least | end | steps that lost 2 points | announced before | "
            "shortest step | taken back | guard's share of the time |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for run in runs:
        steps = run["steps"]
        lost = [step for step in steps if step["before"] - step["after"] > 0.02]
        seconds = [step["seconds"] for step in steps]
        guarding = ("observing", "checking", *(["stepping"] if run["mode"] == "backtrack" else []))
        own = sum(s[section] for s in seconds for section in guarding)
        rows.append(
            f"| {run['learning_rate']:g} | {NAMES[run['mode']]} | {steps[0]['before']:.1%} | "
            f"{min(step['after'] for step in steps):.1%} | {steps[-1]['after']:.1%} | {len(lost)} of {len(steps)} | "
            f"{sum(step['announced'] for step in lost)} | {min(step['scale'] for step in steps):.2f} × | "
            f"{steps[-1]['backtracks']:.0f} | {own / sum(sum(s.values()) for s in seconds):.0%} |")
    return "\n".join(rows) + "\n"


def draw(runs: Sequence[dict], path: Path) -> None:
    """Success over steps, a panel per learning rate."""
    rates = sorted({run["learning_rate"] for run in runs})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(rates), figsize=(3.4 * len(rates), 3.4), sharey=True, squeeze=False,
                                    layout="constrained")
        for axis, rate in zip(axes[0], rates, strict=True):
            for run in (run for run in runs if run["learning_rate"] == rate):
                values = [run["steps"][0]["before"], *(step["after"] for step in run["steps"])]
                axis.plot(range(len(values)), values, "o-", color=COLOURS[run["mode"]], label=NAMES[run["mode"]])
            axis.set(title=f"learning rate {rate:g}", xlabel="updates applied", ylim=(0, 1.02))
        axes[0][0].set_ylabel("exact success, held-out sums")
        axes[0][0].legend(loc="lower left")
        figure.savefig(path, dpi=120)
        plt.close(figure)
