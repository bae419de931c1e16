"""Step-size quantities in float64, one short function each: the specification of step_size, step_scan and step_bounds.

One prompt at a time. ``l`` [G] is the log-ratio log π_after(o) − log π_before(o) of each response, ``s`` [G] and
``h`` [G] are its first and second derivative along the update at the start, ``correct`` [G] is bool. Where a function
takes ``probability`` [G], the responses are an enumeration and the result is the exact expectation under those
probabilities; without it they are a sample and the result is the estimate from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

Tensor = torch.Tensor

__all__ = [
    "class_jackknife", "controlled_gains", "effective_sample_size", "jackknife", "log_odds_gain", "log_ratios",
    "step_alignment", "step_break_even", "step_curvature", "step_peak", "success_curvature", "success_gain",
    "success_log_odds_gain", "success_slope", "theorem_step_bound", "token_step_bound",
]


# -- moments ----------------------------------------------------------------------------------------------------------


def mean(x: Tensor, probability: Tensor | None = None) -> Tensor:
    """E[x]."""
    x = x.double()
    return x.mean() if probability is None else (probability * x).sum() / probability.sum()


def variance(x: Tensor, probability: Tensor | None = None) -> Tensor:
    """Var[x]: exact under the given probabilities, else the unbiased estimate Σ(x − x̄)²/(n − 1)."""
    squares = (x.double() - mean(x, probability)) ** 2
    return squares.sum() / (len(x) - 1) if probability is None else mean(squares, probability)


def class_difference(statistic: Callable[..., Tensor], correct: Tensor, *samples: Tensor,
                     probability: Tensor | None = None) -> Tensor:
    """statistic(correct responses) − statistic(incorrect responses)."""
    def of(chosen: Tensor) -> Tensor:
        weights = None if probability is None else probability[chosen]
        return statistic(*(x[chosen] for x in samples), probability=weights)
    return of(correct) - of(~correct)


# -- one prompt -------------------------------------------------------------------------------------------------------


def log_ratios(logp_before: Tensor, logp_after: Tensor, cu_seqlens: Tensor) -> Tensor:
    """ℓ_i = Σ_t (log π_after(o_t) − log π_before(o_t)): [N], [N], [R+1] -> [R]."""
    change = logp_after.double() - logp_before.double()
    sums = [change[start:stop].sum() for start, stop in pairwise(cu_seqlens.tolist())]
    return torch.stack(sums) if sums else change.new_zeros(0)


def log_mean_ratio(l: Tensor, probability: Tensor | None = None) -> Tensor:
    """log E[ρ] with ρ = exp(ℓ), the largest ratio held out of the exponential."""
    largest = l.double().max()
    return largest + mean((l.double() - largest).exp(), probability).log()


def log_odds_gain(l: Tensor, correct: Tensor, probability: Tensor | None = None) -> Tensor:
    """logit J(after) − logit J(before) = log E⁺[ρ] − log E⁻[ρ], exact for any step. [derived]"""
    return class_difference(log_mean_ratio, correct, l, probability=probability)


def effective_sample_size(l: Tensor) -> Tensor:
    """(Σρ)² / Σρ²."""
    ratio = (l.double() - l.double().max()).exp()
    return ratio.sum() ** 2 / (ratio ** 2).sum()


def step_alignment(s: Tensor, correct: Tensor, probability: Tensor | None = None) -> Tensor:
    """Δμ = f′ = E⁺s − E⁻s, the gap alignment [paper A]; f = logit J."""
    return class_difference(mean, correct, s, probability=probability)


def step_curvature(s: Tensor, h: Tensor, correct: Tensor, probability: Tensor | None = None) -> Tensor:
    """f″ = Var⁺s − Var⁻s + E⁺h − E⁻h. [derived]"""
    def second_derivative_of_log_mean(s: Tensor, h: Tensor, probability: Tensor | None) -> Tensor:
        return variance(s, probability) + mean(h, probability)
    return class_difference(second_derivative_of_log_mean, correct, s, h, probability=probability)


def step_peak(slope: float, second: float) -> float:
    """−slope/second where second < 0: the maximum of the quadratic slope·η + second·η²/2; NaN where it has none."""
    return -slope / second if second < 0 else math.nan


def step_break_even(slope: float, second: float) -> float:
    """Where that quadratic is back at zero: twice the peak."""
    return 2 * step_peak(slope, second)


# -- success rate: covariances with the reward, unbiased also over the draw of how many responses are correct ---------


def reward_covariance(x: Tensor, correct: Tensor) -> Tensor:
    """Σ (r_i − r̄) x_i / (G − 1), the unbiased estimate of E[r x] − E[r] E[x]."""
    reward = correct.double()
    return ((reward - reward.mean()) * x.double()).sum() / (len(x) - 1)


def success_gain(l: Tensor, correct: Tensor) -> Tensor:
    """J(after) − J(before) = E[ρ r] − E[ρ] E[r], as E[ρ] = 1. [derived]"""
    return reward_covariance(l.double().exp(), correct)


def controlled_gains(groups: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[P] B + βZ of each prompt, from its (ℓ, correct); groups of two responses or more. [derived]

    B = mean of r(ρ − 1), A = Σ(r − r̄)(ρ − 1)/(G − 1), Z = A − B, which has mean 0 as E[ρ] = 1. β = −Cov(B, Z)/Var(Z),
    covariances of the means as estimated within each of the other prompts, kept in [0, 1]; 1 where these have no Z.
    """
    b, z, covariance = [], [], []
    for l, correct in groups:
        size, reward, change = len(l), correct.double(), l.double().exp() - 1
        b_i = reward * change
        z_i = size / (size - 1) * (reward - reward.mean()) * change - b_i
        b.append(b_i.mean())
        z.append(z_i.mean())
        covariance.append(torch.cov(torch.stack([b_i, z_i])) / size)
    gains = []
    for p in range(len(groups)):
        others = sum((covariance[q] for q in range(len(groups)) if q != p), torch.zeros(2, 2, dtype=torch.float64))
        beta = (-others[0, 1] / others[1, 1]).clamp(0, 1) if others[1, 1] > 0 else 1.0
        gains.append(b[p] + beta * z[p])
    return torch.stack(gains)


