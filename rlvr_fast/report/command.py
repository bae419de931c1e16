"""The command behind ``rlvr-fast report``: the page, and its headlines as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import typer
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from rlvr_fast.command_line import check_file, print_json, progress
from rlvr_fast.report.load import Column, Recorded, Series, load
from rlvr_fast.report.page import write_page
from rlvr_fast.report.verdicts import Headline, headline

BAD = ("overshoot", "collapsed")


def run(path: Path, output: Path, *, rollouts: Path | None, columns: Mapping[str, str | None],
        threshold: float | None, title: str | None, as_json: bool) -> bool:
    """Write the page and print its name, or JSON.

    Returns:
        Whether a run's last verdict is overshoot, or its success has collapsed.

    Raises:
        ValueError, OSError: naming the file, line or key of what cannot be read or written.
    """
    check_file("output", output)
    with progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), quiet=as_json) as bar:
        task = bar.add_task("reading", total=None)
        recorded = load(path, rollouts=rollouts, columns=columns, threshold=threshold)
        bar.update(task, description="drawing")
        write_page(recorded, output, title or path.resolve().name)
    headlines = [headline(series) for series in recorded.series]
    if as_json:
        print_json(content_of(recorded, headlines, output))
    else:
        typer.echo(output)
    return any(line.word in BAD for line in headlines)


def content_of(recorded: Recorded, headlines: list[Headline], page: Path) -> dict[str, object]:
    """Every run's headline and the latest figure of everything that was logged for it."""
    return {
        "page": str(page),
        "source": recorded.source,
        "rows": recorded.n_rows,
        "runs": [{**asdict(line), "first_step": int(series.step[0]), "last_step": int(series.step[-1]),
                  "steps": len(series.step), "latest": _latest(series)}
                 for series, line in zip(recorded.series, headlines, strict=True)],
        "rollouts": None if recorded.rollouts is None else recorded.rollouts["summary"],
        "notes": recorded.notes,
    }


def _latest(series: Series) -> dict[str, dict[str, object]]:
    """Role -> the last step that has it, its figure, standard error and interval."""
    found = {role: _last(series.step, column) for role, column in series.columns.items()}
    return {role: figure for role, figure in found.items() if figure is not None}


def _last(step: np.ndarray, column: Column) -> dict[str, object] | None:
    known = np.flatnonzero(np.isfinite(column.value))
    if not len(known):
        return None
    at = known[-1]
    return {"step": int(step[at]), **{name: float(getattr(column, name)[at]) for name in (
        "value", "stderr", "low", "high")}}
