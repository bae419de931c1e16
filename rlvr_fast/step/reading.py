"""What the step meter reads off: peak and break-even of the update with their intervals, and a verdict on it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch

from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.directional_scores import DirectionalScores
from rlvr_fast.step.statistics import Groups

VERDICT_CODES = {"overshoot": -1.0, "undetermined": 0.0, "near": 1.0, "safe": 2.0}


@dataclass(frozen=True)
class BinReading:
    """Prompts whose measured success rate is in [low, high), the last bin also those at 1.

    Slope and curvature of the success rate at the end of the step, mean over the bin's prompts, with standard errors;
    peak and break-even of the parabola through them, in multiples of the step from where it started; NaN unless it
    bends down. NaN where fewer than two prompts are in the bin.
    """

    low: float
    high: float
    n_prompts: float
    success: float
    end_slope: float
    end_slope_stderr: float
    curvature: float
    curvature_stderr: float
    peak: float
    break_even: float


@dataclass(frozen=True, eq=False, repr=False)
class PromptReading:
    """Each prompt of the last end batch; [P] float64, NaN where a class is too small, as in ``StepMeasure``.

    Attributes:
        success_rate: mean reward.
        alignment, alignment_stderr: Δμ = mean⁺s − mean⁻s, slope of the log-odds at the end of the step [paper A].
        curvature, curvature_stderr: f″ of the log-odds there [derived].
        peak: 1 + Δμ/|f″| in multiples of the step from where it started; NaN unless f″ < 0. A few responses give it
            little more than a sign.
    """

    success_rate: torch.Tensor
    alignment: torch.Tensor
    alignment_stderr: torch.Tensor
    curvature: torch.Tensor
    curvature_stderr: torch.Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, scores: DirectionalScores) -> PromptReading | None:
        """None without a slope."""
        if scores.slope is None:
            return None
        groups = Groups(rollouts)
        mean, variance = groups.mean(scores.slope), groups.variance(scores.slope)
        bend = torch.full_like(scores.slope, math.nan) if scores.curvature is None else scores.curvature
        curvature, curvature_variance = groups.second_derivative_of_log_mean(scores.slope, bend)
        return cls(groups.success_rate, mean.diff(dim=1).squeeze(1), (variance / groups.n).sum(1).sqrt(),
                   curvature.diff(dim=1).squeeze(1), curvature_variance.sum(1).sqrt())

    @property
    def peak(self) -> torch.Tensor:
        return torch.where(self.curvature < 0, 1 - self.alignment / self.curvature, math.nan)

    def __repr__(self) -> str:
        return (f"PromptReading({self.success_rate.numel()} prompts, "
                f"{int(self.alignment.isfinite().sum())} with both classes)")


@dataclass(frozen=True, repr=False)
class StepReading:
    """The success rate along the last update, from where it started (multiple 0) past where it ended (1). Floats.

    Attributes:
        peak, peak_low, peak_high: multiple at which success is highest, with its interval (95 % for z = 1.96).
        break_even, break_even_low, break_even_high: multiple at which it is back where it started. Both intervals
            contain what the data do not exclude (Fieller): the lower end is the last multiple up to which the slope
            (the gain) is significantly positive, the upper end the first at which it is significantly negative, inf
            where there is none. 0: no multiple helps. NaN: fewer than two kinds of measurement, see ``reason``.
        gain, gain_stderr: J(1) − J(0) of the step by the fitted curve.
        realised_gain, realised_gain_stderr: the same by the ratio identity alone, exact for any step that the fresh
            rollouts still reach back over; NaN where they do not or where it was not measured.
        start_slope, end_slope, curvature (at the end), each with its _stderr: as measured, NaN where not.
        success: mean success rate at the end of the step.
        kl: ½E[s²], the KL divergence of the step to leading order.
        n_prompts, n_responses: behind the end measurement; sums that decay when smoothing.
        ess_fraction: effective share of the responses in the realised gain.
        scarcer: effective responses of the scarcer class. Below the class floor neither curvature nor realised gain is
            used: their errors do not know of the responses that were not drawn.
        theorem_bound, token_bound: ``theorem_step_bound`` and ``token_step_bound`` along this line, in multiples. Their
            constants are *estimates*, the largest |s| and |h| among the last batch's responses and tokens: these bounds
            show the theory's scale and certify nothing. NaN without curvature or where no start slope is known.
        verdict: "overshoot": break-even is below 1 with confidence, the step lost. "safe": it is above ``margin``.
            "near": it is above 1. "undetermined" with a ``reason``: "few prompts", "no contrast" (no prompt has both
            classes), "scarce class", "one measurement", "within error", "in-sample". "sample gone": the rollouts do
            not reach back over the step; it is then called an overshoot if its end slope is significantly negative,
            peak and break-even are those of the parabola at its end (NaN where that has no peak after the start), and
            past the true break-even they are too short.
        in_sample: a start slope from the rollouts that built the update had a part in this.
        bins, prompts: the same by success rate, and per prompt.
    """

    peak: float
    peak_low: float
    peak_high: float
    break_even: float
    break_even_low: float
    break_even_high: float
    gain: float
    gain_stderr: float
    realised_gain: float
    realised_gain_stderr: float
    start_slope: float
    start_slope_stderr: float
    end_slope: float
    end_slope_stderr: float
    curvature: float
    curvature_stderr: float
    success: float
    kl: float
    n_prompts: float
    n_responses: float
    ess_fraction: float
    scarcer: float
    theorem_bound: float
    token_bound: float
    verdict: str
    reason: str
    in_sample: bool
    bins: tuple[BinReading, ...] = ()
    prompts: PromptReading | None = None

    def summary(self) -> dict[str, float]:
        """Flat floats for a logger, NaN and inf as they are; the verdict by ``VERDICT_CODES``."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)
                   if isinstance(getattr(self, field.name), float)}
        figures["verdict_code"] = VERDICT_CODES[self.verdict]
        for row in self.bins:
            label = f"bin_{row.low:.2g}_{row.high:.2g}"
            figures |= {f"{label}/{name}": value for name, value in asdict(row).items() if name not in ("low", "high")}
        return {f"rlvr/step/meter/{name}": value for name, value in figures.items()}

    def __repr__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        lines = [f"StepReading(verdict {self.verdict}{reason}, {self.n_prompts:.4g} prompts, success {self.success:.3g}"
                 f"{', IN-SAMPLE start' if self.in_sample else ''})"]
        for name in ("peak", "break_even"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            lines.append(f"{name:<16}{getattr(self, name):>10.3g}  [{low:.3g}, {high:.3g}] multiples of the step")
        for name in ("gain", "realised_gain", "start_slope", "end_slope", "curvature"):
            lines.append(f"{name:<16}{getattr(self, name):>+10.3g} ± {getattr(self, f'{name}_stderr'):.2g}")
        lines.append(f"{'bounds':<16}{self.theorem_bound:>10.2g} (theorem 1), {self.token_bound:.2g} (per token), "
                     "their constants estimated")
        lines += [f"{f'J {row.low:.2g} to {row.high:.2g}':<16}{row.end_slope:>+10.3g} ± {row.end_slope_stderr:.2g} end "
                  f"slope, peak {row.peak:.3g}, {row.n_prompts:.4g} prompts" for row in self.bins]
        return "\n  ".join(lines)
