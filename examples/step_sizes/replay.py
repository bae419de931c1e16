"""From the log of a run to its figures, through the public functions that a training loop would call.

The logged log-ratios stand in for the policy: a single number, the multiple of the update, is its only parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import rlvr_fast as rf
from rlvr_fast.step.directional_scores import DirectionalScores, directional_scores
from step_sizes.log import Evidence, RunLog, StepLog
from step_sizes.records import Reading, Run, Slope, Step
from step_sizes.training import EPSILON

SMOOTHING = 0.75
"""Of the step meter: a step is judged by about the four before it."""


class Replay:
    """Evidence in the place of policy and rollouts."""

    def __init__(self, evidence: Evidence):
        n = len(evidence.correct)
        self.rollouts = rf.Rollouts.from_packed(torch.zeros(n, dtype=torch.long), torch.arange(n + 1),
                                                evidence.correct.float(), torch.arange(n) // evidence.group_size)
        self.position, self.update = torch.zeros((), dtype=torch.float64), [torch.ones((), dtype=torch.float64)]
        log_ratios = evidence.log_ratios.double()
        self.before = torch.full((n,), -1 - log_ratios.max().clamp(min=0).item(), dtype=torch.float64)
        self.after = dict(zip(evidence.multiples, self.before + log_ratios, strict=True))

    def logp(self) -> torch.Tensor:
        """[R] log-probs, up to a constant, at the multiple that ``position`` is moved to."""
        return self.after[self.position.item()]

    def slope(self) -> Slope:
        measure = rf.measure_step(self.before, self.after[EPSILON], self.rollouts, logp_reverse=self.after[-EPSILON],
                                  in_sample=False)
        return Slope(measure.success_slope.item() / EPSILON, measure.success_slope_stderr.item() / EPSILON)

    def scan(self) -> rf.StepCurve:
        multiples = [multiple for multiple in self.after if multiple > EPSILON]
        return rf.scan_step(self.logp, [self.position], self.update, self.rollouts, multiples=multiples,
                            logp_before=self.before, in_sample=False)

    def scores(self, width: float) -> DirectionalScores:
        return directional_scores(self.logp, [self.position], self.update, self.rollouts, width=width,
                                  logp=self.before)


def replay(log: RunLog) -> Run:
    return Run(log.settings, log.steps[0].before, list(_steps(log)))


def _steps(log: RunLog) -> Iterator[Step]:
    if log.settings.guard != "off":
        for step in log.steps:
            yield Step.guarded(step.step, step.rate, step.norm, step.before, step.after, step.guard)
        return
    meter = rf.StepMeter(smoothing=SMOOTHING)
    for i, step in enumerate(log.steps):
        start, end = Replay(step.start), Replay(step.end)
        reading = None if i == 0 else meter.reading(length=step.norm)
        yield _step(step, start, end, reading)
        meter.end(end.rollouts, end.scores(1.0), length=step.norm)


def _step(step: StepLog, start: Replay, end: Replay, reading) -> Step:
    scan = start.scan()
    at_one = scan.multiples.index(1)
    known = Reading("undetermined", math.nan) if reading is None else Reading(reading.verdict, reading.break_even)
    return Step(step.step, step.rate, step.norm, step.before, step.after, step.truth, start.slope(), end.slope(),
                Reading(scan.verdict, scan.success_break_even.item()), scan.reason, scan.success_gain[at_one].item(),
                scan.success_gain_stderr[at_one].item(), known, step.guard)
