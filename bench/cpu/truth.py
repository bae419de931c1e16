"""What the head's quantities are in float64, from rlvr_fast.reference, one prompt at a time: no [N, V] buffer."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from rlvr_fast import reference
from rlvr_fast.bench.workload import Workload


class HeadTruth(NamedTuple):
    """All float64: logp [N], token_gradient [N, D] = ∂logp/∂hidden, per-response gradients divided by the length at
    the levels logits [R, V] and hidden [R, D], and the Gram matrices [P, G, G] of those at level head."""

    logp: torch.Tensor
    token_gradient: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    gram: torch.Tensor


@cache
def head_truth(workload: Workload) -> HeadTruth:
    parts = [prompt_truth(workload, prompt) for prompt in workload.rollouts.members]
    columns = list(zip(*parts, strict=True))
    return HeadTruth(*map(torch.cat, columns[:4]), torch.stack(columns[4]))


def prompt_truth(workload: Workload, members: tuple[int, ...]) -> HeadTruth:
    """The same of one prompt's responses, on the workload's device; gram [G, G]."""
    bounds, length = workload.rollouts.bounds, workload.shape.length
    rows = slice(bounds[members[0]], bounds[members[-1] + 1])
    hidden, tokens = workload.hidden[rows].double(), workload.tokens[rows]
    z = reference.logits(hidden, workload.weight)
    score = reference.score(z, tokens, torch.ones((), dtype=torch.float64))
    token_gradient = reference.hidden_gradient(score, workload.weight)
    coefficients = torch.full((len(score),), 1.0 / length, dtype=torch.float64, device=hidden.device)
    cu_seqlens = range(0, len(score) + 1, length)
    # ⟨Σ_t s_t h_tᵀ, Σ_u s_u h_uᵀ⟩ = Σ_{t,u} ⟨s_t, s_u⟩⟨h_t, h_u⟩ spares the [G, V·D] gradients.
    pairs = (score @ score.T) * (hidden @ hidden.T) / length**2
    gram = pairs.unflatten(0, (-1, length)).unflatten(2, (-1, length)).sum((1, 3))
    return HeadTruth(reference.log_prob(z, tokens), token_gradient,
                     reference.response_gradients_logits(score, coefficients, cu_seqlens),
                     reference.response_gradients_logits(token_gradient, coefficients, cu_seqlens), gram)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """max |Δ| / max |truth|."""
    return float((value.double() - truth).abs().max() / truth.abs().max())