def success_log_odds_gain(rates: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """logit(r̄ + ḡ) − logit(r̄) of the batch, and its standard error over prompts by the delta method: [P], [P]."""
    before, after = rates.mean(), (rates + gains).mean()
    influence = (rates + gains) / (after * (1 - after)) - rates / (before * (1 - before))
    return after.logit() - before.logit(), influence.std() / len(rates) ** 0.5


def success_slope(s: Tensor, correct: Tensor) -> Tensor:
    """J′ = E[r s], with E[s] = 0. [derived]"""
    return reward_covariance(s, correct)


def success_curvature(s: Tensor, h: Tensor, correct: Tensor) -> Tensor:
    """J″ = E[r (s² + h)], with E[s² + h] = 0. [derived]"""
    return reward_covariance(s.double() ** 2 + h.double(), correct)


# -- error bars -------------------------------------------------------------------------------------------------------


def jackknife(estimator: Callable[..., Tensor], *samples: Tensor) -> Tensor:
    """√((n − 1)/n Σ (θ_i − θ̄)²), θ_i the estimate without unit i."""
    n = len(samples[0])
    everyone = torch.arange(n)
    left_out = torch.stack([torch.as_tensor(estimator(*(x[everyone != i] for x in samples))) for i in range(n)])
    return ((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()).sqrt()


def class_jackknife(estimator: Callable[..., Tensor], correct: Tensor, *samples: Tensor) -> Tensor:
    """Jackknife of an estimate statistic(correct) − statistic(incorrect), class by class, errors added in square."""
    parts = [jackknife(estimator, *(x[chosen] for x in samples)) for chosen in (correct, ~correct)]
    return (parts[0] ** 2 + parts[1] ** 2).sqrt()


# -- certified bounds -------------------------------------------------------------------------------------------------


def theorem_step_bound(alignment: float, score_norm: float, score_lipschitz: float, *, tight: bool = False) -> float:
    """[Δμ]₊ / (2(L_o + 8 G_o²)) [paper A, 2nd]; tight: [Δμ]₊ / (2(L_o + G_o²/2)) [derived]."""
    factor = 0.5 if tight else 8.0
    return max(alignment, 0.0) / (2 * (score_lipschitz + factor * score_norm ** 2))


def token_step_bound(alignment: float, success_rate: float, length: float, token_norm: float, token_lipschitz: float, *,
                     refined: bool = False) -> float:
    """(1 − J)[Δμ]₊ / (T(G_p² + L_p)); refined: [Δμ]₊ / (T(2 L_p + 4 G_p² (log 1/(1 − J) + 0.35))). [derived]"""
    gain = max(alignment, 0.0)
    if not refined:
        return (1 - success_rate) * gain / (length * (token_norm ** 2 + token_lipschitz))
    surprise = math.inf if success_rate == 1 else -math.log1p(-success_rate)
    return gain / (length * (2 * token_lipschitz + 4 * token_norm ** 2 * (surprise + 0.35)))
