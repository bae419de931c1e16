"""Advantages and loss weights in plain torch: vectorised over the batch, in float64, on any device, repeatable.

Formulas and defined edges: ``rlvr_fast.advantages``, which also checks the arguments.
"""

from __future__ import annotations

import torch

from rlvr_fast.rollouts import Rollouts
from rlvr_fast.segments import segment_sum


def torch_advantages(rollouts: Rollouts, estimator: str, *, eps: float = 0.0, f_norm: float = 1.0,
                     normalize_by_std: bool = True, alpha: float = 1.0) -> torch.Tensor:
    """[R] float64."""
    rewards, prompt = rollouts.rewards.double(), rollouts.prompt_index
    one, lengths = torch.ones_like(rewards), rollouts.lengths.double()
    whole_batch = torch.zeros_like(prompt)
    size, mean, centred, squares = _moments(rewards, one, prompt, rollouts.n_prompts)
    if estimator == "grpo":
        return _over_std(centred, squares / (size - 1).clamp(min=1), eps)
    if estimator == "vl_norm":
        grpo = _over_std(centred, squares / (size - 1).clamp(min=1), eps)
        return grpo * rollouts.n_responses * _length_share(lengths, alpha)
    if estimator == "grpo_population_std":
        return _over_std(centred, squares / size, eps)
    if estimator == "grpo_batch_std":
        _, _, _, batch_squares = _moments(rewards, one, whole_batch, 1)
        return _over_std(centred, batch_squares / max(rollouts.n_responses - 1, 1), eps)
    if estimator == "dr_grpo":
        return centred
    if estimator == "rloo":
        return centred * size / (size - 1).clamp(min=1)
    if estimator == "maxrl":
        return torch.where(mean > 0, centred / torch.where(mean > 0, mean + eps, 1.0), 0.0)
    if estimator == "opo":
        tokens, _, centred, _ = _moments(rewards, lengths, prompt, rollouts.n_prompts)
        return torch.where(tokens > 0, centred, 0.0)
    if estimator == "gpg":
        return centred * rollouts.n_responses / (rewards != 0).sum().clamp(min=1) / f_norm
    if estimator == "pass_at_k":
        lead = _lead(rewards, prompt, rollouts.n_prompts)
        return _over_std(lead, squares / (size - 1).clamp(min=1), eps) if normalize_by_std else lead
    values = centred if estimator == "reinforce_pp_baseline" else rewards
    tokens, _, centred, squares = _moments(values, lengths, whole_batch, 1)
    variance = squares / (tokens - 1).clamp(min=1)
    return torch.where(variance > 0, centred / torch.where(variance > 0, variance + eps, 1.0).sqrt(), 0.0)


def torch_loss_weights(rollouts: Rollouts, advantages: torch.Tensor, aggregation: str, *, max_length: float = 1.0,
                       alpha: float = 1.0) -> torch.Tensor:
    """[N] float64 from ``advantages`` [R] float64."""
    lengths, n_responses = rollouts.lengths.double(), rollouts.n_responses
    if aggregation == "grpo":
        coefficient = 1.0 / (n_responses * lengths.clamp(min=1))
    elif aggregation in ("dapo", "bnpo"):
        coefficient = torch.full_like(lengths, 1.0 / max(rollouts.n_tokens, 1))
    elif aggregation == "dr_grpo":
        coefficient = torch.full_like(lengths, 1.0 / (max(n_responses, 1) * max_length))
    elif aggregation == "seq_mean_token_sum":
        coefficient = torch.full_like(lengths, 1.0 / max(n_responses, 1))
    elif aggregation == "prompt_mean":
        tokens = segment_sum(lengths, rollouts.prompt_index, rollouts.n_prompts)
        coefficient = 1.0 / (rollouts.n_prompts * tokens.clamp(min=1)[rollouts.prompt_index])
    else:
        coefficient = _length_share(lengths, alpha) / max_length
    return torch.repeat_interleave(advantages * coefficient, rollouts.lengths, output_size=rollouts.n_tokens)


def _moments(values: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, n_sets: int) -> tuple[torch.Tensor, ...]:
    """Weighted moments of each response's set, each [R]: (total weight, mean, value - mean, Σ w (value - mean)²).

    The mean is taken above the set's smallest weighted value, so that equal values centre to exactly 0.
    """
    weighted = torch.where(weight > 0, values, torch.inf)
    lowest = values.new_full((n_sets,), torch.inf).scatter_reduce_(0, index, weighted, "amin")
    lowest = torch.where(lowest.isinf(), 0.0, lowest)
    above = values - lowest[index]
    total = segment_sum(weight, index, n_sets)
    mean = segment_sum(weight * above, index, n_sets) / total.clamp(min=1)
    centred = above - mean[index]
    squares = segment_sum(weight * centred.square(), index, n_sets)
    return total[index], (lowest + mean)[index], centred, squares[index]


def _over_std(values: torch.Tensor, variance: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.where(variance > 0, values / torch.where(variance > 0, variance.sqrt() + eps, 1.0), 0.0)


def _lead(rewards: torch.Tensor, prompt: torch.Tensor, n_prompts: int) -> torch.Tensor:
    """How far each response is ahead of the best other response to its prompt: [R], 0 unless it is the only best."""
    lowest = rewards.new_full((n_prompts,), -torch.inf)
    best = lowest.scatter_reduce(0, prompt, rewards, "amax")[prompt]
    is_best = rewards == best
    second = lowest.scatter_reduce(0, prompt, torch.where(is_best, -torch.inf, rewards), "amax")[prompt]
    n_best = segment_sum(is_best.double(), prompt, n_prompts)[prompt]
    return torch.where(is_best & (n_best == 1) & second.isfinite(), rewards - second, 0.0)


def _length_share(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """L_i^-alpha / Σ_j L_j^-alpha over the responses that have tokens, as a softmax of -alpha log L; 0 if L_i = 0."""
    exponent = torch.where(lengths > 0, -alpha * lengths.clamp(min=1).log(), -torch.inf)
    return torch.where(lengths > 0, exponent.softmax(0), 0.0)
