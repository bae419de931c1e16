"""The gap over all parameters the long way: a forward and a backward per response, gradients kept, nothing shared with
``rf.ModelGap`` but the estimator that turns inner products into norms and error bars."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlvr_fast.estimates import GapEstimate, estimate_gap
from rlvr_fast.moments import Moments, Responses

from .sampled import Sampled

COLUMNS = 1 << 22  # coordinates taken to float64 at a time


@dataclass(eq=False)
class Truth:
    """Of P prompts with gradients of log π(o_i)/|o_i|.

    Attributes:
        grams: per parameter and prompt ⟨G_i, G_j⟩ [n, n] float64.
        cosines: [P, P] float64 between the prompts' gaps. These are kept in bfloat16: off by about 1e-3 at most.
    """

    responses: Responses
    grams: dict[str, list[torch.Tensor]]
    cosines: torch.Tensor

    @property
    def gram(self) -> list[torch.Tensor]:
        return [sum(parts) for parts in zip(*self.grams.values(), strict=True)]

    def estimate(self, names: list[str] | None = None) -> GapEstimate:
        """Over the parameters ``names``; all by default."""
        parts = [self.grams[name] for name in self.grams if names is None or name in names]
        return estimate_gap(Moments.from_gram(self.responses, [sum(grams) for grams in zip(*parts, strict=True)]))


def measure(sampled: Sampled) -> Truth:
    rollouts = sampled.rollouts
    parameters = dict(sampled.model.named_parameters())
    grams, gaps = {name: [] for name in parameters}, []
    for prompt, members in zip(sampled.prompts, rollouts.members, strict=True):
        distinct = list(dict.fromkeys(map(tuple, prompt.completions)))  # equal responses have equal gradients
        where = torch.tensor([distinct.index(tuple(tokens)) for tokens in prompt.completions])
        own = []
        for tokens in distinct:
            logp = sampled.logp(torch.tensor([[*prompt.tokens, *tokens]]))[0, len(prompt.tokens):]
            own.append(torch.autograd.grad(logp.mean(), list(parameters.values())))
        correct = rollouts.correct[list(members)]
        signs = torch.where(correct, 1.0 / correct.sum(), -1.0 / (~correct).sum())
        weights = torch.zeros(len(distinct)).index_add_(0, where, signs)
        gap = []
        for name, rows in zip(parameters, zip(*own, strict=True), strict=True):
            flat = [row.reshape(-1) for row in rows]
            grams[name].append(_gram(flat)[where][:, where])
            gap.append(sum(weight * row for weight, row in zip(weights, flat, strict=True)).bfloat16())
        gaps.append(gap)
    responses = Responses(rollouts.correct, rollouts.prompt_index, rollouts.prompt_ids)
    products = sum(_gram(list(parts)) for parts in zip(*gaps, strict=True))
    return Truth(responses, grams, cosines_of(products))


def _gram(rows: list[torch.Tensor]) -> torch.Tensor:
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), COLUMNS):
        block = torch.stack([row[start:start + COLUMNS] for row in rows]).double()
        result += block @ block.T
    return result


def cosines_of(products: torch.Tensor) -> torch.Tensor:
    """From inner products [P, P] of vectors."""
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)
