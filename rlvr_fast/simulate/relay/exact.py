"""Expected learning, exactly: closed forms in the per-step margin, and the dynamics along the one direction left.

**Spread errors.** If a step takes the right action with probability u and each other with (1 − u)/(d − 1), its kernel
is Δ·(right action) + (1 − Δ)·uniform, with the margin Δ = u − (1 − u)/(d − 1). Uniform absorbs, so over L steps

    J_L = 1/d + (1 − 1/d) Δ^L     exactly, for every group [derived]: the paper's J ≈ 1/d + Δ^L [paper B]
    (1/L) dJ_L = (1 − 1/d) Δ^(L−1) dΔ, and a right action with logit z has dΔ/dz = u (1 − Δ) as 1 − u = (1 − 1/d)(1 − Δ)
                                  [derived]: the paper's gradient ∝ Δ^L (1 − Δ) [paper B]

**Rearrangements.** The model's errors are not spread: the prompt's other actions get more than the rest. With u, v, w
the probabilities of the right action, of another of the prompt and of any other, the kernel is w·everything +
(v − w)·(the prompt's) + (u − v)·right. In an abelian group the prompt's actions in any order are right, so Δ^L becomes
the permanent of (u − v)·I + (v − w)·ones, Σ_m C(L, m) m! (u − v)^(L−m) (v − w)^m [derived].

**One direction.** Identifiers are drawn uniformly, so the expected gradient at Q = β·I is again I less its mean, times
a number: the run stays on this line and only β counts. With J'_L(β), the slope of the success rate along I [derived]:

    ‖∇_Q J_L‖ = J'_L / √(N − 1)       ‖gap_L‖ = J'_L / (L √(N − 1) J_L (1 − J_L)), length-normalised
    dβ/dt = 1/(N − 1) · mean over levels of (J'_L / L + entropy weight · H'_L),   H_L the policy's entropy per step,

in time t = η·steps. At β = 0 of an **abelian** group J' = 0 exactly [derived]: all steps have one kernel, so what an
action gains in a step does not depend on the step, and its own is worth no more than another. Training from Q = 0
leaves a saddle there, by its noise. Where steps do not commute, J' > 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast.simulate.relay.task import StateTracking
from rlvr_fast.simulate.relay.training import check_mixture

Tensor = torch.Tensor
VISIBLE, MASTERED = 0.01, 0.99  # [paper B]; visible: that much above chance


def margin(right: Tensor, order: int) -> Tensor:
    """Δ = u − (1 − u)/(d − 1): the right action's probability less the mean of the others."""
    return (order * right - 1) / (order - 1)


def spread_success(delta: Tensor, length: int, order: int) -> Tensor:
    """J_L = 1/d + (1 − 1/d) Δ^L, exact for spread errors [derived]."""
    return 1 / order + (1 - 1 / order) * delta ** length


def spread_slope(delta: Tensor, length: int, order: int) -> Tensor:
    """(1/L) dJ_L/dz for the logit z of the right action at every step: (1 − 1/d) Δ^(L−1) (1 − Δ) u [derived]."""
    right = (1 + (order - 1) * delta) / order
    return (1 - 1 / order) * delta ** (length - 1) * (1 - delta) * right


def rearrangements(in_order: Tensor, any_order: Tensor, length: int) -> Tensor:
    """Permanent of in_order·I + any_order·ones, [L, L]."""
    terms = (float(math.perm(length, m)) * in_order ** (length - m) * any_order ** m for m in range(length + 1))
    return sum(terms, torch.zeros_like(in_order))


