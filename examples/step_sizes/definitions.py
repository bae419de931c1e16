"""What the words mean that the results are told in. Fixed before the sweep was run, ``HORIZON`` after a trial of it.

Success is the exact success rate of the held-out problems. A *fraction* is the length of a step in units of its
break-even: 1 leaves the success rate where it was, less raises it, more lowers it.
"""

from __future__ import annotations

from collections.abc import Sequence

from step_sizes.records import Run

COLLAPSE = 0.5
"""A run has collapsed at the first step after which success is below this share of the highest it had until then."""

BELOW, ABOVE = 0.7, 1.5
"""Fractions of break-even that the claims are about: steps that stay below the one, steps above the other."""

HORIZON = 5
"""A step harmed if, this many steps later, success is lower than before it: long enough for noise to average out."""

LAST = 3
"""The final success of a run is the mean over this many last steps; one step is a matter of luck."""


def collapse_step(run: Run) -> int | None:
    """Index of the step that the run collapsed at; None if it did not."""
    highest = run.start
    for step in run.steps:
        if step.after < COLLAPSE * highest:
            return step.step
        highest = max(highest, step.after)
    return None


def final_success(run: Run) -> float:
    last = [step.after for step in run.steps[-LAST:]]
    return sum(last) / len(last)


def degraded_since(run: Run, step: int) -> bool:
    """The final success is below the success before ``step``: what followed did harm, on balance."""
    return final_success(run) < run.steps[step].before


def lower_after(run: Run, step: int) -> bool:
    """Success is lower ``HORIZON`` steps after ``step`` was taken, or at the end of the run, than before it."""
    return run.steps[min(step + HORIZON, len(run.steps)) - 1].after < run.steps[step].before


def announced_at(verdicts: Sequence[str]) -> int | None:
    """Index of the first step called an overshoot before it was applied; None if none was."""
    return next((i for i, verdict in enumerate(verdicts) if verdict == "overshoot"), None)


def lead(run: Run, verdicts: Sequence[str]) -> int | None:
    """Steps between the announcement and the collapse, 0 if the very step that collapsed it was the first announced.

    None if the run did not collapse; negative if no step up to the collapse was announced.
    """
    collapsed, announced = collapse_step(run), announced_at(verdicts)
    if collapsed is None:
        return None
    return -1 if announced is None or announced > collapsed else collapsed - announced
