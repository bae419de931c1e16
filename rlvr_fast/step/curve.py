"""What a scan of an update found: gains at several multiples of it, the break-even between them, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlvr_fast.step.measure import EFFECTIVE_COUNT, StepMeasure


@dataclass(frozen=True, eq=False, repr=False)
class StepCurve:
    """Effect of M multiples of one update on P prompts. Tensors are float64 on the rollouts' device.

    Attributes:
        multiples: the M multiples of the update, increasing.
        measures: the full ``StepMeasure`` at each of them.
        z, margin, ess_floor, class_floor: thresholds of ``verdict``, as given to ``scan_step``.
    """

    multiples: tuple[float, ...]
    measures: tuple[StepMeasure, ...]
    z: float
    margin: float
    ess_floor: float
    class_floor: float

    @property
    def log_odds_gain(self) -> torch.Tensor:
        """[M, P] exact gain of the log-odds; NaN for a prompt without both classes."""
        return self._stack("log_odds_gain")

    @property
    def stderr(self) -> torch.Tensor:
        """[M, P] standard error of ``log_odds_gain``."""
        return self._stack("stderr")

    @property
    def ess(self) -> torch.Tensor:
        """[M, P] effective sample size of each prompt."""
        return self._stack("ess")

    @property
    def ess_fraction(self) -> torch.Tensor:
        """[M] effective share of all responses."""
        return self._stack("ess_fraction")

    @property
    def mean_ratio(self) -> torch.Tensor:
        """[M] mean ρ: 1 as long as the rollouts reach where θ + mΔ goes."""
        return self._stack("mean_ratio")

    @property
    def success_before(self) -> torch.Tensor:
        """0-dim: success rate at multiple 0."""
        return self.measures[0].success_before

    @property
    def success(self) -> torch.Tensor:
        """[M] success rate, mean over prompts; unbiased, hence not clipped to [0, 1]."""
        return self._stack("success_after")

    @property
    def success_stderr(self) -> torch.Tensor:
        """[M] standard error of ``success`` over prompts."""
        return self._stack("success_after_stderr")

    @property
    def success_gain(self) -> torch.Tensor:
        """[M] success minus success before."""
        return self._stack("success_gain")

    @property
    def success_gain_stderr(self) -> torch.Tensor:
        """[M] standard error of the gain over prompts; far smaller than that of the level."""
        return self._stack("success_gain_stderr")

    @property
    def break_even(self) -> torch.Tensor:
        """[P] multiple at which each prompt's log-odds are back where they were; see ``crossing``."""
        return crossing(self.multiples, self.log_odds_gain)

    @property
    def success_break_even(self) -> torch.Tensor:
        """0-dim: multiple at which the success rate is back where it was; see ``crossing``."""
        return crossing(self.multiples, self.success_gain)

    @property
    def in_sample(self) -> bool | None:
        return self.measures[0].in_sample

    @property
    def reach(self) -> float:
        """The longest scanned multiple up to which the rollouts reach, whatever the gain; 0 where none does.

        Reached: effective sample at least ``ess_floor`` of the responses, 10 in all and ``class_floor`` in the scarcer
        class, mean ratio between 0.5 and 2. Synchronises with the device.
        """
        reached = 0.0
        for multiple, (lacking, _) in zip(self.multiples, self._findings(), strict=True):
            if lacking:
                break
            reached = multiple
        return reached

    @property
    def verdict(self) -> str:
        """Judgement of the update as proposed (multiple 1) from the pooled gains. Synchronises with the device.

        * "overshoot": the gain is below zero by ``z`` standard errors: past break-even.
        * "safe": the gain is above zero by ``z`` standard errors at 1, and still so at the next scanned multiple of at
          least ``margin``. With margin 2 that puts the step before the peak, were the curve a parabola.
        * "near": the gain at 1 is above zero by ``z`` standard errors, but a break-even closer than ``margin`` is not
          excluded (the gain there is not significant, too few responses reach it, or it was not scanned).
        * "undetermined": the data cannot tell; ``reason`` says why. In-sample gains prove nothing: with
          ``in_sample=True`` only "overshoot" and "undetermined" are given.
        """
        return self._judgement()[0]

    @property
    def reason(self) -> str:
        """Why the verdict is "undetermined"; "" where it is not. Synchronises with the device.

        * "not scanned": multiple 1 was not among the multiples.
        * "few prompts": fewer than two prompts have two responses.
        * "sample gone": effective sample below ``ess_floor`` of the responses or below 10. The step leaves what the
          rollouts know of, which says that it is long, not that it is good.
        * "mean ratio": it is outside 0.5 to 2: the same, or another policy sampled the rollouts.
        * "scarce class": fewer than ``class_floor`` effective responses in the scarcer class. More rollouts of the same
          step decide.
        * "within error": the rollouts reach the step, its gain is within ``z`` standard errors of zero.
        * "in-sample": a gain, of rollouts that built the update.
        """
        return self._judgement()[1]

    def _judgement(self) -> tuple[str, str]:
        found = dict(zip(self.multiples, self._findings(), strict=True))
        lacking, sign = found.get(1.0, ("not scanned", 0))
        if lacking or not sign:
            return "undetermined", lacking or "within error"
        if sign < 0:
            return "overshoot", ""
        if self.in_sample:
            return "undetermined", "in-sample"
        beyond = next((found[multiple] for multiple in self.multiples if multiple >= self.margin), None)
        return ("safe" if beyond == ("", 1) else "near"), ""

    def _findings(self) -> list[tuple[str, int]]:
        """At each multiple: what is lacking to judge it, "" if nothing, and the sign of a significant gain, else 0."""
        columns = torch.stack([self.success_gain, self.success_gain_stderr, self.ess_fraction, self._stack("ess_total"),
                               self._stack("ess_scarcer"), self.mean_ratio], 1)
        findings = []
        for gain, stderr, share, effective, scarcer, ratio in columns.tolist():
            if math.isnan(stderr):
                lacking = "few prompts"
            elif not (share >= self.ess_floor and effective >= EFFECTIVE_COUNT):
                lacking = "sample gone"
            elif not 0.5 < ratio < 2:
                lacking = "mean ratio"
            else:
                lacking = "" if scarcer >= self.class_floor else "scarce class"
            findings.append((lacking, (gain > 0) - (gain < 0) if abs(gain) > self.z * stderr else 0))
        return findings

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to believe the curve, each with the multiples that it concerns. Synchronises with the device."""
        concerned: dict[str, list[float]] = {}
        for multiple, measure in zip(self.multiples, self.measures, strict=True):
            for warning in measure.warnings:
                concerned.setdefault(warning, []).append(multiple)
        return tuple(warning if len(where) == len(self.multiples) else
                     f"at {', '.join(f'{multiple:g}' for multiple in where)}: {warning}"
                     for warning, where in concerned.items())

    def summary(self) -> dict[str, float]:
        """Flat floats for a logger: the pooled curve by multiple, and the pooled break-even. Synchronises."""
        columns = ("success", "success_stderr", "success_gain", "success_gain_stderr", "ess_fraction")
        table = torch.stack([getattr(self, name) for name in columns], 1).tolist()
        figures = {f"rlvr/step/scan/{name}/x{multiple:g}": value
                   for multiple, row in zip(self.multiples, table, strict=True)
                   for name, value in zip(columns, row, strict=True)}
        ends = torch.stack([self.success_before, self.success_break_even]).tolist()
        return figures | dict(zip(("rlvr/step/scan/success_before", "rlvr/step/scan/break_even"), ends, strict=True))

    def __repr__(self) -> str:
        figures = self.summary()
        verdict, reason = self._judgement()
        head = (f"StepCurve({len(self.measures[0].n_correct)} prompts, verdict {verdict}{reason and f' ({reason})'}, "
                f"break-even {figures['rlvr/step/scan/break_even']:.3g})")
        rows = [f"{'multiple':>8}  {'success':>8}  {'gain ± stderr':>20}  {'effective':>9}"]
        for multiple in self.multiples:
            success, gain, error, share = (figures[f"rlvr/step/scan/{name}/x{multiple:g}"] for name in (
                "success", "success_gain", "success_gain_stderr", "ess_fraction"))
            rows.append(f"{multiple:>8g}  {success:>8.4g}  {gain:>+10.3g} ± {error:<7.2g}  {share:>9.1%}")
        return "\n  ".join([head, *rows, *(f"! {warning}" for warning in self.warnings)])

    def _stack(self, name: str) -> torch.Tensor:
        return torch.stack([getattr(measure, name) for measure in self.measures])


def crossing(multiples: Sequence[float], gain: torch.Tensor) -> torch.Tensor:
    """[M, ...] gains at increasing multiples -> [...]: where the gain first falls below zero, being zero at multiple 0.

    Interpolates gain/multiple, the mean slope so far, which is a straight line for a parabola through the origin: the
    answer is then exact. 0 where the first multiple already loses: no scanned multiple helps. +inf where none loses:
    break-even lies beyond the largest multiple. NaN where the gain is NaN.
    """
    m = torch.tensor(multiples, dtype=gain.dtype, device=gain.device)
    slope = gain / m.view(-1, *[1] * (gain.ndim - 1))
    lost = gain < 0
    last = lost.to(torch.int8).argmax(0, keepdim=True)  # the first multiple that loses
    previous = (last - 1).clamp(min=0)
    after, before = slope.gather(0, last), slope.gather(0, previous)
    where = m[previous] + (m[last] - m[previous]) * before / (before - after)
    where = torch.where(last == 0, 0.0, where)[0]
    where = torch.where(lost.any(0), where, math.inf)
    return torch.where(gain.isnan().any(0), math.nan, where)
