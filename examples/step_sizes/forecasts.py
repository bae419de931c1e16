"""A forecast of each step from the slopes at the two ends of the steps before it, computed from their log alone.

Known before step k is applied: the slope J′ where it starts, from held-out rollouts, and how the steps before it bent,
from the slopes at both of their ends. With a step of length n, slope s at its start and e at its end, a parabola has
gain(m) = a·n·m + b·n²·m²/2 with a = Σs/Σn and b = Σ(e − s)/Σn², sums that forget by ``SMOOTHING`` per step. It takes
four forward passes a step and, unlike ``rf.StepMeter``, rollouts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlvr_fast.step.scan import crossing
from step_sizes.records import Run, Step
from step_sizes.replay import SMOOTHING

Z, MARGIN = 2.0, 2.0  # as rf.scan_step's


@dataclass(frozen=True)
class Forecast:
    """``slope`` and ``bend`` are the first two derivatives of the success rate along the step, per multiple of it."""

    slope: float
    slope_stderr: float
    bend: float
    bend_stderr: float

    def gain(self, multiple: float) -> tuple[float, float]:
        """Predicted change of the success rate by ``multiple`` times the step, and its standard error."""
        return (multiple * self.slope + multiple**2 / 2 * self.bend,
                math.hypot(multiple * self.slope_stderr, multiple**2 / 2 * self.bend_stderr))

    @property
    def break_even(self) -> float:
        """In multiples of the step; 0 where the step points downhill, inf where it does not bend down."""
        if self.slope <= 0:
            return 0.0
        return math.inf if self.bend >= 0 else -2 * self.slope / self.bend

    @property
    def fraction(self) -> float:
        """Length of the step in units of its break-even: 0 where it does not bend down, inf where it points downhill.
        """
        if math.isnan(self.break_even):
            return math.nan
        return 1 / self.break_even if self.break_even else math.inf

    @property
    def determined(self) -> bool:
        """The slope at the start or the gain is significant: without either a fraction is a ratio of noises."""
        gain, stderr = self.gain(1)
        return self.slope > Z * self.slope_stderr or abs(gain) > Z * stderr

    @property
    def verdict(self) -> str:
        """Like ``rf.StepCurve.verdict``."""
        (gain, stderr), (beyond, beyond_stderr) = self.gain(1), self.gain(MARGIN)
        if abs(gain) <= Z * stderr or math.isnan(gain):
            return "undetermined"
        if gain < 0:
            return "overshoot"
        return "safe" if beyond > Z * beyond_stderr else "near"


UNKNOWN = Forecast(math.nan, math.nan, math.nan, math.nan)


def two_ended(run: Run, smoothing: float = SMOOTHING) -> list[Forecast]:
    """One per step, from its start and the steps before it; all NaN for the first, whose bend nobody knows yet."""
    forecasts = []
    slope = slope_variance = length = 0.0
    bend = bend_variance = length_sq = 0.0
    for step in run.steps:
        slope = smoothing * slope + step.start.value
        slope_variance = smoothing**2 * slope_variance + step.start.stderr**2
        length = smoothing * length + step.norm
        unit = step.norm / length
        square = step.norm**2 / length_sq if length_sq else math.nan
        forecasts.append(Forecast(unit * slope, unit * math.sqrt(slope_variance),
                                  square * bend, square * math.sqrt(bend_variance)) if length_sq else UNKNOWN)
        bend = smoothing * bend + step.end.value - step.start.value
        bend_variance = smoothing**2 * bend_variance + step.end.stderr**2 + step.start.stderr**2
        length_sq = smoothing * length_sq + step.norm**2
    return forecasts


def own_ends(step: Step) -> Forecast:
    """The step judged by its own two ends: known once it was applied and sampled from."""
    return Forecast(step.start.value, step.start.stderr, step.end.value - step.start.value,
                    math.hypot(step.end.stderr, step.start.stderr))


def true_break_even(step: Step) -> float:
    """Where the exact success rate crosses its start, see ``rf.step_scan.crossing``; NaN where it was not evaluated.

    0 if it lies below the shortest multiple tried, inf if beyond the longest.
    """
    return break_even_between(step.truth | {1.0: step.after}, step.before) if step.truth else math.nan


def break_even_between(success: dict[float, float], before: float) -> float:
    """``success`` at some multiples of a step, ``before`` at none of it."""
    multiples, values = zip(*sorted(success.items()), strict=True)
    return crossing(multiples, torch.tensor(values, dtype=torch.float64) - before).item()


def shortest_and_longest(runs: Sequence[Run]) -> tuple[float, float]:
    """Of the multiples at which the truth is known."""
    multiples = [multiple for run in runs for step in run.steps for multiple in step.truth]
    return min(multiples), max(multiples)