def step_probabilities(task: StateTracking, length: int, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, v, w at Q = β·I: the right action, another of the prompt, any other. Same shape as ``beta``, float64."""
    right = torch.sigmoid(beta - math.log(length - 1)) if length > 1 else torch.ones_like(beta)
    rest = (1 - right) / max(length - 1, 1)
    weights = torch.stack([task.sharpness * right, task.sharpness * rest, torch.zeros_like(right)])
    counts = torch.tensor([1, length - 1, task.group.order - length], dtype=torch.float64)
    log_z = (weights + counts.log().view(3, *[1] * beta.ndim)).logsumexp(0)
    return tuple((weights - log_z).exp())


@dataclass(frozen=True, eq=False)
class Curve:
    """One level along Q = β·I. beta, success, slope (J'), entropy_slope (H'), margin: [M] float64.

    stderr: [M] of ``success``, which is exact per prompt and averaged over drawn prompts.
    """

    length: int
    beta: Tensor
    success: Tensor
    slope: Tensor
    entropy_slope: Tensor
    margin: Tensor
    stderr: Tensor

    def first(self, success: float) -> float:
        """The β at which the success rate first reaches this; inf if it never does."""
        above = (self.success >= success).nonzero()
        if not len(above):
            return math.inf
        i = int(above[0])
        if i == 0:
            return float(self.beta[0])
        part = (success - self.success[i - 1]) / (self.success[i] - self.success[i - 1])
        return float(self.beta[i - 1] + part * (self.beta[i] - self.beta[i - 1]))


def curve(task: StateTracking, length: int, beta: Tensor, *, n_prompts: int = 64, seed: int = 0) -> Curve:
    """Exact success and slope per prompt, by convolution and its derivative; mean over the same prompts at every β."""
    prompts = task.prompts(length, n_prompts, torch.Generator().manual_seed(seed))
    line = torch.eye(task.n_identifiers, dtype=torch.float64)
    columns = []
    for value in check.tensor("beta", beta, ndim=1, dtypes=(torch.float64,)):
        at = value.clone().requires_grad_()
        rates = task.success(at * line, prompts)
        entropy = task.entropy(task.step(at * line, prompts)).mean()
        slope, = torch.autograd.grad(rates.mean(), at)
        entropy_slope, = torch.autograd.grad(entropy, at)
        columns.append(torch.stack([rates.mean(), slope, entropy_slope, rates.std() / n_prompts ** 0.5]).detach())
    success, slope, entropy_slope, stderr = torch.stack(columns, 1)
    right, _, _ = step_probabilities(task, length, beta)
    return Curve(length, beta, success, slope, entropy_slope, margin(right, task.group.order), stderr)


def mixture(task: StateTracking, shortest: int, ratio: float, longest: int) -> tuple[int, ...]:
    """L_{k+1} = ⌈R·L_k⌉ from ``shortest`` while at most ``longest`` [paper B]."""
    if check.real("ratio", ratio) <= 1:
        raise ValueError(f"ratio must be above 1 for levels to grow, got {ratio}")
    lengths = [task.check_length(shortest)]
    while (longer := math.ceil(round(ratio * lengths[-1], 9))) <= longest:
        lengths.append(longer)
    return check_mixture(task, lengths)


def signal(level: Curve, n_identifiers: int) -> Tensor:
    """[M]: norm of the level's part of the expected gradient, J'/(L √(N − 1)); times p(1 − p)‖gap‖ by another name."""
    return level.slope.abs() / (level.length * (n_identifiers - 1) ** 0.5)


@dataclass(frozen=True, eq=False)
class Flow:
    """Expected training as a flow in time t = η·steps along β, from ``start``.

    Attributes:
        levels: the mixture's curves. beta: [M'] from the start on, as far as the flow goes. time: [M'].
        stalled_at: the β it cannot pass, because there the entropy bonus outweighs the reward; inf if there is none.
    """

    levels: tuple[Curve, ...]
    beta: Tensor
    time: Tensor
    stalled_at: float

    def reaches(self, level: Curve, success: float) -> float:
        """Time at which the level's success rate reaches this, 0 if it has at the start; inf if never."""
        beta = level.first(success)
        if beta <= float(self.beta[0]):
            return 0.0
        return _interpolate(beta, self.beta, self.time) if beta <= float(self.beta[-1]) else math.inf

    def times(self, order: int) -> dict[int, tuple[float, float]]:
        """Per level when it becomes visible, J ≥ 1/d + 0.01, and mastered, J ≥ 0.99."""
        return {level.length: (self.reaches(level, 1 / order + VISIBLE), self.reaches(level, MASTERED))
                for level in self.levels}


def flow(levels: Sequence[Curve], n_identifiers: int, *, entropy_weight: float = 0.0, start: float = 0.1) -> Flow:
    """t(β) = ∫ dβ / speed by the trapezoidal rule on the curves' grid."""
    beta = levels[0].beta
    speed = sum((level.slope / level.length + entropy_weight * level.entropy_slope for level in levels),
                torch.zeros_like(beta))
    speed = speed / len(levels) / (n_identifiers - 1)
    kept = beta >= start - 1e-12
    beta, speed = beta[kept], speed[kept]
    lost = (speed <= 0).nonzero()
    end = int(lost[0]) if len(lost) else len(beta)
    beta_end = float(beta[end]) if end < len(beta) else math.inf
    beta, pace = beta[:end], 1 / speed[:end]
    if not len(beta):  # it cannot leave its start
        return Flow(tuple(levels), torch.tensor([start]).double(), torch.zeros(1).double(), beta_end)
    steps = beta.diff() * (pace[1:] + pace[:-1]) / 2
    return Flow(tuple(levels), beta, torch.cat([steps.new_zeros(1), steps.cumsum(0)]), beta_end)


def hand_over(easier: Curve, harder: Curve) -> dict[str, float]:
    """Where along β the harder level's gradient overtakes, against the condition Δ_{k+1}^{L_{k+1}} = 1 − Δ_k [paper B].

    ``beta`` of the overtaking, ``harder`` and ``easier``: the condition's two sides there, ``condition_beta`` where
    they are equal. NaN if the overtaking is not on the grid.
    """
    left, right = harder.margin ** harder.length, 1 - easier.margin
    learnt = easier.success > 0.5
    overtaken = learnt & (harder.slope / harder.length > easier.slope / easier.length)
    if not overtaken.any():
        return dict.fromkeys(("beta", "harder", "easier", "condition_beta"), math.nan)
    i, j = (int(where.nonzero()[0]) for where in (overtaken, learnt & (left > right)))
    return {"beta": float(easier.beta[i]), "harder": float(left[i]), "easier": float(right[i]),
            "condition_beta": float(easier.beta[j])}


def plateau_exponent(c_b: float, ratio: float, *, derived: bool = False) -> float:
    """Exponent of d in the length of a plateau at ratio R: C_B R/(C_B + R) − 1 [paper B].

    ``derived``: C_B R/(C_B + R − 1) − 1. Level k + 1 wakes when its attention is 1/C_B, where the right action's weight
    d^(C_B·attention) equals that of the d others together. Attention's odds there are 1/(C_B − 1), and R times that at
    level k, whose 1 − Δ is d^(1 − C_B·attention).
    """
    return c_b * ratio / (c_b + ratio - derived) - 1


def _interpolate(x: float, xs: Tensor, ys: Tensor) -> float:
    i = int(torch.searchsorted(xs, x))
    return float(ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1]))
