"""An exactly solvable policy: T independent tokens o_t = ±1 with P(+1) = σ(2θ), correct iff |Σ o_t| ≤ m. [derived]

Everything depends on a response only through k, its number of +1 tokens, so T + 1 weighted outcomes enumerate the
policy.
The success rate is even in θ and largest at θ = 0: a step along the gap direction breaks even after exactly 2|θ|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlvr_fast.rollouts import Rollouts


def log_ways(length: int) -> torch.Tensor:
    """[T+1] float64: log of the number of responses with k tokens +1."""
    k, n = torch.arange(length + 1, dtype=torch.float64), torch.tensor(float(length), dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


@dataclass(frozen=True)
class SignPolicy:
    length: int
    margin: int
    theta: float

    @property
    def direction(self) -> float:
        """The unit step in θ that the gap asks for: towards 0."""
        return -math.copysign(1.0, self.theta)

    @property
    def break_even(self) -> float:
        return 2 * abs(self.theta)

    @property
    def outcomes(self) -> torch.Tensor:
        """[T+1] float64: k."""
        return torch.arange(self.length + 1, dtype=torch.float64)

    @property
    def correct(self) -> torch.Tensor:
        """[T+1] bool."""
        return (2 * self.outcomes - self.length).abs() <= self.margin

    def moved(self, step: float) -> SignPolicy:
        return SignPolicy(self.length, self.margin, self.theta + step * self.direction)

    def token_logp(self) -> tuple[float, float]:
        """log P(−1), log P(+1)."""
        return -math.log1p(math.exp(2 * self.theta)), -math.log1p(math.exp(-2 * self.theta))

    def logp(self) -> torch.Tensor:
        """[T+1]: log-probability of one response with k tokens +1."""
        minus, plus = self.token_logp()
        return self.outcomes * plus + (self.length - self.outcomes) * minus

    def probability(self) -> torch.Tensor:
        """[T+1]: probability of k."""
        return (log_ways(self.length) + self.logp()).exp()

    def success_rate(self) -> float:
        return float(self.probability()[self.correct].sum())

    def log_odds(self) -> float:
        mass = self.probability()
        return float(mass[self.correct].sum().log() - mass[~self.correct].sum().log())

    def score(self) -> torch.Tensor:
        """[T+1]: s, the derivative of logp along the direction."""
        p = 1 / (1 + math.exp(-2 * self.theta))
        return self.direction * 2 * (self.outcomes - self.length * p)

    def score_derivative(self) -> torch.Tensor:
        """[T+1]: h, the second derivative; the same for every response."""
        p = 1 / (1 + math.exp(-2 * self.theta))
        return torch.full_like(self.outcomes, -4 * self.length * p * (1 - p))

    def sample(self, n_prompts: int, group_size: int, generator: torch.Generator) -> Rollouts:
        """P prompts x G responses, token 1 for +1 and 0 for −1."""
        p = 1 / (1 + math.exp(-2 * self.theta))
        tokens = (torch.rand(n_prompts * group_size, self.length, generator=generator, dtype=torch.float64) < p).long()
        reward = ((2 * tokens.sum(1) - self.length).abs() <= self.margin).float()
        return Rollouts.from_padded(tokens, None, reward, group_size=group_size)

    @classmethod
    def exact_sample(cls, length: int, margin: int, n_prompts: int = 1) -> tuple[SignPolicy, Rollouts]:
        """The policy with P(+1) = 3/4, and 4^T responses per prompt in which each occurs exactly as often as expected.

        Class means over them are exact expectations, not estimates.
        """
        tokens = torch.cartesian_prod(*[torch.tensor([0, 1])] * length).reshape(-1, length)
        tokens = tokens.repeat_interleave(3 ** tokens.sum(1), dim=0)
        reward = ((2 * tokens.sum(1) - length).abs() <= margin).float()
        rollouts = Rollouts.from_padded(tokens.repeat(n_prompts, 1), None, reward.repeat(n_prompts),
                                        group_size=len(tokens))
        return cls(length, margin, math.log(3) / 2), rollouts

    def logp_of(self, rollouts: Rollouts) -> torch.Tensor:
        """[N] float64: log-prob of every sampled token."""
        return torch.tensor(self.token_logp(), dtype=torch.float64)[rollouts.tokens]
