"""How well the measured break-even agrees with the true one, over all steps of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from step_sizes.forecasts import Forecast, Z, own_ends, true_break_even, two_ended
from step_sizes.records import Run, Step

PERCENTILES = (5, 25, 50, 75, 95)


class Pair(NamedTuple):
    """Break-evens of one step in multiples of it; 0 and inf where they lie outside of what was measured.

    ``determined``: the measurement says something; the truth was evaluated, whatever it is.
    """

    measured: float
    true: float
    determined: bool


def scan_pair(step: Step) -> Pair:
    return Pair(step.scan.break_even, true_break_even(step), abs(step.gain) > Z * step.gain_stderr)


def meter_pair(step: Step) -> Pair:
    """The meter's interval decides: all that is not within its error."""
    return Pair(step.meter.break_even, true_break_even(step), step.meter.verdict != "undetermined")


def forecast_pair(step: Step, forecast: Forecast) -> Pair:
    return Pair(forecast.break_even, true_break_even(step), forecast.determined)


def pairs(runs: Sequence[Run]) -> dict[str, list[Pair]]:
    """Per estimator, over all steps with a known truth. "own ends" is known after the step only."""
    found: dict[str, list[Pair]] = {"scan": [], "meter": [], "two-ended": [], "own ends": []}
    for run in runs:
        for step, forecast in zip(run.steps, two_ended(run), strict=True):
            if step.truth:
                found["scan"].append(scan_pair(step))
                found["meter"].append(meter_pair(step))
                found["two-ended"].append(forecast_pair(step, forecast))
                found["own ends"].append(forecast_pair(step, own_ends(step)))
    return found


def agreement(found: Sequence[Pair], shortest: float, longest: float) -> dict[str, float]:
    """Over the determined steps.

    ``ratio``: percentiles of measured/true, and ``rank_correlation`` of the two, where the truth lies between the
    shortest and the longest multiple that it was evaluated at; outside of it only its side is known. ``side``: share
    of the steps where both say the same about being longer or shorter than break-even.
    """
    usable = [pair for pair in found if pair.determined and not math.isnan(pair.measured)]
    inside = [pair for pair in usable if shortest <= pair.true <= longest]
    agreeing = sum((pair.measured < 1) == (pair.true < 1) for pair in usable)
    ratios = torch.tensor([pair.measured / pair.true for pair in inside], dtype=torch.float64)
    return {"steps": len(found), "determined": len(usable), "inside": len(inside),
            "ratio": [quantile(ratios, percent / 100) for percent in PERCENTILES],
            "within_factor_2": ((ratios > 0.5) & (ratios < 2)).double().mean().item(),
            "rank_correlation": rank_correlation([pair.measured for pair in inside], [pair.true for pair in inside]),
            "side": agreeing / len(usable) if usable else math.nan}


def quantile(values: torch.Tensor, share: float) -> float:
    """The order statistic, so that infinities are allowed; NaN of nothing."""
    return values.sort().values[min(int(share * len(values)), len(values) - 1)].item() if len(values) else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; NaN below three pairs."""
    if len(x) < 3:
        return math.nan
    return torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1].item()


def _ranks(values: Sequence[float]) -> torch.Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    return (v[None] < v[:, None]).double().sum(1) + (v[None] == v[:, None]).double().sum(1) / 2
