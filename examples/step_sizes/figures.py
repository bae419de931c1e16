"""The figures of docs/thresholds.md, drawn from the stored runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted, also where there is no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from rlvr_fast.demo.plots import STYLE
from step_sizes.claims import METHODS, fractions, meter_fractions, outcomes_by_fraction
from step_sizes.definitions import COLLAPSE, collapse_step, final_success
from step_sizes.fidelity import pairs
from step_sizes.forecasts import shortest_and_longest
from step_sizes.records import Run
from step_sizes.summary import by_length, groups

LENGTH_COLOURS = {4: "#0072B2", 8: "#009E73", 16: "#CC79A7"}
GUARDS = {"off": ("black", "o", "no guard"), "scale": ("#0072B2", "s", "scale"),
          "backtrack": ("#009E73", "^", "backtrack")}
VERDICT_COLOURS = {"safe": "#009E73", "near": "#E69F00", "undetermined": "#999999", "overshoot": "#B00020"}
OUTSIDE = 1.6  # how far beyond the known range values outside of it are drawn


def draw(directory: Path, runs: Sequence[Run]) -> list[Path]:
    unguarded = [run for run in runs if run.settings.guard == "off"]
    return [_save(directory / "sweep.png", _sweep(runs)), _save(directory / "before.png", _before(unguarded)),
            _save(directory / "break_even.png", _break_even(unguarded))]


def _save(path: Path, figure: plt.Figure) -> Path:
    """With 64 colours, a third of the size."""
    figure.set_dpi(100)
    figure.canvas.draw()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64).save(path, optimize=True)
    plt.close(figure)
    return path


# -- final success against the rate -----------------------------------------------------------------------------------

def _sweep(runs: Sequence[Run]) -> plt.Figure:
    lengths = dict(by_length(runs))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(lengths), figsize=(5.2 * len(lengths), 4.2), layout="constrained",
                                    sharey=True, squeeze=False)
        for axis, (length, group) in zip(axes[0], lengths.items(), strict=True):
            for guard, style in GUARDS.items():
                _final_success(axis, [run for run in group if run.settings.guard == guard], *style)
            axis.axhline(sum(run.start for run in group) / len(group), color="grey", linestyle=":", label="start")
            axis.set(title=f"{length} tokens", xscale="log", xlabel="learning rate", ylim=(-0.02, None))
            axis.legend(loc="lower left")
        axes[0, 0].set_ylabel("final success, exact")
    return figure


def _final_success(axis: Axes, runs: Sequence[Run], colour: str, marker: str, label: str) -> None:
    means = []
    for group in groups(runs):
        rate = group[0].settings.learning_rate
        final = [final_success(run) for run in group]
        means.append((rate, sum(final) / len(final)))
        for run, value in zip(group, final, strict=True):
            collapsed = collapse_step(run) is not None
            axis.plot(rate, value, "x" if collapsed else marker, color=colour, markersize=5, alpha=0.6)
    if means:
        axis.plot(*zip(*means, strict=True), color=colour, marker=marker, markersize=3,
                  label=f"{label}: mean; each run (x: collapsed)")


# -- what was known before the steps ----------------------------------------------------------------------------------

def _before(runs: Sequence[Run]) -> plt.Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12, 9.2), layout="constrained")
        for draw_panel, axis in zip((_collapses, _outcomes, _lost, _early), axes.flat, strict=True):
            draw_panel(axis, runs)
    return figure


def _collapses(axis: Axes, runs: Sequence[Run]) -> None:
    """Runs that collapsed, with the meter's verdicts before their steps."""
    for run in (run for run in runs if collapse_step(run) is not None):
        axis.plot([run.start, *(step.after for step in run.steps)], color="#cccccc", linewidth=0.8, zorder=1)
        for verdict, colour in VERDICT_COLOURS.items():
            steps = [step for step in run.steps if step.meter.verdict == verdict]
            axis.scatter([step.step for step in steps], [step.before for step in steps], s=9, color=colour, zorder=2)
    for verdict, colour in VERDICT_COLOURS.items():
        axis.scatter([], [], s=14, color=colour, label=verdict)
    axis.set(title="Runs that collapsed; verdicts of the meter", xlabel="steps taken", ylabel="success before the step")
    axis.legend(title="about the next step")


