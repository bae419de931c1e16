"""The specification of advantages and loss weights in float64: one function per estimator and per aggregation.

Notation: prompt q has G responses with rewards r, lengths L, mean reward μ, standard deviation σ (Bessel unless said);
R responses and P prompts in the batch. An estimator maps (rewards [R], prompt_index [R], lengths [R]) to A [R]; an
aggregation maps (advantages [R], prompt_index [R], lengths [R]) to one weight per token [N], w_{i,t} = A_i c_{i,t}.
Formulas: the papers named in ``rlvr_fast.advantages`` and the frameworks that publish code for them.

Where nothing varies nothing is divided: a set of equal rewards has A = 0 whatever eps is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "REFERENCE_ADVANTAGES", "REFERENCE_LOSS_WEIGHTS", "bnpo_weights", "dapo_weights", "dr_grpo_advantages",
    "dr_grpo_weights", "gpg_advantages", "grpo_advantages", "grpo_batch_std_advantages",
    "grpo_population_std_advantages", "grpo_weights", "maxrl_advantages", "opo_advantages", "pass_at_k_advantages",
    "prompt_mean_weights", "reinforce_pp_advantages", "reinforce_pp_baseline_advantages", "rloo_advantages",
    "seq_mean_token_sum_weights", "vl_norm_advantages", "vl_norm_weights",
]


def _per_prompt(rule: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, prompt_index: Tensor,
                lengths: Tensor) -> Tensor:
    """A [R] from ``rule(r, L)`` applied to the responses of each prompt in turn."""
    rewards, lengths = rewards.double(), lengths.double()
    advantages = torch.zeros_like(rewards)
    for prompt in prompt_index.unique():
        members = prompt_index == prompt
        advantages[members] = rule(rewards[members], lengths[members])
    return advantages


def _equal(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values == values[0]).all())


def _std(values: Tensor, correction: int = 1) -> Tensor:
    return values.std(correction=correction)


# -- advantages --------------------------------------------------------------------------------------------------------


def grpo_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-4) -> Tensor:
    """A = (r - μ) / (σ + eps)."""
    return _per_prompt(lambda r, _: 0 * r if _equal(r) else (r - r.mean()) / (_std(r) + eps),
                       rewards, prompt_index, lengths)


def grpo_population_std_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-4) -> Tensor:
    """A = (r - μ) / (σ_G + eps), σ_G² = Σ (r - μ)² / G."""
    return _per_prompt(lambda r, _: 0 * r if _equal(r) else (r - r.mean()) / (_std(r, correction=0) + eps),
                       rewards, prompt_index, lengths)


def grpo_batch_std_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-4) -> Tensor:
    """A = (r - μ) / (σ_batch + eps), σ_batch over all R rewards."""
    scale = 1.0 if _equal(rewards) else _std(rewards.double()) + eps
    return dr_grpo_advantages(rewards, prompt_index, lengths) / scale


def dr_grpo_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """A = r - μ."""
    return _per_prompt(lambda r, _: 0 * r if _equal(r) else r - r.mean(), rewards, prompt_index, lengths)


def rloo_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """A_i = r_i - mean of r_j over j ≠ i; 0 for a prompt with one response."""
    def rule(r: Tensor, _: Tensor) -> Tensor:
        others = [torch.cat([r[:i], r[i + 1:]]) for i in range(len(r))]
        return 0 * r if _equal(r) else torch.stack([r[i] - rest.mean() for i, rest in enumerate(others)])
    return _per_prompt(rule, rewards, prompt_index, lengths)


def maxrl_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 0.0) -> Tensor:
    """A = (r - μ) / (μ + eps) if μ > 0, else 0."""
    return _per_prompt(lambda r, _: 0 * r if _equal(r) or r.mean() <= 0 else (r - r.mean()) / (r.mean() + eps),
                       rewards, prompt_index, lengths)


def opo_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """A = r - Σ_j L_j r_j / Σ_j L_j; 0 for a prompt without tokens."""
    return _per_prompt(lambda r, L: 0 * r if _equal(r) or L.sum() == 0 else r - (L * r).sum() / L.sum(),
                       rewards, prompt_index, lengths)


def reinforce_pp_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-8) -> Tensor:
    """A = (r - m) / √(v + eps), m and v the mean and Bessel variance over the batch's tokens, each with its response's
    reward."""
    per_token = torch.repeat_interleave(rewards.double(), lengths)
    if _equal(per_token):
        return torch.zeros_like(rewards, dtype=torch.float64)
    return (rewards.double() - per_token.mean()) / (per_token.var() + eps).sqrt()


def reinforce_pp_baseline_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor,
                                     eps: float = 1e-8) -> Tensor:
    """A = whitened (r - μ): ``reinforce_pp`` of the centred rewards."""
    return reinforce_pp_advantages(dr_grpo_advantages(rewards, prompt_index, lengths), prompt_index, lengths, eps)


def gpg_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, f_norm: float = 1.0) -> Tensor:
    """A = α (r - μ) / f_norm, α = R / number of non-zero rewards."""
    alpha = len(rewards) / max(int((rewards != 0).sum()), 1)
    return alpha * dr_grpo_advantages(rewards, prompt_index, lengths) / f_norm


def pass_at_k_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-6,
                         normalize_by_std: bool = True) -> Tensor:
    """The best response gets (r₍₁₎ - r₍₂₎) / (σ + eps), the others 0."""
    def rule(r: Tensor, _: Tensor) -> Tensor:
        advantages = torch.zeros_like(r)
        if not _equal(r):
            best, second = r.sort(descending=True).values[:2]
            advantages[r.argmax()] = (best - second) / (_std(r) + eps if normalize_by_std else 1.0)
        return advantages
    return _per_prompt(rule, rewards, prompt_index, lengths)


def vl_norm_advantages(rewards: Tensor, prompt_index: Tensor, lengths: Tensor, eps: float = 1e-6,
                       alpha: float = 1.0) -> Tensor:
    """A = A_grpo L^-α / mean_j L_j^-α, the mean over the batch; 0 for a response without tokens."""
    return grpo_advantages(rewards, prompt_index, lengths, eps) * len(rewards) * _length_share(lengths, alpha)


def _length_share(lengths: Tensor, alpha: float) -> Tensor:
    """L_i^-α / Σ_j L_j^-α over responses with tokens, 0 for the others."""
    powers = [float(length) ** -alpha if length > 0 else 0.0 for length in lengths]
    return torch.tensor([power / sum(powers) if power else 0.0 for power in powers], dtype=torch.float64)


# -- aggregations ------------------------------------------------------------------------------------------------------


def _per_token(advantages: Tensor, coefficients: Sequence[float] | Tensor, lengths: Tensor) -> Tensor:
    """w_{i,t} = A_i c_i for every token t of response i."""
    weights = [advantages[i].double() * coefficients[i] for i in range(len(lengths)) for _ in range(int(lengths[i]))]
    return torch.stack(weights) if weights else torch.zeros(0, dtype=torch.float64)


def grpo_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """c = 1 / (R L_i): mean over responses of the mean over tokens."""
    return _per_token(advantages, [1 / (len(lengths) * int(n)) if n else 0.0 for n in lengths], lengths)


def dapo_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """c = 1 / Σ_j L_j: mean over the tokens of the optimizer batch."""
    return _per_token(advantages, [1 / max(int(lengths.sum()), 1)] * len(lengths), lengths)


def bnpo_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """c = 1 / Σ_j L_j: mean over the tokens of the micro-batch."""
    return dapo_weights(advantages, prompt_index, lengths)


def dr_grpo_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor, max_length: float) -> Tensor:
    """c = 1 / (R L_max), L_max a constant of the run."""
    return seq_mean_token_sum_weights(advantages, prompt_index, lengths) / max_length


def seq_mean_token_sum_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """c = 1 / R."""
    return _per_token(advantages, [1 / len(lengths) for _ in lengths], lengths)


def prompt_mean_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor) -> Tensor:
    """c = 1 / (P Σ_{j∈q} L_j): mean over prompts of the mean over the prompt's tokens."""
    tokens = [int(lengths[prompt_index == prompt].sum()) for prompt in prompt_index]
    return _per_token(advantages, [1 / (len(prompt_index.unique()) * max(n, 1)) for n in tokens], lengths)


