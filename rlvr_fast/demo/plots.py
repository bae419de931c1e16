"""One figure about the runs: success, gradient gap, step length against break-even, forecast against outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlvr_fast.demo.records import Run, StepRecord
from rlvr_fast.demo.summary import COLLAPSE, announcements

COLOURS = ("#0072B2", "#D55E00")
ALARM = "#B00020"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.framealpha": 0.85,
    "legend.edgecolor": "none", "legend.fontsize": 9}


def plot_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write the figure; drawn without a display."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 8.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        for draw, axis in zip((_success, _gap, _step_length, _forecast), axes.flat, strict=True):
            draw(axis, runs)
            axis.legend(ncols=2 if draw is _step_length else 1)
        figure.savefig(path, dpi=130)


def _success(axis: Axes, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=True):
        axis.plot(range(len(run.records) + 1), [run.start, *(r.exact_after for r in run.records)], color=colour,
                  label=_label(run))
    called = [record for run in runs for record in announcements(run)]
    axis.plot([r.step for r in called], [r.exact_before for r in called], "v", color=ALARM, markersize=8,
              label="the next update was called an overshoot")
    axis.axhline(COLLAPSE * runs[0].start, color="grey", linestyle=":", label="half of the start: collapsed")
    axis.set(title="Success rate", xlabel="updates applied", ylabel="exact success, held-out problems", ylim=(0, None))


def _gap(axis: Axes, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=True):
        forecasts = [record.forecast for record in run.records]
        axis.errorbar([record.step for record in run.records], [f.gap_norm_sq for f in forecasts],
                      yerr=[f.gap_norm_sq_stderr for f in forecasts], fmt="o-", color=colour, markersize=3,
                      linewidth=1, elinewidth=0.8, label=_label(run))
    axis.set(title="Gradient gap", xlabel="step", ylabel="‖gap‖², mean over prompts ± standard error")


def _step_length(axis: Axes, runs: Sequence[Run]) -> None:
    for records, style in _by_run_and_verdict(runs):
        axis.plot([r.step for r in records], [r.forecast.fraction_of_break_even for r in records], "o", markersize=5,
                  **style)
    axis.axhline(1, color="black", linewidth=1)
    axis.text(1, 1.03, "break-even", transform=axis.get_yaxis_transform(), ha="right", va="bottom")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(y=0.2)  # room for the legend
    axis.set(title="Step in units of its break-even, before it was applied", xlabel="step",
             ylabel="proposed step / break-even\n(ends: as far as the scan reaches)")


def _forecast(axis: Axes, runs: Sequence[Run]) -> None:
    for records, style in _by_run_and_verdict(runs):
        axis.errorbar([r.forecast.predicted_log_odds_gain for r in records],
                      [r.realised_log_odds_gain for r in records],
                      xerr=[r.forecast.predicted_log_odds_gain_stderr for r in records],
                      fmt="o", markersize=5, elinewidth=0.8, **style)
    axis.axline((0, 0), slope=1, color="black", linewidth=1, label="forecast = outcome")
    axis.set(title="Gain of the log-odds: forecast and outcome", xlabel="predicted before the step ± standard error",
             ylabel="realised by the step")


def _by_run_and_verdict(runs: Sequence[Run]) -> Iterator[tuple[list[StepRecord], dict[str, Any]]]:
    """The steps of each run that got a verdict, as full markers, and those that did not, as open ones."""
    for run, colour in zip(runs, COLOURS, strict=True):
        told = [record for record in run.records if record.forecast.verdict != "undetermined"]
        rest = [record for record in run.records if record.forecast.verdict == "undetermined"]
        yield told, {"color": colour, "label": f"{run.name}, with a verdict"}
        yield rest, {"color": colour, "markerfacecolor": "white", "alpha": 0.6, "label": f"{run.name}, undetermined"}


def _label(run: Run) -> str:
    return f"{run.name} learning rate, {run.learning_rate:g}"
