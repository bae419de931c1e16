"""``rlvr-fast analyze``: a rollout dump to tables or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlvr_fast.analyze.analysis import analyze
from rlvr_fast.command_line import print_json, progress

SHOWN_STEPS = 20


def run(path: Path, *, columns: dict[str, str | None], threshold: float | None, prompts: int, as_json: bool) -> None:
    """Analyze and print."""
    with progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), quiet=as_json) as bar:
        task = bar.add_task(f"reading {escape(str(path))}", total=None)
        found = analyze(path, columns=columns, threshold=threshold, prompts=prompts,
                        progress=lambda rows: bar.update(task, description=f"{rows:,} rows"))
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    summary = found["summary"]
    console.print(f"[bold]{summary['responses']:,} responses[/] to {summary['prompts']:,} prompts in "
                  f"{summary['steps']:,} steps; success {summary['success']:.1%}; groups: "
                  f"{summary['mixed']:.0%} mixed, {summary['solved']:.0%} solved, {summary['failed']:.0%} failed")
    if summary["length_difference"] is not None:
        console.print(f"correct responses are {_pm(summary['length_difference'], summary['length_difference_stderr'])} "
                      f"{summary['length_unit']} longer than incorrect ones to the same prompt")
    steps = found["steps"]
    if len(steps) > 1 or "gain" in steps[0]:
        console.print("", _steps(steps))
    console.print("", _bins("prompts by their success rate", found["spectrum"]))
    if found["difficulty"]:
        console.print("", _bins("prompts by difficulty", found["difficulty"]))
    if found["prompts"]:
        console.print("", _prompts(found["prompts"]))
    console.print("")
    for note in found["notes"]:
        console.print(f"- {escape(note)}", soft_wrap=True)


def _steps(steps: list[dict[str, Any]]) -> Table:
    """All steps, or as many of a long run, evenly spread, first and last included."""
    shown = steps if len(steps) <= SHOWN_STEPS else \
        [steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    title = "steps" if len(shown) == len(steps) else f"steps ({len(shown)} of {len(steps):,}; --json has all)"
    table = _table(title, "step", "prompts", "responses", "success", "mixed", "solved", "failed",
                   *(["length"] if "length" in steps[0] else []),
                   *(["gain of the update", "effective share"] if "gain" in steps[0] else []))
    for row in shown:
        cells = [str(row["step"]), str(row["prompts"]), str(row["responses"]),
                 _pm(row["success"], row["success_stderr"], ".3f"),
                 *(f"{row[share]:.2f}" for share in ("mixed", "solved", "failed"))]
        if "length" in row:
            cells.append(f"{row['length']:.1f}")
        if "gain" in row:
            cells += [_pm(row["gain"], row["gain_stderr"], "+.4f"), _cell(row["ess_fraction"], ".2f")]
        table.add_row(*cells)
    return table


def _bins(title: str, bins: list[dict[str, Any]]) -> Table:
    table = _table(title, "bin", "prompts", "rollouts", "success", "95 %", "mixed groups", "Δ length")
    for row in bins:
        table.add_row(row["bin"], str(row["prompts"]), str(row["rollouts"]), f"{row['success']:.3f}",
                      f"{row['low']:.2f} to {row['high']:.2f}", f"{row['mixed']:.0%}",
                      _cell(row["length_difference"], "+.1f"))
    return table


def _prompts(prompts: list[dict[str, Any]]) -> Table:
    table = _table("prompts with the largest p(1 − p)", "prompt", "rollouts", "correct", "95 %", "mixed groups")
    for row in prompts:
        text = " ".join(str(row["prompt"]).split())
        table.add_row(escape(text if len(text) <= 60 else f"{text[:57]}..."), str(row["rollouts"]), str(row["correct"]),
                      f"{row['low']:.2f} to {row['high']:.2f}", f"{row['mixed']:.0%} of {row['groups']}")
    return table


def _table(title: str, first: str, *rest: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first)
    for name in rest:
        table.add_column(name, justify="right")
    return table


def _pm(value: float | None, error: float | None, how: str = "+.1f") -> str:
    return "–" if value is None else f"{value:{how}}" + ("" if error is None else f" ± {error:{how.lstrip('+')}}")


def _cell(value: float | None, how: str) -> str:
    return "–" if value is None else f"{value:{how}}"
