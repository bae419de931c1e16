"""The sweep in numbers: by rate, by length, by guard. docs/thresholds.md quotes these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from statistics import mean, median

from step_sizes.claims import (
    METHODS,
    announcements,
    fractions,
    meter_fractions,
    outcomes_by_fraction,
    thresholds,
    verdict_outcomes,
)
from step_sizes.definitions import collapse_step, final_success
from step_sizes.fidelity import agreement, pairs
from step_sizes.forecasts import shortest_and_longest, true_break_even
from step_sizes.records import Run


def summarise(runs: Sequence[Run]) -> dict:
    unguarded = [run for run in runs if run.settings.guard == "off"]
    return {
        "by_rate": [by_rate(group) for group in groups(runs)],
        "thresholds": thresholds(unguarded),
        "thresholds_by_length": {length: thresholds(group) for length, group in by_length(unguarded)},
        "verdicts": {name: verdict_outcomes(unguarded, verdicts) for name, verdicts in METHODS.items()},
        "by_fraction": {"meter": outcomes_by_fraction(unguarded, meter_fractions),
                        "two-ended": outcomes_by_fraction(unguarded, fractions)},
        "announcements": {name: announcements(unguarded, verdicts) for name, verdicts in METHODS.items()},
        "fidelity": fidelity(unguarded),
        "fidelity_by_length": {length: fidelity(group) for length, group in by_length(unguarded)},
        "lengths": [row for length, group in by_length(unguarded) for row in break_even_lengths(length, group)],
        "guards": [against_unguarded(group) for group in guard_groups(runs)],
    }


def fidelity(runs: Sequence[Run]) -> dict[str, dict]:
    shortest, longest = shortest_and_longest(runs)
    reach = {"scan": runs[0].settings.scan_multiples[-1]}
    return {name: agreement(found, shortest, reach.get(name, longest)) for name, found in pairs(runs).items()}


def groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that differ in nothing but their seed."""
    def key(run: Run) -> tuple:
        return run.settings.length, run.settings.guard, run.settings.learning_rate

    for _, group in groupby(sorted(runs, key=key), key):
        yield list(group)


def guard_groups(runs: Sequence[Run]) -> Iterator[tuple[list[Run], list[Run]]]:
    """(guarded runs of one length and mode, the runs without a guard of the same length and seeds)."""
    for _, group in by_length(runs):
        for guard in sorted({run.settings.guard for run in group} - {"off"}):
            guarded = [run for run in group if run.settings.guard == guard]
            seeds = {run.settings.seed for run in guarded}
            yield guarded, [run for run in group if run.settings.guard == "off" and run.settings.seed in seeds]


def against_unguarded(pair: tuple[Sequence[Run], Sequence[Run]]) -> dict:
    """Collapses at the guarded rates; mean final success at each rate, its best and its lowest."""
    guarded, unguarded = pair
    rates = {run.settings.learning_rate for run in guarded}
    beside = [run for run in unguarded if run.settings.learning_rate in rates]
    means = {row["rate"]: row["final"] for row in map(by_rate, groups(guarded))}
    best = max((row["final"], row["rate"]) for row in map(by_rate, groups(unguarded)))
    return {"length": guarded[0].settings.length, "guard": guarded[0].settings.guard, "runs": len(guarded),
            "collapsed": sum(collapse_step(run) is not None for run in guarded),
            "collapsed_at_the_first_step": sum(collapse_step(run) == 0 for run in guarded),
            "collapsed_unguarded": sum(collapse_step(run) is not None for run in beside), "runs_unguarded": len(beside),
            "final_by_rate": means, "best": max(means.values()), "lowest": min(means.values()),
            "best_unguarded": best[0], "best_unguarded_rate": best[1]}


def by_length(runs: Sequence[Run]) -> Iterator[tuple[int, list[Run]]]:
    def key(run: Run) -> int:
        return run.settings.length

    for length, group in groupby(sorted(runs, key=key), key):
        yield length, list(group)


def by_rate(group: Sequence[Run]) -> dict:
    settings, final = group[0].settings, [final_success(run) for run in group]
    return {"length": settings.length, "guard": settings.guard, "rate": settings.learning_rate, "runs": len(group),
            "start": mean(run.start for run in group), "final": mean(final), "final_lowest": min(final),
            "final_highest": max(final), "collapsed": sum(collapse_step(run) is not None for run in group)}


SUCCESS_BINS = (0.3, 0.45, 0.6, 0.9)


def break_even_lengths(length: int, runs: Sequence[Run]) -> Iterator[dict[str, float]]:
    """Norm and learning rate at which updates would have broken even, by the exact success rate.

    Medians over the steps where that is known, by the success rate before the step: the threshold moves with it.
    """
    known = [(step, true_break_even(step)) for run in runs for step in run.steps]
    for low, high in pairwise(SUCCESS_BINS):
        found = [(step, multiple) for step, multiple in known
                 if 0 < multiple < math.inf and low <= step.before < high]
        if found:
            yield {"length": length, "success_from": low, "success_to": high, "steps": len(found),
                   "norm": median(multiple * step.norm for step, multiple in found),
                   "rate": median(multiple * step.rate for step, multiple in found)}
