"""Running sums over prompts behind the step meter: additive across ranks and decaying over steps.

One row per bin of success rate and a last one for all prompts. Per prompt three figures are summed, all per unit of
length: the slope J′ = Σ(r_i − r̄)s_i/(G − 1), the curvature J″ = Σ(r_i − r̄)(s_i² + h_i)/(G − 1), and the mean slope
(J(θ) − J(θ − Δ))/length of the step just taken, by the ratio identity from where it ended. [derived] Numerators and
counts decay alike; covariances of the sums decay by the square and are centred step by step, so a drift of the truth
between steps does not count as noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.directional_scores import DirectionalScores
from rlvr_fast.step.measure import EFFECTIVE_COUNT, EFFECTIVE_SHARE
from rlvr_fast.step.statistics import Groups

FIGURES = ("slope", "curvature", "mean_slope")
COLUMNS = (*(f"n_{name}" for name in FIGURES), *FIGURES, "n_prompts", "success", "reward_variance")
TOTALS = ("responses", "correct", "incorrect", "ess_correct", "ess_incorrect", "ratio", "ratio_sq", "slope_sq",
          "length")


@dataclass(frozen=True, eq=False)
class StepSums:
    """first [n_bins + 1, COLUMNS], second [n_bins + 1, 3, 3], totals [TOTALS]; float64."""

    first: torch.Tensor
    second: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def raw(cls, rollouts: Rollouts, scores: DirectionalScores, length: float, n_bins: int) -> StepSums:
        """One batch, ``second`` not centred yet: what ranks add up."""
        groups = Groups(rollouts)
        rate, zero = groups.success_rate, groups.reward.new_zeros(groups.n_prompts)
        figures = [zero, zero, zero]
        if scores.slope is not None:
            figures[0] = groups.reward_covariance(scores.slope[:, None])[:, 0] / length
        if scores.slope is not None and scores.curvature is not None:
            second = (scores.slope ** 2 + scores.curvature)[:, None]
            figures[1] = groups.reward_covariance(second)[:, 0] / length ** 2
        behind = torch.zeros_like(groups.reward) if scores.behind is None else scores.behind
        if scores.behind is not None:
            figures[2] = -groups.controlled_gain(torch.expm1(behind.clamp(max=300))) / length
        known = [scores.slope is not None, scores.slope is not None and scores.curvature is not None,
                 scores.behind is not None]
        compared = groups.compared[:, None]
        values = torch.where(compared, torch.stack(figures, 1), 0.0)
        spread = rate * (1 - rate) * groups.size / (groups.size - 1)
        others = torch.where(compared, torch.stack([torch.ones_like(rate), rate, spread], 1), 0.0)
        counts = compared * torch.tensor(known, dtype=rate.dtype, device=rate.device)
        bins = torch.nn.functional.one_hot((rate * n_bins).nan_to_num(0.0).long().clamp(max=n_bins - 1), n_bins)
        member = torch.cat([bins.double(), torch.ones_like(rate)[:, None]], 1).T  # [n_bins + 1, P]

        classes, _ = groups.effective_sample_size(behind)
        ratio = behind.clamp(max=300).exp()
        slope_sq = rate.new_zeros(()) if scores.slope is None else (scores.slope / length).square().sum()
        totals = torch.stack([groups.size.sum(), *groups.n.sum(0).flip(0), *classes.sum(0).flip(0), ratio.sum(),
                              ratio.square().sum(), slope_sq, length * groups.size.sum()])
        return cls(member @ torch.cat([counts, values, others], 1),
                   torch.einsum("bp,pi,pj->bij", member, values, values), totals)

    def flat(self) -> torch.Tensor:
        return torch.cat([self.first.flatten(), self.second.flatten(), self.totals])

    def from_flat(self, flat: torch.Tensor) -> StepSums:
        """The same layout with other numbers."""
        parts = flat.split([self.first.numel(), self.second.numel(), self.totals.numel()])
        return StepSums(*(part.view_as(like) for part, like in zip(
            parts, (self.first, self.second, self.totals), strict=True)))

    def centred(self) -> StepSums:
        """``second`` as the covariance of the sums; without rows of one prompt, and without gains out of reach.

        Out of reach: effective share below 10 %, fewer than 10 effective responses, or a mean ratio outside 0.5 to 2.
        """
        count, totals = self.first[:, COLUMNS.index("n_prompts")], dict(zip(TOTALS, self.totals, strict=True))
        effective = totals["ratio"] ** 2 / totals["ratio_sq"]
        mean_ratio = totals["ratio"] / totals["responses"]
        reached = ((effective >= EFFECTIVE_SHARE * totals["responses"]) & (effective >= EFFECTIVE_COUNT)
                   & (mean_ratio > 0.5) & (mean_ratio < 2))
        usable = torch.cat([torch.ones(2, dtype=torch.bool, device=reached.device), reached[None]])
        enough = (count >= 2)[:, None]
        keep_row = torch.where(enough, self.first, 0.0)
        figures = torch.where(usable.repeat(2), keep_row[:, :6], 0.0)
        sums = self.first[:, 3:6]
        second = self.second - sums[:, :, None] * sums[:, None, :] / count[:, None, None]
        second = second * (count / (count - 1))[:, None, None]
        keep = enough[:, :, None] & (usable[:, None] & usable)
        return StepSums(torch.cat([figures, keep_row[:, 6:]], 1), torch.where(keep, second, 0.0), self.totals)

    def decayed(self, factor: float) -> StepSums:
        return StepSums(self.first * factor, self.second * factor ** 2, self.totals * factor)

    def plus(self, other: StepSums) -> StepSums:
        return StepSums(self.first + other.first, self.second + other.second, self.totals + other.totals)


class SumsRow:
    """One row of the sums on the host: means and their covariance, in multiples of ``unit``."""

    def __init__(self, sums: StepSums, unit: float, row: int = -1) -> None:
        first = dict(zip(COLUMNS, sums.first[row].tolist(), strict=True))
        self._totals = dict(zip(TOTALS, sums.totals.tolist(), strict=True))
        count = torch.tensor([first[f"n_{name}"] for name in FIGURES], dtype=torch.float64)
        scale = torch.tensor([unit, unit ** 2, unit], dtype=torch.float64)
        total = torch.tensor([first[name] for name in FIGURES], dtype=torch.float64)
        self._unit = unit
        self.mean = total / count * scale  # NaN for what was not measured
        self.covariance = sums.second[row].cpu() / count.outer(count) * scale.outer(scale)
        self.n_prompts = first["n_prompts"]
        self.success, self.reward_variance = (first[name] / self.n_prompts if self.n_prompts else math.nan
                                              for name in ("success", "reward_variance"))

    @property
    def length(self) -> float:
        return self._totals["length"] / self._totals["responses"] / self._unit

    @property
    def kl(self) -> float:
        return self._totals["slope_sq"] / self._totals["responses"] * (self._unit ** 2) / 2

    def total(self, name: str) -> float:
        return self._totals[name]

    @property
    def ess_fraction(self) -> float:
        return self._totals["ratio"] ** 2 / (self._totals["ratio_sq"] * self._totals["responses"])

    def scarcer(self, *names: str) -> float:
        return min(self._totals[name] for name in names)

    def known(self, name: str) -> bool:
        return math.isfinite(float(self.mean[FIGURES.index(name)]))

    def figure(self, name: str, factor: float = 1.0) -> tuple[float, float]:
        """Value and standard error."""
        i = FIGURES.index(name)
        if not self.known(name):
            return math.nan, math.nan
        return factor * float(self.mean[i]), factor * math.sqrt(max(0.0, float(self.covariance[i, i])))
