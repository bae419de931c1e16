"""The two figures of the relay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, label, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (SKY, ORANGE, GREEN, PINK, BLUE)


def relay_figure(numbers: Numbers, shown: tuple[str, ...], alone: str) -> Figure:
    """Per condition, from the top: share of the signal, signal with its errors, success. First seed; success of all."""
    fig, axes = panels(3 * len(shown))
    fig.set_size_inches(5.2 * len(shown), 10.5)
    cells = fig.add_gridspec(3, len(shown))
    for i, axis in enumerate(axes):
        axis.set_subplotspec(cells[i])
    for column, name in enumerate(shown):
        condition = numbers["conditions"][name]
        shares, signals, success = axes[column::len(shown)]
        _share(shares, condition)
        label(shares, f"{name}: lengths {', '.join(map(str, condition['lengths']))} on {condition['group']}", "step",
              "share of the measured signal")
        _signal(signals, condition)
        label(signals, "p(1 − p)·‖gap‖, ± 1 standard error; filled: more than 2", "step", "signal of the level")
        _success(success, condition)
        label(success, "Success: every seed, and the expected flow (dashed)", "step", "success rate")
    lonely = numbers["conditions"][alone]
    for i, history in enumerate(lonely["runs"]):
        axes[2 * len(shown)].plot(history["step"], [row[0] for row in history["success"]], color=BLACK, linewidth=1.5,
                                  label=f"L = {lonely['lengths'][0]} alone" if i == 0 else None)
    axes[2 * len(shown)].legend(fontsize=7, loc="center right")
    return fig


def _share(axis: Axes, condition: Numbers) -> None:
    history = condition["runs"][0]
    total = [sum(row) for row in history["signal"]]
    parts = [[row[i] / s if s else 0.0 for row, s in zip(history["signal"], total, strict=True)]
             for i in range(len(condition["lengths"]))]
    axis.stackplot(history["step"], parts, colors=COLOURS, step="mid", linewidth=0,
                   labels=[f"L = {length}" for length in condition["lengths"]])
    axis.set_ylim(0, 1)
    axis.legend(fontsize=7, loc="upper left")


def _signal(axis: Axes, condition: Numbers) -> None:
    history = condition["runs"][0]
    for i, (length, colour) in enumerate(zip(condition["lengths"], COLOURS, strict=False)):
        for step, rates, norms, errors in zip(*(history[key] for key in ("step", "sampled", "gap_norm_sq",
                                                                         "gap_stderr")), strict=True):
            norm_sq, error, scale = float(norms[i]), float(errors[i]), rates[i] * (1 - rates[i])
            if not math.isfinite(error):  # a class was empty: no gap
                continue
            low, middle, high = (scale * max(norm_sq + sign * error, 0.0) ** 0.5 for sign in (-1, 0, 1))
            axis.errorbar(step, middle, [[middle - low], [high - middle]], fmt="o", color=colour, markersize=4,
                          markerfacecolor=colour if norm_sq > 2 * error else "white", linewidth=0.8)
        axis.plot([], [], "o", color=colour, label=f"L = {length}")
    axis.set_ylim(0, 1.4 * max(map(max, history["signal"])) or None)  # what is not significant may lie far above
    axis.legend(fontsize=7)


def _success(axis: Axes, condition: Numbers) -> None:
    for i, (length, colour) in enumerate(zip(condition["lengths"], COLOURS, strict=False)):
        for seed, history in enumerate(condition["runs"]):
            axis.plot(history["step"], [row[i] for row in history["success"]], color=colour,
                      linewidth=2 if seed == 0 else 0.7, label=f"L = {length}" if seed == 0 else None)
    start = condition["levels"][condition["lengths"][0]]
    shift = start["visible"][0] - start["expected_visible"]
    if math.isfinite(shift):  # the flow starts off the saddle, so it is moved to where the first level wakes
        for rates in condition["expected"]["success"]:
            axis.plot(condition["expected"]["step"] + shift, rates, color=BLACK, linestyle="--", linewidth=1)
    axis.axhline(1 / condition["order"], color=RED, linestyle=":", linewidth=1, label="chance")
    axis.set_xlim(0, condition["runs"][0]["step"][-1])
    axis.legend(fontsize=7, loc="center right")
