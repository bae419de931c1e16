"""Where the steps of a training loop stand on their curve, from the rollouts that the loop samples anyway.

The rollouts of iteration k + 1 are fresh samples of the policy in which step k ended, and had no part in it. Along the
update Δ of step k, two forward passes over them (``directional_scores``) give, all out of sample [derived]:

    J′(1) = E[r s], the slope at the end of the step;        J″(1) = E[r (s² + h)], the curvature there;
    J(1) − J(0) = −E[r (ρ − 1)], ρ = π_before/π_after, the gain of the step, exact while ρ leaves a sample.

A parabola through two of these has its peak and break-even (``step_fit``). At 64 prompts x 8 that was within 15 % of
the true break-even in the median for steps of 0.3 to 1.2 break-evens (docs/simulate, step_meter). A slope at the start
from held-out rollouts may be added; one from the rollouts that built the update is refused, being 1 to 6 times too
large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.bounds import theorem_step_bound, token_step_bound
from rlvr_fast.step.directional_scores import DirectionalScores
from rlvr_fast.step.fit import StepFit, curvature_row, fit_step, mean_slope_row, slope_row
from rlvr_fast.step.measure import CLASS_FLOOR
from rlvr_fast.step.reading import BinReading, PromptReading, StepReading
from rlvr_fast.step.sums import StepSums, SumsRow

NAN = math.nan


class StepMeter:
    """Running measurement of a loop's steps::

        meter = rf.StepMeter()
        for rollouts in ...:                                   # sampled from the policy as it is now
            if recorder.update is not None:                    # Δ of the last step, by rf.StepRecorder
                meter.end(rollouts, directional_scores(logp_fn, parameters, recorder.update, rollouts))
                print(meter.reading())
            loss(rollouts).backward()
            with recorder:
                optimizer.step()

    Args:
        smoothing: factor in [0, 1) by which sums decay from one end to the next; 0 keeps the last step alone, 0.8
            averages over about five. For steps that resemble each other; give ``length`` when their rate changes.
        z: standard errors of the intervals and thereby of the verdict.
        margin: a "safe" step has its break-even beyond this many of itself; at least 1. 2 is the peak of a parabola.
        departure: how far the curvature may change on the way to the peak; see ``step_fit``. At least 0.
        n_bins: bins of the success rate.
        class_floor: effective responses in the scarcer class below which only slopes are used; see ``CLASS_FLOOR``.
        allow_in_sample: take a start slope from the rollouts that built the update, and say so in every reading.
        reduce: for several ranks: called once per ``start`` and ``end`` with one flat float64 tensor, to add it up over
            the ranks in place, as ``torch.distributed.all_reduce`` does. Every rank must call it equally often and then
            reads the same; each holds prompts of its own (``PromptReading`` and the constants of the bounds are its
            rank's).
    """

    def __init__(self, *, smoothing: float = 0.0, z: float = 1.96, margin: float = 2.0, departure: float = 0.5,
                 n_bins: int = 5, class_floor: float = CLASS_FLOOR, allow_in_sample: bool = False,
                 reduce: Callable[[torch.Tensor], object] | None = None) -> None:
        self.smoothing, self.z = _within("smoothing", smoothing, 0, 1), check.positive("z", z)
        self.margin, self.departure = _within("margin", margin, 1), _within("departure", departure, 0)
        self.class_floor = _within("class_floor", class_floor, 0)
        if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
            raise ValueError(f"n_bins must be an int >= 1, got {check.describe(n_bins)}")
        if reduce is not None and not callable(reduce):
            raise TypeError(f"reduce must be callable, got {check.describe(reduce)}")
        self.n_bins, self.reduce = n_bins, reduce
        self.allow_in_sample = check.flag("allow_in_sample", allow_in_sample)
        self.reset()

    def reset(self) -> None:
        """Forget everything measured."""
        self._start: StepSums | None = None
        self._pending: StepSums | None = None
        self._end: StepSums | None = None
        self._length = 1.0
        self._in_sample = self._pending_in_sample = False
        self._prompts: PromptReading | None = None
        self._constants: tuple[torch.Tensor, ...] | None = None
        self._looked_back = False

    @torch.no_grad()
    def start(self, rollouts: Rollouts, scores: DirectionalScores, *, held_out: bool, length: float = 1.0) -> None:
        """The slope at the start of the step that is about to be taken; counts from the next ``end`` on.

        Args:
            rollouts: of the policy before the step.
            scores: along the update that is about to be applied; only ``slope`` is used.
            held_out: whether these rollouts had no part in the update. False is refused, or labelled as in-sample.
                Where rollouts are scarce, cross-fit: score half of the prompts along the update that the others make.
            length: of the step in your unit; 1 keeps everything in multiples of the step.
        """
        if not check.flag("held_out", held_out) and not self.allow_in_sample:
            raise ValueError("held_out must be True: along an update that these rollouts built the slope contains the "
                             "update's own noise, 1 to 6 times the truth; use other rollouts, or none, since the "
                             "end alone is enough (allow_in_sample=True labels it instead)")
        if scores.slope is None:
            raise ValueError("scores must have a slope for the start of a step, got none")
        self._pending = self._measure(rollouts, DirectionalScores(scores.slope), length)
        self._pending_in_sample = not held_out

    @torch.no_grad()
    def end(self, rollouts: Rollouts, scores: DirectionalScores, *, length: float = 1.0) -> None:
        """The end of the step just taken, from fresh rollouts of the policy that it led to. Synchronises nothing.

        Args:
            rollouts: of the policy after the step.
            scores: along the update that was applied. Slope and curvature, or slope and ``behind``, are enough for a
                reading; all three are best.
            length: of that step, in the unit of ``start``.
        """
        measured = self._measure(rollouts, scores, length)
        if self._end is not None:
            measured = self._end.decayed(self.smoothing).plus(measured)
        start = self._start.decayed(self.smoothing) if self._start is not None and self.smoothing else None
        if self._pending is not None:
            start = self._pending if start is None else start.plus(self._pending)
            self._in_sample = (self._in_sample and bool(self.smoothing)) or self._pending_in_sample
        elif start is None:
            self._in_sample = False
        self._start, self._pending, self._end, self._length = start, None, measured, float(length)
        self._prompts, self._constants = PromptReading.of(rollouts, scores), _constants(rollouts, scores)
        self._looked_back = scores.behind is not None

    def _measure(self, rollouts: Rollouts, scores: DirectionalScores, length: float) -> StepSums:
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts must be Rollouts, got {check.describe(rollouts)}")
        if not isinstance(scores, DirectionalScores):
            raise TypeError(f"scores must be DirectionalScores, got {check.describe(scores)}")
        for name in ("slope", "curvature", "behind"):
            if getattr(scores, name) is not None:
                check.tensor(f"scores.{name}", getattr(scores, name), shape=(rollouts.n_responses,),
                             device=rollouts.device)
        raw = StepSums.raw(rollouts, scores, check.positive("length", length), self.n_bins)
        if self.reduce is not None:
            flat = raw.flat()
            self.reduce(flat)
            raw = raw.from_flat(flat)
        return raw.centred()

    @torch.no_grad()
    def gain(self, rollouts: Rollouts, scores: DirectionalScores) -> tuple[float, float, bool]:
        """What leaving θ did to the success rate, its standard error, and whether the rollouts reach that far.

        Nothing of it is kept. ``scores.behind`` holds the log-ratios of the policy left for against that of the
        rollouts. NaN and True where no two prompts can be compared. Synchronises; over all ranks if the meter reduces.
        """
        if not isinstance(scores, DirectionalScores) or scores.behind is None:
            raise ValueError(f"scores must be DirectionalScores with behind, got {scores!r}")
        row = SumsRow(self._measure(rollouts, DirectionalScores(behind=scores.behind), 1.0), 1.0)
        value, stderr = row.figure("mean_slope")
        return -value, stderr, row.known("mean_slope") or row.n_prompts < 2

    # -- reading ------------------------------------------------------------------------------------------------------

    def reading(self, *, length: float | None = None) -> StepReading:
        """Everything so far, in multiples of the last step or of ``length``. Synchronises with the device.

        Raises:
            ValueError: before the first ``end``.
        """
        if self._end is None:
            raise ValueError("nothing was measured yet: reading needs an end")
        unit = self._length if length is None else check.positive("length", length)
        end, start = SumsRow(self._end, unit), None if self._start is None else SumsRow(self._start, unit)
        scarcer, reachable = end.scarcer("correct", "incorrect"), end.scarcer("ess_correct", "ess_incorrect")
        rows, names = [], []
        if end.known("slope"):
            rows, names = [slope_row(end.length)], [0]
        if end.known("curvature") and scarcer >= self.class_floor:
            rows, names = [*rows, curvature_row(end.length)], [*names, 1]
        if end.known("mean_slope") and min(scarcer, reachable) >= self.class_floor:
            rows, names = [*rows, mean_slope_row(end.length)], [*names, 2]
        values, covariance = end.mean[names], end.covariance[names][:, names]
        gone = self._looked_back and not end.known("mean_slope")
        if start is not None and start.known("slope"):
            rows = [slope_row(0.0), *rows]
            values = torch.cat([start.mean[:1], values])
            covariance = torch.block_diag(start.covariance[:1, :1], covariance)
            gone = False
        fit = fit_step(rows, values, covariance, self.departure) if rows else None
        if gone and fit is not None and not fit.coefficients[0] > 0 > fit.coefficients[1]:
            fit = None  # from its end alone, a step as long as that went downhill from the start
        realised = 2 in names
        verdict, reason = self._verdict(fit, end, realised, gone)
        theorem, token = self._bounds(fit, end, unit)
        peak = even = (NAN, NAN, NAN)
        if fit is not None:
            peak, even = ((c.value, c.low, c.high) for c in (fit.peak(self.z), fit.break_even(self.z)))
        gain, gain_stderr = (NAN, NAN) if fit is None else fit.evaluate(mean_slope_row(1.0))
        return StepReading(
            *peak, *even, gain, gain_stderr,
            *(end.figure("mean_slope", end.length) if realised else (NAN, NAN)),
            *((NAN, NAN) if start is None else start.figure("slope")), *end.figure("slope"), *end.figure("curvature"),
            success=end.success, kl=end.kl if end.known("slope") else NAN, n_prompts=end.n_prompts,
            n_responses=end.total("responses"), scarcer=min(scarcer, reachable),
            ess_fraction=end.ess_fraction if self._looked_back else NAN,
            theorem_bound=theorem, token_bound=token, verdict=verdict, reason=reason, in_sample=self._in_sample,
            bins=tuple(self._bin(self._end, i, unit) for i in range(self.n_bins)), prompts=self._prompts)

    def _verdict(self, fit: StepFit | None, end: SumsRow, realised: bool, gone: bool) -> tuple[str, str]:
        if end.n_prompts < 2:
            return "undetermined", "few prompts"
        if not end.reward_variance > 0:
            return "undetermined", "no contrast"
        if gone:  # so long that nothing remembers its start; past its peak at least, if its end slopes down
            slope, stderr = end.figure("slope")
            return "overshoot" if slope < -self.z * stderr else "undetermined", "sample gone"
        if fit is not None:
            crossing = fit.break_even(self.z)
            low, high = crossing.low, crossing.high
        elif realised:  # the gain alone tells its sign
            gain, stderr = end.figure("mean_slope", end.length)
            low, high = (1.0 if gain > self.z * stderr else 0.0), (0.0 if gain < -self.z * stderr else math.inf)
        else:
            scarce = end.scarcer("correct", "incorrect") < self.class_floor
            return "undetermined", "scarce class" if scarce else "one measurement"
        if high < 1:
            return "overshoot", ""
        if low >= 1:
            return ("undetermined", "in-sample") if self._in_sample else ("safe" if low >= self.margin else "near", "")
        return "undetermined", "within error"

    def _bounds(self, fit: StepFit | None, end: SumsRow, unit: float) -> tuple[float, float]:
        """Theorem 1 and the per-token bound on the line, an update of length 1 being one multiple."""
        if fit is None or self._constants is None or not end.reward_variance > 0:
            return NAN, NAN
        scale = unit / self._length
        score, lipschitz, token, token_lipschitz, length = (float(x) for x in self._constants)
        alignment = fit.evaluate(slope_row(0.0))[0] / end.reward_variance
        if not (score > 0 and token > 0):
            return NAN, NAN
        return (theorem_step_bound(alignment, score * scale, lipschitz * scale ** 2),
                token_step_bound(alignment, end.success, length, token * scale, token_lipschitz * scale ** 2))

    def _bin(self, end: StepSums, i: int, unit: float) -> BinReading:
        side = SumsRow(end, unit, row=i)
        slope, slope_stderr = side.figure("slope")
        bend, bend_stderr = side.figure("curvature")
        start = slope - bend * side.length if side.n_prompts else NAN
        peak = -start / bend if bend < 0 else NAN
        return BinReading(i / self.n_bins, (i + 1) / self.n_bins, side.n_prompts, side.success, slope, slope_stderr,
                          bend, bend_stderr, peak, 2 * peak)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What later readings depend on, but not the last batch's figures per prompt and its constants; on the CPU."""
        return {"version": 1, "n_bins": self.n_bins, "length": self._length, "in_sample": self._in_sample,
                "pending_in_sample": self._pending_in_sample, "looked_back": self._looked_back,
                **{name: None if sums is None else [x.cpu() for x in (sums.first, sums.second, sums.totals)]
                   for name, sums in (("start", self._start), ("pending", self._pending), ("end", self._end))}}

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device | str = "cpu") -> None:
        """Take over a ``state_dict``; ``device`` is that of the rollouts to come."""
        if not isinstance(state, dict) or state.get("version") != 1:
            raise ValueError(f"state must be a StepMeter.state_dict(), got {check.describe(state)}")
        if state["n_bins"] != self.n_bins:
            raise ValueError(f"state must have n_bins {self.n_bins} like this meter, got {state['n_bins']}")
        self.reset()
        sums = [None if state[name] is None else StepSums(*(x.to(device, copy=True) for x in state[name]))
                for name in ("start", "pending", "end")]
        self._start, self._pending, self._end = sums
        self._length, self._in_sample = float(state["length"]), bool(state["in_sample"])
        self._pending_in_sample, self._looked_back = bool(state["pending_in_sample"]), bool(state["looked_back"])

    def __repr__(self) -> str:
        return "StepMeter(nothing measured yet)" if self._end is None else f"StepMeter: {self.reading()}"


def _constants(rollouts: Rollouts, scores: DirectionalScores) -> tuple[torch.Tensor, ...] | None:
    """Largest |s| and |h| of a response and of a token, and the mean length."""
    parts = [part for part in (scores.slope, scores.curvature, scores.token_slope, scores.token_curvature)
             if part is not None]
    if len(parts) < 4 or not rollouts.n_tokens:
        return None
    largest = (part.abs().amax() for part in parts)
    return (*largest, rollouts.lengths.double().mean())


def _within(name: str, value: float, low: float, below: float = math.inf) -> float:
    number = check.real(name, value)
    if not low <= number < below:
        raise ValueError(f"{name} must be at least {low:g}{'' if below == math.inf else f' and below {below:g}'}, "
                         f"got {number:g}")
    return number
