"""The claims, counted over the runs: every number that docs/thresholds.md quotes about them is one of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median

from step_sizes.definitions import (
    ABOVE,
    BELOW,
    announced_at,
    collapse_step,
    degraded_since,
    final_success,
    lead,
    lower_after,
)
from step_sizes.forecasts import two_ended
from step_sizes.records import Run

Verdicts = Callable[[Run], list[str]]


def scan_or_reach(run: Run) -> list[str]:
    """The scan's verdict, and an overshoot where its rollouts do not reach the step, as ``rf.StepGuard`` has it."""
    return ["overshoot" if step.scan_reason in ("sample gone", "mean ratio") else step.scan.verdict
            for step in run.steps]


METHODS: dict[str, Verdicts] = {
    "scan": lambda run: [step.scan.verdict for step in run.steps],
    "scan or reach": scan_or_reach,
    "meter": lambda run: [step.meter.verdict for step in run.steps],
    "two-ended": lambda run: [forecast.verdict for forecast in two_ended(run)],
}
"""Verdicts that were there before the step was applied. All but "scan or reach" were fixed before the sweep was run."""


def verdict_outcomes(runs: Sequence[Run], verdicts: Verdicts) -> dict[str, dict[str, float]]:
    """Per verdict: the number of steps, the share that lost success, the mean change of the success rate."""
    changes: dict[str, list[float]] = {"safe": [], "near": [], "overshoot": [], "undetermined": []}
    for run in runs:
        for step, verdict in zip(run.steps, verdicts(run), strict=True):
            changes[verdict].append(step.after - step.before)
    return {verdict: {"steps": len(found), "lost": _mean([change < 0 for change in found]), "mean_change": _mean(found)}
            for verdict, found in changes.items()}


def announcements(runs: Sequence[Run], verdicts: Verdicts) -> dict[str, float]:
    """How collapses were announced, and what became of runs with an announcement but no collapse.

    Nothing that learns from earlier steps can announce a collapse at the first one.
    """
    leads = [found for run in runs if (found := lead(run, verdicts(run))) is not None]
    calm = [run for run in runs if collapse_step(run) is None]
    warned = [(run, first) for run in calm if (first := announced_at(verdicts(run))) is not None]
    in_time = [found for found in leads if found >= 0]
    return {"collapsed": len(leads), "collapsed_at_the_first_step": sum(collapse_step(run) == 0 for run in runs),
            "announced": len(in_time),
            "announced_of_the_later_ones": sum(lead(run, verdicts(run)) >= 0 for run in runs if collapse_step(run)),
            "announced_a_step_before": sum(found >= 1 for found in leads), "median_lead": _median(in_time),
            "median_success_kept": _median(_success_kept(runs, verdicts)),
            "collapsing_step_cleared": sum(_clears(run, verdicts) for run in runs),
            "not_collapsed": len(calm), "not_collapsed_but_announced": len(warned),
            "of_these_degraded": sum(degraded_since(run, first) for run, first in warned)}


def _clears(run: Run, verdicts: Verdicts) -> bool:
    """The very step that the run collapsed at had been called safe or near."""
    collapsed = collapse_step(run)
    return collapsed is not None and verdicts(run)[collapsed] in ("safe", "near")


def _success_kept(runs: Sequence[Run], verdicts: Verdicts) -> list[float]:
    """Per announced collapse: success before the announced step as a share of the highest until then."""
    kept = []
    for run in runs:
        first = announced_at(verdicts(run))
        if first is not None and collapse_step(run) is not None and first <= collapse_step(run):
            kept.append(run.steps[first].before / max([run.start, *(step.after for step in run.steps[:first])]))
    return kept


def fractions(run: Run) -> list[float]:
    """The step as a fraction of its break-even, two-ended forecast, where that is determined; NaN where it is not."""
    return [forecast.fraction if forecast.determined else math.nan for forecast in two_ended(run)]


def meter_fractions(run: Run) -> list[float]:
    """The same by the step meter, where its verdict is determined."""
    return [math.nan if step.meter.verdict == "undetermined" or math.isnan(step.meter.break_even)
            else 1 / step.meter.break_even if step.meter.break_even else math.inf for step in run.steps]


FRACTIONS = (0.0, 0.25, 0.5, 0.7, 1.0, 1.5, math.inf)


def outcomes_by_fraction(runs: Sequence[Run], fractions_of: Callable[[Run], list[float]]) -> list[dict[str, float]]:
    """Share of steps that lost success, and their mean change, by the fraction that was known before the step."""
    known = [(fraction, step.after - step.before) for run in runs
             for fraction, step in zip(fractions_of(run), run.steps, strict=True)]
    rows = []
    for low, high in pairwise(FRACTIONS):
        changes = [change for fraction, change in known if low <= fraction < high or fraction == high == math.inf]
        rows.append({"from": low, "to": high, "steps": len(changes), "lost": _mean([c < 0 for c in changes]),
                     "mean_change": _mean(changes)})
    return rows


def thresholds(runs: Sequence[Run]) -> dict[str, float]:
    """Runs whose determined fractions all stayed below ``BELOW``, runs with one above ``ABOVE``, and what came."""
    below, above, unknown = [], [], 0
    for run in runs:
        known = {k: fraction for k, fraction in enumerate(fractions(run)) if not math.isnan(fraction)}
        unknown += not known
        if known and max(known.values()) < BELOW:
            below.append(run)
        first = next((k for k, fraction in known.items() if fraction > ABOVE), None)
        if first is not None:
            above.append((run, first))
    return {"runs": len(runs), "without_a_determined_step": unknown,
            "below": len(below), "below_and_collapsed": sum(collapse_step(run) is not None for run in below),
            "below_lowest_gain": min((final_success(run) - run.start for run in below), default=math.nan),
            "below_highest_gain": max((final_success(run) - run.start for run in below), default=math.nan),
            "between": len(runs) - unknown - len(below) - len(above),
            "above": len(above), "above_and_degraded": sum(degraded_since(run, first) for run, first in above),
            "above_and_lower_after_horizon": sum(lower_after(run, first) for run, first in above),
            "above_and_collapsed": sum(collapse_step(run) is not None for run, _ in above)}


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


def _median(values: Sequence[float]) -> float:
    return median(values) if values else math.nan
