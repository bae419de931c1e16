"""Try an update at several lengths on rollouts already sampled, and read off where it stops helping.

At every multiple m the policy θ + mΔ is scored by one forward pass: the log-odds gain log mean⁺ρ − log mean⁻ρ is exact
for any step [derived], so unlike the quadratic model it needs no derivatives and has no bias from the step's length.
What limits it is reach: the ratios of a long step rest on few responses, and beyond break-even usually on almost none.
The curve errs on the long, unsafe side there, so the verdict refuses to speak when the effective sample is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step_size import EFFECTIVE_COUNT, EFFECTIVE_SHARE, StepMeasure, measure_step


@dataclass(frozen=True, eq=False, repr=False)
class StepCurve:
    """Effect of M multiples of one update on P prompts. Tensors are float64 on the rollouts' device.

    Attributes:
        multiples: the M multiples of the update, increasing.
        measures: the full ``StepMeasure`` at each of them.
        z, margin, ess_floor: thresholds of ``verdict``, as given to ``scan_step``.
    """

    multiples: tuple[float, ...]
    measures: tuple[StepMeasure, ...]
    z: float
    margin: float
    ess_floor: float

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
    def verdict(self) -> str:
        """Judgement of the update as proposed (multiple 1) from the pooled gains. Synchronises with the device.

        * "overshoot": the gain is below zero by ``z`` standard errors: past break-even.
        * "safe": the gain is above zero by ``z`` standard errors at 1, and still so at the next scanned multiple of at
          least ``margin``. With margin 2 that puts the step before the peak, were the curve a parabola.
        * "near": the gain at 1 is above zero by ``z`` standard errors, but a break-even closer than ``margin`` is not
          excluded (the gain there is not significant, too few responses reach it, or it was not scanned).
        * "undetermined": the data cannot tell. The gain at 1 is within its error, or the rollouts do not reach that far
          (effective sample below ``ess_floor`` of the responses or below 10, mean ratio outside 0.5 to 2), or multiple
          1 was not scanned, or fewer than two prompts have two responses. In-sample gains prove nothing: with
          ``in_sample=True`` only "overshoot" and "undetermined" are given.
        """
        columns = (self.success_gain, self.success_gain_stderr, self.ess_fraction, self._stack("ess_total"),
                   self.mean_ratio)
        significance = {}
        for multiple, row in zip(self.multiples, torch.stack(columns, 1).tolist(), strict=True):
            gain, stderr, share, effective, ratio = row
            reached = share >= self.ess_floor and effective >= EFFECTIVE_COUNT and 0.5 < ratio < 2
            significance[multiple] = math.copysign(1, gain) if reached and abs(gain) > self.z * stderr else 0
        here = significance.get(1.0, 0)
        if here < 0:
            return "overshoot"
        if here == 0 or self.in_sample:
            return "undetermined"
        beyond = next((multiple for multiple in self.multiples if multiple >= self.margin), None)
        return "safe" if beyond is not None and significance[beyond] > 0 else "near"

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
        head = (f"StepCurve({len(self.measures[0].n_correct)} prompts, verdict {self.verdict}, "
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


@torch.no_grad()
def scan_step(logp_fn: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor],
              update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor],
              rollouts: Rollouts, *, multiples: Sequence[float] = (0.5, 1, 2, 4),
              logp_before: torch.Tensor | None = None, in_sample: bool | None = None, z: float = 2.0,
              margin: float = 2.0, ess_floor: float = EFFECTIVE_SHARE, backend: str = "auto") -> StepCurve:
    """Score θ + mΔ for several multiples m of an update, on the same rollouts.

    The parameters are overwritten in place while ``logp_fn`` runs and are always restored bit for bit, whatever it
    raises. That takes one copy of them: θ + mΔ − mΔ is not θ in floating point. Autograd sees the writes, so a graph
    recorded before the scan can no longer be run backward.

    Args:
        logp_fn: returns the log-probs of the rollouts' tokens under the current parameters, [N] or the rollouts'
            layout. It must be deterministic: no dropout, no new rollouts. Called without gradients, once per multiple.
        parameters: the distinct floating-point tensors to move.
        update: Δ, one tensor of the same shape for each parameter, on its device; or a dict {parameter: Δ} that has
            all of them, as ``propose`` returns it.
        rollouts: sampled from the policy at multiple 0, better not those that built the update.
        multiples: positive, strictly increasing.
        logp_before: log-probs at multiple 0; by default ``logp_fn`` is called for them. If given, they must come from
            the same computation, not from another engine.
        in_sample: True if these rollouts built the update.
        z: standard errors that make a gain or a loss significant for the verdict.
        margin: a "safe" step still gains at this multiple; at least 1.
        ess_floor: effective share of the responses below which a multiple counts as unknown, in [0, 1].
        backend: as for ``measure_step``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; whatever ``logp_fn`` raises.
    """
    if not callable(logp_fn):
        raise TypeError(f"logp_fn must be callable, got {check.describe(logp_fn)}")
    multiples = _multiples(multiples)
    parameters, update = _pairs(parameters, update)
    z, margin, ess_floor = check.positive("z", z), check.real("margin", margin), check.real("ess_floor", ess_floor)
    if margin < 1:
        raise ValueError(f"margin must be at least 1, got {margin:g}")
    if not 0 <= ess_floor <= 1:
        raise ValueError(f"ess_floor must be in [0, 1], got {ess_floor:g}")
    options = {"in_sample": in_sample, "backend": backend}
    if logp_before is None:
        logp_before = check.tensor("logp_fn()", logp_fn()).clone()  # logp_fn may return one buffer every time
    measure_step(logp_before, logp_before, rollouts, **options)  # refuses bad arguments before any parameter moves

    saved = [parameter.clone() for parameter in parameters]
    measures = []
    try:
        for multiple in multiples:
            for parameter, start, delta in zip(parameters, saved, update, strict=True):
                parameter.copy_(torch.add(start, delta, alpha=multiple))
            measures.append(measure_step(logp_before, check.tensor("logp_fn()", logp_fn()), rollouts, **options))
    finally:
        for parameter, start in zip(parameters, saved, strict=True):
            parameter.copy_(start)
    return StepCurve(multiples, tuple(measures), z, margin, ess_floor)


def _multiples(multiples: Sequence[float]) -> tuple[float, ...]:
    if isinstance(multiples, str | bytes) or not isinstance(multiples, Iterable):
        raise TypeError(f"multiples must be a sequence of numbers, got {check.describe(multiples)}")
    checked = tuple(check.positive("multiples", multiple) for multiple in multiples)
    if not checked or any(later <= earlier for earlier, later in pairwise(checked)):
        raise ValueError(f"multiples must be strictly increasing and not empty, got {check.describe(checked)}")
    return checked


def _pairs(parameters: Iterable[torch.Tensor], update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor]
           ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    for name, value in (("parameters", parameters), ("update", update)):
        if isinstance(value, torch.Tensor) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a sequence of tensors, got {check.describe(value)}")
    parameters = tuple(parameters)
    if isinstance(update, Mapping):
        missing = [i for i, parameter in enumerate(parameters) if parameter not in update]
        if missing:
            raise ValueError(f"update must have a tensor for every parameter, got none for parameters[{missing[0]}]")
        update = tuple(update[parameter] for parameter in parameters)
    update = tuple(update)
    if not parameters or len(parameters) != len(update):
        raise ValueError("parameters and update must hold the same number of tensors, at least one, "
                         f"got {len(parameters)} and {len(update)}")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("parameters must be distinct tensors, got one twice")
    for i, (parameter, delta) in enumerate(zip(parameters, update, strict=True)):
        check.tensor(f"parameters[{i}]", parameter)
        check.tensor(f"update[{i}]", delta, shape=tuple(parameter.shape), device=parameter.device)
        for name, value in ((f"parameters[{i}]", parameter), (f"update[{i}]", delta)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {check.describe(value)}")
        if delta.device.type == "cpu" and not delta.isfinite().all():
            raise ValueError(f"update[{i}] must be finite, got {check.describe(delta)} with NaN or infinite entries")
    return parameters, update
