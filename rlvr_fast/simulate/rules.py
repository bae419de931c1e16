"""Update rules: how the prompts' gradient gaps become one step, from exact gradients or from rollouts.

With exact gradients every rule is mean_p κ(J_p)(g_p⁺ − g_p⁻), transformed; κ is the package's (``rlvr_fast.kappa``).
From rollouts it is the gradient of the loss that training loops write, Σ_t w_t log π(o_t), with the package's
advantages and loss weights. "Without 1/T" sums a response's tokens, "with 1/T" averages them.

    rule        κ(J)                               then
    reinforce   J(1 − J)                           (raw rewards, no baseline, when sampled)
    rloo        J(1 − J)                           (equal to reinforce in the mean)
    dr_grpo     (1 − 1/G) J(1 − J)
    grpo        E √(p̂(1 − p̂)) over groups of G;    √(J(1 − J)) where G is None: a group so large that p̂ = J
    unit_norm   J(1 − J)                           divided by its norm: what Adam or ever-active clipping leave
    natural     J(1 − J)                           F⁻¹ in front, F the population's Fisher information
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlvr_fast.advantages import advantages, loss_weights
from rlvr_fast.kappa import kappa, population_kappa
from rlvr_fast.simulate.problems import Batch, Problem

Tensor = torch.Tensor
NAMES = ("reinforce", "rloo", "dr_grpo", "grpo", "unit_norm", "natural")
SAMPLED_ESTIMATOR = {"rloo": "rloo", "dr_grpo": "dr_grpo", "grpo": "grpo_population_std", "unit_norm": "rloo",
                     "natural": "rloo"}
SINGULAR = 1e-10  # Fisher eigenvalues below it count as 0: a nearly deterministic policy's are rounding noise


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: one of ``NAMES``.
        length_norm: divide each response's gradient by its length T.
        group_size: G, for dr_grpo and grpo with exact gradients; None is the limit of large groups.
    """

    name: str
    length_norm: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}; got {self.name!r}")

    def __str__(self) -> str:
        size = "" if self.group_size is None else f" G={self.group_size}"
        return f"{self.name}{size}{' with 1/T' if self.length_norm else ''}"

    def factor(self, success_rate: Tensor) -> Tensor:
        """κ(J)."""
        if self.name == "grpo":
            if self.group_size is None:
                return kappa(success_rate, 2, "grpo_population_std")  # this κ depends on p alone
            return population_kappa(success_rate, "grpo_population_std", self.group_size)
        if self.name == "dr_grpo" and self.group_size is not None:
            return population_kappa(success_rate, "dr_grpo", self.group_size)
        return population_kappa(success_rate, "reinforce")

    def exact(self, problem: Problem, theta: Tensor) -> Tensor:
        """[..., D] -> [..., D]: the step at rate 1, from exact gradients."""
        at = theta.detach().requires_grad_()
        log_odds = problem.log_odds(at)
        weight = self.factor(log_odds.detach().sigmoid())
        gradient, = torch.autograd.grad((weight * log_odds).mean(-1).sum(), at)
        return self._transform(problem, theta, gradient / problem.length if self.length_norm else gradient)

    def sampled(self, problem: Problem, theta: Tensor, batch: Batch) -> Tensor:
        """[D]: the step at rate 1, from rollouts."""
        rollouts = batch.rollouts
        advantage = (rollouts.rewards if self.name == "reinforce" else
                     advantages(rollouts, SAMPLED_ESTIMATOR[self.name], eps=0.0 if self.name == "grpo" else None))
        weight = loss_weights(rollouts, advantage, "grpo" if self.length_norm else "seq_mean_token_sum")
        at = theta.detach().requires_grad_()
        gradient, = torch.autograd.grad((weight.double() * problem.logp(at, batch)).sum(), at)
        return self._transform(problem, theta, gradient)

    def _transform(self, problem: Problem, theta: Tensor, gradient: Tensor) -> Tensor:
        if self.name == "unit_norm":
            return torch.nn.functional.normalize(gradient, dim=-1, eps=1e-300)
        if self.name == "natural":
            inverse = torch.linalg.pinv(problem.fisher(theta), atol=SINGULAR, rtol=0.0, hermitian=True)
            return (inverse @ gradient[..., None])[..., 0]
        return gradient