def _outcomes(axis: Axes, runs: Sequence[Run]) -> None:
    """Per method and verdict, what the steps so judged did."""
    position, ticks = 0, []
    for method in ("scan", "meter", "two-ended"):
        for verdict, colour in VERDICT_COLOURS.items():
            changes = [step.after - step.before for run in runs
                       for step, found in zip(run.steps, METHODS[method](run), strict=True) if found == verdict]
            if changes:
                axis.boxplot(changes, positions=[position], widths=0.7, whis=(5, 95), sym="", patch_artist=True,
                             boxprops={"facecolor": colour}, medianprops={"color": "black"})
                lost = sum(change < 0 for change in changes) / len(changes)
                ticks.append((position, f"{method}: {verdict}\n{len(changes)} steps, {lost:.0%} lost"))
            position += 1
        position += 0.6
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(*zip(*ticks, strict=True), rotation=90, fontsize=7)
    axis.set(title="What steps did, by the verdict before", ylabel="change of success (5 to 95 %)")


def _lost(axis: Axes, runs: Sequence[Run]) -> None:
    """Share of the steps that lost success, by the fraction of break-even known before them."""
    for offset, (method, fractions_of, colour) in zip((-0.2, 0.2), (("meter", meter_fractions, "#0072B2"), (
            "two-ended", fractions, "#E69F00")), strict=True):
        rows = outcomes_by_fraction(runs, fractions_of)
        places = [place + offset for place in range(len(rows))]
        axis.bar(places, [row["lost"] for row in rows], width=0.38, color=colour, label=method)
        for place, row in zip(places, rows, strict=True):
            axis.text(place, 0.01, f"{row['steps']}", ha="center", fontsize=7)
    axis.set_xticks(range(len(rows)), [f"{row['from']:g} to {row['to']:g}" for row in rows])
    axis.set(title="Steps that lost success", xlabel="step / break-even, known before the step",
             ylabel="share of the steps", ylim=(0, 1))
    axis.legend()


def _early(axis: Axes, runs: Sequence[Run]) -> None:
    """Fraction of break-even, median over the first steps of a run, against its final success."""
    for length, group in by_length(runs):
        points = []
        for run in group:
            early = [1 / step.meter.break_even for step in run.steps[1:EARLY]
                     if not math.isnan(step.meter.break_even) and step.meter.break_even > 0]
            if early:
                points.append((min(max(sorted(early)[len(early) // 2], 0.02), 10), final_success(run) / run.start))
        axis.plot(*zip(*points, strict=True), "o", color=LENGTH_COLOURS.get(length, "black"), markersize=5, alpha=0.7,
                  label=f"{length} tokens")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.axhline(1, color="grey", linestyle=":")
    axis.axhline(COLLAPSE, color="grey", linestyle="--", linewidth=0.8)
    axis.set(title=f"The meter's first {EARLY - 1} readings and the end", xscale="log",
             xlabel="step / break-even, median", ylabel="final success / success at the start")
    axis.legend()


EARLY = 8  # steps: a third of a run


# -- measured against true break-even ----------------------------------------------------------------------------------

def _break_even(runs: Sequence[Run]) -> plt.Figure:
    found, (shortest, longest) = pairs(runs), shortest_and_longest(runs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(found), figsize=(3.9 * len(found), 4.2), layout="constrained", sharey=True)
        for axis, (name, of_steps) in zip(axes, found.items(), strict=True):
            known = [pair for pair in of_steps if pair.determined and not math.isnan(pair.measured)]
            axis.plot([_clip(pair.true, shortest, longest) for pair in known],
                      [_clip(pair.measured, shortest, longest) for pair in known], "o", markersize=3, alpha=0.4,
                      color="#0072B2")
            axis.axline((1, 1), (2, 2), color="black", linewidth=0.8)
            axis.axvline(1, color="grey", linestyle=":")
            axis.axhline(1, color="grey", linestyle=":")
            axis.set(title=f"{name}, {len(known)} of {len(of_steps)} steps", xscale="log", yscale="log",
                     xlabel="true break-even (multiples of the step)")
        axes[0].set_ylabel("measured break-even")
    return figure


def _clip(value: float, shortest: float, longest: float) -> float:
    return min(max(value, shortest / OUTSIDE), longest * OUTSIDE)
