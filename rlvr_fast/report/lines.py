"""Lines over the steps of a run: what the sections of ``figures`` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlvr_fast.report.load import Column, Series
from rlvr_fast.report.section import (
    NOTHING,
    RUN_COLOURS,
    Figure,
    Section,
    axis,
    colour,
    line_and_band,
    number,
    plot_text,
    step_table,
    text,
    thinned,
    with_error,
)
from rlvr_fast.report.verdicts import Z95


def empty() -> tuple[Figure, list[list[str]], list[str]]:
    """A section's figure, rows and notes before there is any."""
    return Figure(), [], []


@dataclass(frozen=True)
class Panel:
    """A figure of two: its role, its name in the legend and on its axis, how numbers look, a level drawn across."""

    role: str
    name: str
    label: str
    how: str
    level: float | None = None

    def has_data(self, runs: Sequence[Series]) -> bool:
        return any(run.get(self.role) is not None for run in runs)


def two_panels(section: str, title: str, lead: str, runs: Sequence[Series], upper: Panel, lower: Panel
               ) -> Section | None:
    """One above the other over the same steps; one alone takes all the height."""
    figure, rows, notes = empty()
    axes = {"y": upper, "y2": lower}
    shown = {name: panel for name, panel in axes.items() if panel.has_data(runs)}
    if not shown:
        return None
    both = len(shown) == 2
    for tint, run in tinted(runs):
        for name, panel in shown.items():
            if (column := run.get(panel.role)) is not None:
                plain_line(figure, run, column, label_of(run, panel.name), tint, notes)
                # A run stands in the legend once, and the lower panel says on its axis what it shows.
                figure.traces[-1] |= {"yaxis": name} | ({"showlegend": False} if both and panel is lower else {})
        rows += rows_of(run, [(run.get(panel.role), panel.how) for panel in axes.values()])
    figure.layout |= {"xaxis": steps_axis(runs) | {"anchor": "y2" if "y2" in shown else "y"},
                      "shapes": [level_line(name, panel.level) for name, panel in shown.items()
                                 if panel.level is not None]}
    for name, panel in shown.items():
        domain = [0, 1] if not both else [0.5, 1] if panel is upper else [0, 0.42]
        figure.layout[f"yaxis{name[1:]}"] = axis(panel.label, domain=domain)
    return Section(section, title, lead, figure.build(380 if both else 320),
                   step_table(("run", "step", upper.label, lower.label), rows), once(notes))


def tinted(runs: Sequence[Series]) -> list[tuple[str, Series]]:
    return [(RUN_COLOURS[at % len(RUN_COLOURS)], run) for at, run in enumerate(runs)]


def steps_axis(runs: Sequence[Series]) -> dict[str, object]:
    """The axis of steps; of a few steps with whole numbers alone."""
    ends = [step for run in runs for step in run.step[[0, -1]].tolist()]
    return axis("step") | ({"dtick": 1} if max(ends) - min(ends) <= 12 else {})


def label_of(run: Series, otherwise: str = "") -> str:
    """A run in the legend; what the line shows where there is a single run without a name."""
    return f"run {run.name}" if run.name else otherwise


def plain_line(figure: Figure, run: Series, column: Column, name: str, tint: str, notes: list[str],
               dash: str = "solid") -> None:
    nothing = np.full(len(run.step), math.nan)
    drawn = line_and_band(figure, run.step, column.value, nothing, nothing, name=name, tint=tint, dash=dash,
                          hover="step %{x}: %{y:.4g}<extra>" + plot_text(name) + "</extra>")
    notes += thinned(drawn, int(np.isfinite(column.value).sum()))


def line_with_errors(figure: Figure, run: Series, column: Column, name: str, tint: str, hover: str) -> list[str]:
    error = Z95 * column.stderr
    drawn = line_and_band(figure, run.step, column.value, column.value - error, column.value + error, name=name,
                          tint=tint, hover=hover)
    notes = thinned(drawn, int(np.isfinite(column.value).sum()))
    return notes + (["Band: 95 %, 1.96 standard errors."] if np.isfinite(error).any() else ["No error was logged."])


def rows_of(run: Series, columns: Sequence[tuple[Column | None, str]]) -> list[list[str]]:
    given = [column for column, _ in columns if column is not None]
    if not given:
        return []
    known = np.flatnonzero(np.any([~np.isnan(column.value) for column in given], axis=0))
    return [[text(run.name or NOTHING), str(run.step[at]),
             *(NOTHING if column is None else with_error(column.value[at], column.stderr[at], how)
               for column, how in columns)] for at in known]


def interval_text(low: float, high: float) -> str:
    return NOTHING if math.isnan(low) and math.isnan(high) else f"{number(low)} to {number(high)}"


def zero_line(y: str = "y") -> dict[str, object]:
    return level_line(y, 0)


def level_line(y: str, at: float) -> dict[str, object]:
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": y, "y0": at, "y1": at,
            "line": {"color": colour("grey"), "width": 1}}


def once(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))
