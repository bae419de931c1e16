"""What one update did to the success rate, from log-probs of rollouts already sampled: gain, peak and break-even.

The unit of step is the applied update Δ (multiple 1). Per response ℓ = Σ_t (logp_after − logp_before) and ρ = e^ℓ; with
the log-probs after the reversed update θ − Δ, s = (ℓ₊ − ℓ₋)/2 and h = ℓ₊ + ℓ₋ are the first two derivatives of log π
along Δ. Two kinds of figures follow, both meant for rollouts that had no part in the update:

* per prompt, on the log-odds f = logit J: differences between its correct and its incorrect responses;
* pooled over prompts, on the success rate J: slope and curvature by covariances with the reward,
  Σ(r_i − r̄)x_i/(G − 1), to which a prompt whose responses all share one class contributes the zero it measured; the
  gain by B + βZ below. A prompt with one response measures nothing and is left out.

Why B + βZ: A = Σ(r_i − r̄)ρ_i/(G − 1) and B = mean of r_i(ρ_i − 1) are both unbiased for J(after) − J(before). A is
better for short steps, B for long ones, and B + βZ, Z = A − B, with its best β better than either: on steps that lose
1.1 to 8 times less error than A (docs/simulate). β is taken from the other prompts, so there is no bias. The price is a
premise: E[ρ] = 1. If another policy than that of ``logp_before`` sampled, the gain is off by (1 − β)J(E[ρ] − 1); see
``mean_ratio``. The self-normalised mean shrinks every change by 1/G, and far out it reports a large gain with a small
error where the truth is a collapse. Below an effective share of 10 % no estimator could be trusted, which is what
``EFFECTIVE_SHARE`` guards; near J = 1 the few failures carry the gain, which is what ``CLASS_FLOOR`` guards.

Why the jackknife for the log-odds gain: one dominant ratio caps the delta method's error at 1 per class. At
Var ℓ = 1 with 4 + 4 responses its two-standard-error interval held 84 % of the truths, the jackknife's 88 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.statistics import Groups, log_ratios, quadratic_peak

EFFECTIVE_SHARE, EFFECTIVE_COUNT = 0.1, 10
"""Ratio estimates are not to be believed when the effective sample size is below this share of the responses or below
this many."""
CLASS_FLOOR = 30
"""Nor when the scarcer class has fewer effective responses than this, summed over prompts. Near J = 1 the error bar
does not know the failures that were not drawn: without a floor a losing step was called good in up to 44 % of draws."""


@dataclass(frozen=True, eq=False, repr=False)
class StepMeasure:
    """Effect of one update. [P] tensors are per prompt, the rest 0-dim; all float64 on the rollouts' device.

    A prompt without both classes has NaN in every [P] figure but the counts and the effective sample sizes; it enters
    the pooled slope and curvature as the zero it is, and the pooled gain as (1 − β)r̄(mean ρ − 1), noise of mean 0 that
    offsets the others'. Figures that need the reversed update are NaN without it.

    Attributes:
        n_correct, n_incorrect: [P] int64.
        log_odds_gain: [P] logit J(after) − logit J(before) = log mean⁺ρ − log mean⁻ρ, exact for any step [derived].
        stderr: [P] its standard error, jackknife over responses within each class; NaN if a class has one response. No
            error bar knows the responses that were never drawn: where rare ones carry the ratios it is too small.
        ess, ess_correct, ess_incorrect: [P] effective sample size (Σρ)²/Σρ² of all, correct, incorrect responses.
        alignment: [P] Δμ = mean⁺s − mean⁻s, slope of the log-odds at the start [paper A]. Without the reversed update s
            is ℓ itself, which includes half of log π's second derivative: an estimate to first order in Δ.
        alignment_stderr: [P] jackknife; needs two responses in each class.
        curvature: [P] f″ = Var⁺s − Var⁻s + mean⁺h − mean⁻h with unbiased variances [derived]; needs two in each class.
        curvature_stderr: [P] jackknife; needs three in each class.
        success_before: mean success rate J over prompts with at least two responses, as all pooled figures.
        success_gain, success_gain_stderr: J(after) − J(before), unbiased, and its standard error over prompts.
        success_after_stderr, success_log_odds_gain_stderr: standard errors over prompts of the properties of that name;
            that of the log-odds by the delta method.
        success_slope, success_curvature: J′ and J″ = E[r(s² + h)] along Δ [derived]; with standard errors over prompts.
        success_peak_stderr: jackknife over prompts.
        mean_ratio, mean_ratio_stderr: mean ρ. It is 1 when the rollouts come from the policy of ``logp_before`` and
            reach where the updated policy goes.
        ess_fraction: effective share (Σρ)²/(R Σρ²) of all R responses.
        in_sample: what the caller said: True if these rollouts built the update.
    """

    n_correct: torch.Tensor
    n_incorrect: torch.Tensor
    log_odds_gain: torch.Tensor
    stderr: torch.Tensor
    ess: torch.Tensor
    ess_correct: torch.Tensor
    ess_incorrect: torch.Tensor
    alignment: torch.Tensor
    alignment_stderr: torch.Tensor
    curvature: torch.Tensor
    curvature_stderr: torch.Tensor
    success_before: torch.Tensor
    success_gain: torch.Tensor
    success_gain_stderr: torch.Tensor
    success_after_stderr: torch.Tensor
    success_log_odds_gain_stderr: torch.Tensor
    success_slope: torch.Tensor
    success_slope_stderr: torch.Tensor
    success_curvature: torch.Tensor
    success_curvature_stderr: torch.Tensor
    success_peak_stderr: torch.Tensor
    mean_ratio: torch.Tensor
    mean_ratio_stderr: torch.Tensor
    ess_fraction: torch.Tensor
    in_sample: bool | None
    _notes: tuple[str, ...] = ()

    @property
    def defined(self) -> torch.Tensor:
        """[P] bool: both classes present."""
        return (self.n_correct > 0) & (self.n_incorrect > 0)

    @property
    def peak(self) -> torch.Tensor:
        """[P] Δμ/|f″|, the multiple at which the quadratic model of the log-odds is largest; NaN unless f″ < 0.

        Negative where the update points downhill from the start. Trust it near the start only: on the closed-form
        policy twice the peak over-states the true break-even by 2 % at J = 0.29, 20 % at J = 0.96 and 57 % at
        J = 0.9999, on the unsafe side, and farther from the optimum the model has no peak at all. ``scan_step`` checks.
        """
        return quadratic_peak(self.alignment, self.curvature)

    @property
    def break_even(self) -> torch.Tensor:
        """[P] 2Δμ/|f″|, where the quadratic model is back at zero; NaN unless f″ < 0."""
        return 2 * self.peak

    @property
    def success_after(self) -> torch.Tensor:
        """success_before + success_gain; unbiased, hence not clipped to [0, 1]."""
        return self.success_before + self.success_gain

    @property
    def success_log_odds_gain(self) -> torch.Tensor:
        """logit J(after) − logit J(before) of the pooled success rates; NaN where either estimate is not in (0, 1)."""
        return self.success_after.logit() - self.success_before.logit()

    @property
    def success_peak(self) -> torch.Tensor:
        """−J′/J″, the multiple at which the quadratic model of the success rate is largest; NaN unless J″ < 0."""
        return quadratic_peak(self.success_slope, self.success_curvature)

    @property
    def success_break_even(self) -> torch.Tensor:
        """−2J′/J″; NaN unless J″ < 0. Look at its error: with 512 rollouts it was 3 to 5 times too long at J = 0.24."""
        return 2 * self.success_peak

    @property
    def success_break_even_stderr(self) -> torch.Tensor:
        return 2 * self.success_peak_stderr

    @property
    def ess_total(self) -> torch.Tensor:
        """0-dim: effective sample size of the whole batch."""
        return self.ess_fraction * (self.n_correct + self.n_incorrect).sum()

    @property
    def ess_scarcer(self) -> torch.Tensor:
        """0-dim: effective sample size of the class that has less of it, summed over prompts."""
        return torch.minimum(self.ess_correct.sum(), self.ess_incorrect.sum())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to believe the figures, in plain language. Synchronises with the device."""
        found = list(self._notes)
        share, effective, scarcer, ratio, ratio_stderr, second, second_stderr, defined = torch.stack([
            self.ess_fraction, self.ess_total, self.ess_scarcer, self.mean_ratio, self.mean_ratio_stderr,
            self.success_curvature, self.success_curvature_stderr, self.defined.sum().double()]).tolist()
        if not defined:
            found.append("no prompt has both correct and incorrect responses: nothing was measured")
        if share < EFFECTIVE_SHARE or effective < EFFECTIVE_COUNT:
            found.append(f"effective sample size gone: the ratios leave {effective:.3g} responses, {share:.1%}; the "
                         "gain is not to be believed and a collapse cannot be seen")
        elif scarcer < CLASS_FLOOR:
            found.append(f"the scarcer class has only {scarcer:.3g} effective responses in all: the gain and its error "
                         "rest on them and know nothing of those that were not drawn")
        if abs(ratio - 1) > max(0.05, 0.0 if math.isnan(ratio_stderr) else 3 * ratio_stderr):
            found.append(f"mean ratio {ratio:.3g} is far from 1: the rollouts were not sampled from the policy of "
                         "logp_before, or the step left the region that they cover")
        if second >= 0:
            found.append("the success rate does not curve down along the update: its quadratic peak is undefined")
        elif second > -2 * second_stderr:
            found.append("the curvature of the success rate is within two standard errors of zero: its quadratic peak "
                         "and break-even say nothing")
        return tuple(found)

    def summary(self) -> dict[str, float]:
        """Flat floats for a logger, NaN where undefined; per-prompt figures as means over the prompts that have them.

        Synchronises with the device.
        """
        pooled = {name: getattr(self, name) for name in (
            "success_before", "success_after", "success_after_stderr", "success_gain", "success_gain_stderr",
            "success_log_odds_gain", "success_log_odds_gain_stderr", "success_slope", "success_slope_stderr",
            "success_curvature", "success_curvature_stderr", "success_peak", "success_peak_stderr",
            "success_break_even", "success_break_even_stderr", "mean_ratio", "mean_ratio_stderr", "ess_fraction")}
        averaged = {name: getattr(self, name).nanmean() for name in ("log_odds_gain", "alignment", "curvature")}
        figures = pooled | averaged | {"frac_defined": self.defined.double().mean()}
        values = torch.stack(list(figures.values())).tolist()
        return {f"rlvr/step/{name}": value for name, value in zip(figures, values, strict=True)}

    def __repr__(self) -> str:
        figures = {name.removeprefix("rlvr/step/"): value for name, value in self.summary().items()}
        rows = [f"{name:<20}{value:>11.4g}{_error(figures.get(f'{name}_stderr'))}"
                for name, value in figures.items() if not name.endswith("_stderr")]
        head = f"StepMeasure({self.n_correct.numel()} prompts, {int(self.defined.sum())} with both classes)"
        return "\n  ".join([head, *rows, *(f"! {warning}" for warning in self.warnings)])