def vl_norm_weights(advantages: Tensor, prompt_index: Tensor, lengths: Tensor, max_length: float,
                    alpha: float = 1.0) -> Tensor:
    """c = (1/M) L_i^-α / Σ_j L_j^-α, M = max_length a constant of the run."""
    return _per_token(advantages, _length_share(lengths, alpha) / max_length, lengths)


REFERENCE_ADVANTAGES = {
    "grpo": grpo_advantages, "grpo_population_std": grpo_population_std_advantages,
    "grpo_batch_std": grpo_batch_std_advantages, "dr_grpo": dr_grpo_advantages, "rloo": rloo_advantages,
    "maxrl": maxrl_advantages, "opo": opo_advantages, "reinforce_pp": reinforce_pp_advantages,
    "reinforce_pp_baseline": reinforce_pp_baseline_advantages, "gpg": gpg_advantages,
    "pass_at_k": pass_at_k_advantages, "vl_norm": vl_norm_advantages,
}
REFERENCE_LOSS_WEIGHTS = {
    "grpo": grpo_weights, "dapo": dapo_weights, "bnpo": bnpo_weights, "dr_grpo": dr_grpo_weights,
    "seq_mean_token_sum": seq_mean_token_sum_weights, "prompt_mean": prompt_mean_weights, "vl_norm": vl_norm_weights,
}
