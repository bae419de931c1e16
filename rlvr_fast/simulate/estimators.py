"""Estimators of the gain in success rate: the parts of the one that ``measure_step`` uses, and one without ratios.

With ρ_i the ratio of a response and r_i its reward, per prompt:

    A   mean of G/(G − 1)·(r_i − r̄)(ρ_i − 1)   near J = 1 it rests on the few failures drawn
    B   mean of r_i(ρ_i − 1)                    rests on the correct responses alone

Both are unbiased on policy, so Z = A − B has mean 0 and B + βZ is unbiased for any constant β; β = −Cov(B, Z)/Var(Z)
has the least variance (a control variate). ``measure_step`` takes each prompt's β from the other prompts. [derived]
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlvr_fast.simulate.problems import Batch, Problem
from rlvr_fast.step.measure import measure_step

Tensor = torch.Tensor


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    stderr: float


def ratio_gains(problem: Problem, theta: Tensor, update: Tensor, batch: Batch) -> dict[str, Estimate]:
    """The gain of θ → θ + update by A, B and B + βZ, all with standard errors over prompts.

    Groups must be of one size. β is taken from the deviations within the other prompts, pooled, so that differences
    between prompts in the true gain do not count as noise to be removed.
    """
    rollouts = batch.rollouts
    change = problem.logp(theta + update, batch) - problem.logp(theta, batch)
    ratio = torch.segment_reduce(change, "sum", lengths=rollouts.lengths).exp().view(rollouts.n_prompts, -1)
    reward = rollouts.rewards.double().view_as(ratio)
    size = ratio.shape[1]
    a = size / (size - 1) * (reward - reward.mean(1, keepdim=True)) * (ratio - 1)
    b = reward * (ratio - 1)
    z = a - b
    within_b, within_z = (x - x.mean(1, keepdim=True) for x in (b, z))
    shared, spread = ((within_z * x).sum(1) for x in (within_b, within_z))
    beta = (-(shared.sum() - shared) / (spread.sum() - spread)).clamp(0, 1).nan_to_num(1.0)[:, None]
    return {name: _over_prompts(x.mean(1)) for name, x in {"A": a, "B": b, "B + βZ": b + beta * z}.items()}


def end_slope(problem: Problem, theta: Tensor, update: Tensor, batch: Batch, *, width: float = 1e-3) -> Estimate:
    """⟨update, ∇J(θ)⟩ from rollouts of θ itself: ``measure_step`` over a step too short to matter."""
    before, after, reverse = (problem.logp(theta + shift * update, batch) for shift in (0.0, width, -width))
    step = measure_step(before, after, batch.rollouts, logp_reverse=reverse, in_sample=False)
    return Estimate(float(step.success_slope) / width, float(step.success_slope_stderr) / width)


def two_ended(start: Estimate, end: Estimate) -> tuple[Estimate, float]:
    """Gain by the trapezoid ½(J′(0) + J′(1)), and break-even 2J′(0)/(J′(0) − J′(1)) in multiples of the update.

    Both are exact where J is a parabola along the update; no importance ratios. inf where the slope does not fall.
    """
    gain = Estimate((start.value + end.value) / 2, (start.stderr ** 2 + end.stderr ** 2) ** 0.5 / 2)
    fall = start.value - end.value
    return gain, max(0.0, 2 * start.value / fall) if fall > 0 else float("inf")


def _over_prompts(per_prompt: Tensor) -> Estimate:
    return Estimate(float(per_prompt.mean()), float(per_prompt.std() / len(per_prompt) ** 0.5))