def _error(stderr: float | None) -> str:
    return "" if stderr is None or math.isnan(stderr) else f" ± {stderr:.2g}"


@torch.no_grad()
def measure_step(logp_before: torch.Tensor, logp_after: torch.Tensor, rollouts: Rollouts, *,
                 logp_reverse: torch.Tensor | None = None, in_sample: bool | None = None,
                 backend: str = "auto") -> StepMeasure:
    """Measure what an update did, from the log-probs of the sampled tokens before and after it.

    Nothing here synchronises host and device; values of device tensors are therefore not checked, and a NaN among them
    shows as NaN in the result.

    Args:
        logp_before: [N] in rollout order or the rollouts' own layout ([B, T]); float32, float64, bfloat16 or float16.
            It must be the policy that sampled the rollouts.
        logp_after: the same, after the update.
        rollouts: the responses, with their rewards.
        logp_reverse: the same, after the reversed update θ − Δ. Gives curvature, peak and break-even.
        in_sample: True if these rollouts built the update. Alignment and gain then measure the update against its own
            noise: 1 to 6 times the truth, or of the wrong sign, in small experiments.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch" ("native" is the same here).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    if in_sample is not None and not isinstance(in_sample, bool):
        raise TypeError(f"in_sample must be True, False or None, got {check.describe(in_sample)}")
    sums = log_ratios(logp_before, logp_after, logp_reverse, rollouts, backend)
    l, groups = sums[:, 0], Groups(rollouts)
    nan = torch.full_like(l, math.nan)
    s, h = (l, nan) if logp_reverse is None else ((l - sums[:, 1]) / 2, l + sums[:, 1])

    log_mean_ratio, log_mean_ratio_variance = groups.log_mean_exp(l)
    ess_class, ess = groups.effective_sample_size(l)
    mean_s, variance_s = groups.mean(s), groups.variance(s)
    curvature, curvature_variance = groups.second_derivative_of_log_mean(s, h)

    ratio_change = torch.expm1(l.clamp(max=300))  # beyond e^300 nothing but the absence of overflow matters
    rate, ratio = groups.success_rate, 1 + groups.prompt_mean(ratio_change)
    slope, bend = groups.reward_covariance(torch.stack([s, s * s + h], 1)).unbind(1)
    gain = groups.controlled_gain(ratio_change)
    means, errors = groups.over_prompts(torch.stack([rate, gain, rate + gain, slope, bend, ratio], 1))
    success_before, success_gain, _, success_slope, success_curvature, mean_ratio = means.unbind()
    _, gain_stderr, after_stderr, slope_stderr, curvature_stderr, mean_ratio_stderr = errors.unbind()
    success_after = success_before + success_gain
    influence = ((rate + gain) / (success_after * (1 - success_after)).clamp(min=0)
                 - rate / (success_before * (1 - success_before)))

    return StepMeasure(
        n_correct=groups.n[:, 1].long(), n_incorrect=groups.n[:, 0].long(),
        log_odds_gain=log_mean_ratio.diff(dim=1).squeeze(1), stderr=log_mean_ratio_variance.sum(1).sqrt(),
        ess=ess, ess_correct=ess_class[:, 1], ess_incorrect=ess_class[:, 0],
        alignment=mean_s.diff(dim=1).squeeze(1), alignment_stderr=(variance_s / groups.n).sum(1).sqrt(),
        curvature=curvature.diff(dim=1).squeeze(1), curvature_stderr=curvature_variance.sum(1).sqrt(),
        success_before=success_before, success_gain=success_gain, success_gain_stderr=gain_stderr,
        success_after_stderr=after_stderr, success_log_odds_gain_stderr=groups.over_prompts(influence[:, None])[1][0],
        success_slope=success_slope, success_slope_stderr=slope_stderr,
        success_curvature=success_curvature, success_curvature_stderr=curvature_stderr,
        success_peak_stderr=groups.peak_stderr(slope, bend),
        mean_ratio=mean_ratio, mean_ratio_stderr=mean_ratio_stderr,
        ess_fraction=(2 * l.logsumexp(0) - (2 * l).logsumexp(0)).exp() / l.numel() if l.numel() else l.sum() * math.nan,
        in_sample=in_sample, _notes=_notes(in_sample, logp_before, logp_after, logp_reverse))


def _notes(in_sample: bool | None, *logps: torch.Tensor | None) -> tuple[str, ...]:
    """Warnings known from the arguments alone."""
    notes = []
    if in_sample:
        notes.append("in-sample: these rollouts built the update, so alignment and gain contain its own noise and "
                     "break-even is too long, typically by 2 times or more; measure on other rollouts")
    elif in_sample is None:
        notes.append("in_sample was not stated: if these rollouts built the update, alignment, gain and break-even are "
                     "too optimistic")
    if any(logp is not None and logp.dtype in (torch.bfloat16, torch.float16) for logp in logps):
        notes.append("log-probs in half precision: rounding alone changes the log-ratio of a long response by more "
                     "than a typical update does; compute and keep them in float32")
    return tuple(notes)
