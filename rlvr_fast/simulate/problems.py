"""Problems whose success rate is known exactly at every θ, and can also be sampled: the oracle of the simulations.

A problem is a population of P prompts under one policy with parameters θ [D]. Exact figures take a batch of parameters
[..., D]; sampled ones take one θ and a ``Batch`` of rollouts. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.simulate.sign_policy import log_ways

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rollouts, and which prompt of the population each of their prompts is ([P'] int64)."""

    rollouts: Rollouts
    prompts: Tensor


class Problem(Protocol):
    """What a simulation needs to know."""

    @property
    def length(self) -> int:
        """T, tokens per response."""

    @property
    def n_prompts(self) -> int:
        """P, size of the population."""

    @property
    def n_parameters(self) -> int:
        """D."""

    def log_odds(self, theta: Tensor) -> Tensor:
        """[..., D] -> [..., P]: logit J of every prompt, exact and differentiable."""

    def fisher(self, theta: Tensor) -> Tensor:
        """[..., D] -> [..., D, D]: Fisher information of a response, mean over the population."""

    def draw(self, theta: Tensor, prompts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """``group_size`` responses to each of ``prompts`` [P'], in that order."""

    def logp(self, theta: Tensor, batch: Batch) -> Tensor:
        """[N]: log-prob of every sampled token, differentiable in θ."""


def sample(problem: Problem, theta: Tensor, n_prompts: int, group_size: int, generator: torch.Generator) -> Batch:
    """``n_prompts`` prompts drawn from the population with replacement, ``group_size`` responses to each."""
    prompts = torch.randint(problem.n_prompts, (n_prompts,), generator=generator)
    return Batch(problem.draw(theta, prompts, group_size, generator), prompts)


@dataclass(frozen=True)
class SignTask:
    """The policy of ``sign_policy`` with one θ shared by prompts that ask for different margins m. D = 1.

    Every prompt's success is even in θ, so the population's break-even along the gap is exactly 2|θ| as well.
    """

    length: int
    margins: tuple[int, ...]
    n_parameters: int = 1

    # |∂ log P(o_t)/∂θ| = |2(1[+] − p)| ≤ 2 and |∂² log P(o_t)/∂θ²| = 4p(1 − p) ≤ 1
    token_norm = 2.0
    token_lipschitz = 1.0

    def __post_init__(self) -> None:
        if self.length < 1 or not self.margins:
            raise ValueError("length and the number of margins must be at least 1, "
                             f"got {self.length} and {len(self.margins)}")
        for margin in self.margins:  # the smallest |Σ o_t| is the parity of T
            if not self.length % 2 <= margin < self.length:
                raise ValueError(f"margins must leave correct and incorrect responses: {self.length % 2} to "
                                 f"{self.length - 1} for length {self.length}, got {margin}")

    @property
    def n_prompts(self) -> int:
        return len(self.margins)

    @property
    def score_norm(self) -> float:
        return self.token_norm * self.length

    @property
    def score_lipschitz(self) -> float:
        return self.token_lipschitz * self.length

    @cached_property
    def _correct(self) -> Tensor:
        """[P, T+1] bool, by the number k of tokens +1."""
        total = 2 * torch.arange(self.length + 1) - self.length
        return total.abs() <= torch.tensor(self.margins)[:, None]

    @cached_property
    def _log_ways(self) -> Tensor:
        return log_ways(self.length)

    def log_odds(self, theta: Tensor) -> Tensor:
        k = torch.arange(self.length + 1, dtype=torch.float64)
        plus, minus = (torch.nn.functional.logsigmoid(sign * 2 * theta) for sign in (1, -1))  # [..., 1]
        mass = (self._log_ways + k * plus + (self.length - k) * minus)[..., None, :]
        correct = mass.masked_fill(~self._correct, -torch.inf).logsumexp(-1)
        return correct - mass.masked_fill(self._correct, -torch.inf).logsumexp(-1)

    def fisher(self, theta: Tensor) -> Tensor:
        p = torch.sigmoid(2 * theta)
        return (4 * self.length * p * (1 - p))[..., None]

    def draw(self, theta: Tensor, prompts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        p = torch.sigmoid(2 * theta)
        shape = (len(prompts) * group_size, self.length)
        tokens = (torch.rand(shape, generator=generator, dtype=torch.float64) < p).long()
        margin = torch.tensor(self.margins)[prompts].repeat_interleave(group_size)
        reward = ((2 * tokens.sum(1) - self.length).abs() <= margin).float()
        return Rollouts.from_padded(tokens, None, reward, group_size=group_size)

    def logp(self, theta: Tensor, batch: Batch) -> Tensor:
        table = torch.nn.functional.logsigmoid(torch.cat([-2 * theta, 2 * theta]))
        return table[batch.rollouts.tokens]


@dataclass(frozen=True, eq=False)
class Bandit:
    """Contextual softmax bandit: π(a|p) ∝ exp⟨φ(p, a), θ⟩; one token a response, each arm right or wrong.

    Attributes:
        features: [P, K, D] float64.
        correct: [P, K] bool, at least one right and one wrong arm per prompt.
    """

    features: Tensor
    correct: Tensor
    length: int = 1

    def __post_init__(self) -> None:
        check.tensor("features", self.features, ndim=3, dtypes=(torch.float64,))
        check.tensor("correct", self.correct, shape=tuple(self.features.shape[:2]), dtypes=(torch.bool,))
        if not (self.correct.any(1) & ~self.correct.all(1)).all():
            raise ValueError("correct must hold a right and a wrong arm for every prompt")

    @classmethod
    def random(cls, n_prompts: int, n_arms: int, n_parameters: int, generator: torch.Generator, *,
               solvable: bool = False) -> Bandit:
        """Normal features of length about 1, one right arm per prompt.

        The right arms are drawn at random, so that prompts contradict each other unless there are many parameters; or,
        if ``solvable``, they are what some θ prefers, so that success 1 is attainable in the limit.
        """
        features = torch.randn(n_prompts, n_arms, n_parameters, generator=generator, dtype=torch.float64)
        answer = torch.randint(n_arms, (n_prompts,), generator=generator)
        if solvable:
            answer = (features @ torch.randn(n_parameters, generator=generator, dtype=torch.float64)).argmax(1)
        return cls(features / n_parameters ** 0.5, torch.nn.functional.one_hot(answer, n_arms).bool())

    @property
    def n_prompts(self) -> int:
        return self.features.shape[0]

    @property
    def n_parameters(self) -> int:
        return self.features.shape[2]

    @cached_property
    def score_norm(self) -> float:
        """G_o: ‖φ_a − Σπφ‖ is at most the largest distance between two arms' features."""
        return float(torch.cdist(self.features, self.features).max())

    @property
    def score_lipschitz(self) -> float:
        """L_o: the covariance of features in a set of that diameter has norm at most its square over 4."""
        return self.score_norm ** 2 / 4

    def log_odds(self, theta: Tensor) -> Tensor:
        logits = torch.einsum("pkd,...d->...pk", self.features, theta)
        right = logits.masked_fill(~self.correct, -torch.inf).logsumexp(-1)
        return right - logits.masked_fill(self.correct, -torch.inf).logsumexp(-1)

    def fisher(self, theta: Tensor) -> Tensor:
        probability = torch.einsum("pkd,...d->...pk", self.features, theta).softmax(-1)
        mean = torch.einsum("...pk,pkd->...pd", probability, self.features)
        second = torch.einsum("...pk,pkd,pke->...pde", probability, self.features, self.features)
        return (second - mean[..., :, None] * mean[..., None, :]).mean(-3)

    def draw(self, theta: Tensor, prompts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        probability = (self.features[prompts] @ theta).softmax(-1)
        arms = torch.multinomial(probability, group_size, replacement=True, generator=generator)
        reward = self.correct[prompts].gather(1, arms).float().reshape(-1)
        return Rollouts.from_padded(arms.reshape(-1, 1), None, reward, group_size=group_size)

    def logp(self, theta: Tensor, batch: Batch) -> Tensor:
        table = (self.features[batch.prompts] @ theta).log_softmax(-1)
        return table[batch.rollouts.prompt_index, batch.rollouts.tokens]
