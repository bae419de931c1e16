"""What is known about the steps of a run, in a form compact enough to be kept with the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from step_sizes.settings import RunSettings


class Slope(NamedTuple):
    """Derivative of the success rate along an update, per multiple of it, with its standard error."""

    value: float
    stderr: float


class Reading(NamedTuple):
    """A verdict on a step before it was applied, and its break-even in multiples of it.

    Break-even is 0 where no multiple that was tried helps, inf where it lies beyond them, NaN where nothing is known.
    """

    verdict: str
    break_even: float


@dataclass(frozen=True)
class Step:
    """One step. All but ``after``, ``truth`` and ``end`` was known before the update was applied.

    Attributes:
        rate, norm: learning rate of the step and Euclidean norm of its update.
        before, after: exact success rate of the held-out problems.
        truth: {multiple: the same there}; empty where it was not evaluated.
        start: slope where the update starts, from held-out rollouts.
        end: slope where it ended, from the next training batch.
        scan: ``rf.scan_step`` on held-out rollouts; with the reason of an undetermined verdict, and the predicted
            change of the success rate by the step.
        meter: ``rf.StepMeter`` on the training batches up to the one that built the update, none held out.
        guard: the guard's metrics. A run with a guard has these and the success rates, the rest is NaN.
    """

    step: int
    rate: float
    norm: float
    before: float
    after: float
    truth: dict[float, float]
    start: Slope
    end: Slope
    scan: Reading
    scan_reason: str
    gain: float
    gain_stderr: float
    meter: Reading
    guard: dict[str, float]

    @classmethod
    def guarded(cls, step: int, rate: float, norm: float, before: float, after: float, guard: dict[str, float]) -> Step:
        slope, reading, nan = Slope(math.nan, math.nan), Reading("undetermined", math.nan), math.nan
        return cls(step, rate, norm, before, after, {}, slope, slope, reading, "", nan, nan, reading, guard)


@dataclass(frozen=True)
class Run:
    """All steps of one run; ``start`` is its exact success rate before the first."""

    settings: RunSettings
    start: float
    steps: Sequence[Step]
