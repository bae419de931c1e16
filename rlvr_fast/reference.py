"""The specification: every quantity in float64, one short function each, readable next to its formula.

Nothing here is fast. Every fast path is tested against these functions; they are tested against autograd, against full
enumeration of small policies, and against closed forms. Sources are tagged as in the package's documentation:
[paper A] Suk & Duan 2025 (arXiv 2510.08539); [derived] proved for this project and checked by enumeration.

Notation: z are the logits that enter the softmax, p = softmax(z), y the sampled token, f = dz/d(raw head output),
G_i the gradient of one response's log-probability, + / - the classes of correct / incorrect responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlvr_fast.reference_advantages import *  # noqa: F403
from rlvr_fast.reference_step import *  # noqa: F403

NAN = float("nan")


# -- token level: one row of logits -----------------------------------------------------------------------------------


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
           softcap: float | None = None) -> Tensor:
    """z = cap * tanh((h Wᵀ + b) / cap) / T: [N, V]. A bias of -inf takes a token out of the vocabulary: z = -inf."""
    raw = hidden.double() @ weight.double().T
    if bias is not None:
        raw = raw + bias.double()
    if softcap is not None:
        raw = torch.where(raw == -torch.inf, raw, softcap * torch.tanh(raw / softcap))
    return raw / temperature


def logit_slope(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
                softcap: float | None = None) -> Tensor:
    """f_v = dz_v / draw_v = (1 - tanh²(raw_v / cap)) / T: [N, V]."""
    raw = hidden.double() @ weight.double().T
    if bias is not None:
        raw = raw + bias.double()
    if softcap is None:
        return torch.full_like(raw, 1.0 / temperature)
    return (1.0 - torch.tanh(raw / softcap) ** 2) / temperature


def log_prob(z: Tensor, tokens: Tensor) -> Tensor:
    """log p_y = z_y - lse(z): [N]. With the target held out, log p_y = -log1p(Σ_{v≠y} exp(z_v - z_y))."""
    behind = off_target_log_sum(z, tokens) - target_logit(z, tokens)
    return -torch.logaddexp(torch.zeros_like(behind), behind)  # log1p(exp(x)), also where exp overflows


def target_logit(z: Tensor, tokens: Tensor) -> Tensor:
    """z_y: [N]."""
    return z.gather(1, tokens[:, None]).squeeze(1)


def off_target_log_sum(z: Tensor, tokens: Tensor) -> Tensor:
    """log Σ_{v≠y} exp(z_v): [N]."""
    return z.scatter(1, tokens[:, None], -torch.inf).logsumexp(1)


def off_target_probabilities(z: Tensor, tokens: Tensor) -> Tensor:
    """p_v for v ≠ y and 0 at y: [N, V]."""
    return torch.softmax(z, 1).scatter(1, tokens[:, None], 0.0)


def off_target_mass(z: Tensor, tokens: Tensor) -> Tensor:
    """1 - p_y as Σ_{v≠y} p_v, which keeps its digits when p_y → 1: [N]."""
    return off_target_probabilities(z, tokens).sum(1)


def entropy(z: Tensor) -> Tensor:
    """H = Σ_v p_v (lse - z_v), from shifted logits: [N]. Vocabulary entries with p = 0 contribute 0."""
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(1)


def sum_p_sq(z: Tensor) -> Tensor:
    """Σ_v p_v²: [N]."""
    return torch.softmax(z, 1).square().sum(1)


def score(z: Tensor, tokens: Tensor, slope: Tensor) -> Tensor:
    """∂ log p_y / ∂ raw_v = (1[v=y] - p_v) f_v, target entry from the off-target mass: [N, V]."""
    delta = -off_target_probabilities(z, tokens)
    return delta.scatter(1, tokens[:, None], off_target_mass(z, tokens)[:, None]) * slope


def score_sq(z: Tensor, tokens: Tensor, slope: Tensor) -> Tensor:
    """‖∂ log p_y / ∂ raw‖² = f_y² (Σ_{v≠y} p_v)² + Σ_{v≠y} f_v² p_v²: [N]."""
    return score(z, tokens, slope).square().sum(1)


def hidden_gradient(token_scores: Tensor, weight: Tensor) -> Tensor:
    """∂ log p_y / ∂ h = Wᵀ ∂ log p_y / ∂ raw: [N, D]."""
    return token_scores @ weight.double()


# -- response level: gradients of log π(o) = Σ_t log p(o_t) ------------------------------------------------------------


def token_coefficients(lengths: Sequence[int], length_norm: bool) -> Tensor:
    """c_t = 1, or 1/|o_i| with length normalisation: [N]."""
    return torch.cat([torch.full((n,), 1.0 / max(n, 1) if length_norm else 1.0, dtype=torch.float64) for n in lengths])


def response_gradients_logits(token_scores: Tensor, coefficients: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """G_i = Σ_{t∈i} c_t ∂ log p_t / ∂ raw, the gradient for a bias on the raw head output: [R, V]."""
    return torch.stack([(coefficients[a:b, None] * token_scores[a:b]).sum(0) for a, b in pairwise(cu_seqlens)])


def response_gradients_hidden(token_scores: Tensor, weight: Tensor, coefficients: Tensor,
                              cu_seqlens: Sequence[int]) -> Tensor:
    """G_i = Σ_{t∈i} c_t ∂ log p_t / ∂ h_t, the gradient for a vector added to every hidden state: [R, D]."""
    return response_gradients_logits(hidden_gradient(token_scores, weight), coefficients, cu_seqlens)


def response_gradients_head(token_scores: Tensor, hidden: Tensor, coefficients: Tensor,
                            cu_seqlens: Sequence[int]) -> Tensor:
    """G_i = Σ_{t∈i} c_t (∂ log p_t / ∂ raw) h_tᵀ, the gradient for the lm_head weight, flattened: [R, V·D]."""
    scaled = coefficients[:, None] * token_scores
    return torch.stack([(scaled[a:b].T @ hidden[a:b].double()).flatten() for a, b in pairwise(cu_seqlens)])


# -- one prompt: class moments and the gap -----------------------------------------------------------------------------


def class_sum(gradients: Tensor) -> Tensor:
    """S = Σ_i G_i: [K]."""
    return gradients.sum(0)


def class_square(gradients: Tensor) -> Tensor:
    """Q = Σ_i ‖G_i‖²."""
    return gradients.square().sum()


def class_noise(gradients: Tensor) -> Tensor:
    """tr Σ̂ = (Q - ‖S‖²/n) / (n - 1), the trace of the covariance of one response's gradient; n ≥ 2."""
    n = len(gradients)
    return (class_square(gradients) - class_sum(gradients).square().sum() / n) / (n - 1)


def gap_vector(correct: Tensor, incorrect: Tensor) -> Tensor:
    """g⁺ - g⁻ = S₊/n₊ - S₋/n₋ [paper A]: [K]."""
    return correct.mean(0) - incorrect.mean(0)


def gap_norm_sq_naive(correct: Tensor, incorrect: Tensor) -> Tensor:
    """‖S₊/n₊ - S₋/n₋‖², biased up by tr Σ₊/n₊ + tr Σ₋/n₋ [derived]."""
    return gap_vector(correct, incorrect).square().sum()


def gap_norm_sq(correct: Tensor, incorrect: Tensor) -> Tensor:
    """(‖S₊‖²-Q₊)/(n₊(n₊-1)) + (‖S₋‖²-Q₋)/(n₋(n₋-1)) - 2⟨S₊,S₋⟩/(n₊n₋).

    Unbiased: the linear-kernel MMD² U-statistic.
    """

    def pairs(gradients: Tensor) -> Tensor:
        n = len(gradients)
        return (class_sum(gradients).square().sum() - class_square(gradients)) / (n * (n - 1))

    cross = class_sum(correct) @ class_sum(incorrect)
    return pairs(correct) + pairs(incorrect) - 2 * cross / (len(correct) * len(incorrect))


def gap_norm_sq_given_noise(correct: Tensor, incorrect: Tensor, noise_correct: Tensor,
                            noise_incorrect: Tensor) -> Tensor:
    """Plug-in minus noise: ‖S₊/n₊ - S₋/n₋‖² - tr Σ₊/n₊ - tr Σ₋/n₋. Equals the U-statistic when the noise is the
    classes' own; a class of a single response has none and borrows the pooled noise of the other prompts."""
    own = gap_norm_sq_naive(correct, incorrect)
    return own - noise_correct / len(correct) - noise_incorrect / len(incorrect)


def pooled_noise(classes: Sequence[Tensor]) -> Tensor:
    """tr Σ̂ pooled over prompts: Σ_p (Q_p - ‖S_p‖²/n_p) / Σ_p (n_p - 1) over the classes with n_p ≥ 2; NaN if none."""
    rich = [c for c in classes if len(c) >= 2]
    if not rich:
        return torch.tensor(NAN, dtype=torch.float64)
    squares = sum((class_noise(c) * (len(c) - 1) for c in rich), torch.zeros((), dtype=torch.float64))
    return squares / sum(len(c) - 1 for c in rich)


def gap_stderr(correct: Tensor, incorrect: Tensor) -> Tensor:
    """Two-sample jackknife: √ Σ_c (n_c-1)/n_c Σ_{i∈c} (θ₍₋ᵢ₎ - mean θ₍₋.₎)², θ = unbiased gap²; n₊, n₋ ≥ 2.

    A class left with one response has no noise of its own: its replicate keeps the full class's noise.
    """
    noise = [class_noise(correct), class_noise(incorrect)]
    variance = torch.tensor(0.0, dtype=torch.float64)
    for which, members in enumerate((correct, incorrect)):
        replicates = []
        for i in range(len(members)):
            rest = torch.cat([members[:i], members[i + 1:]])
            pair = (rest, incorrect) if which == 0 else (correct, rest)
            left = list(noise)
            if len(rest) >= 2:
                left[which] = class_noise(rest)
            replicates.append(gap_norm_sq_given_noise(*pair, *left))
        thetas = torch.stack(replicates)
        n = len(members)
        variance = variance + (n - 1) / n * (thetas - thetas.mean()).square().sum()
    return variance.sqrt()


# -- the batch ---------------------------------------------------------------------------------------------------------


def batch_gap_norm_sq(vectors: Tensor, naive: Tensor, unbiased: Tensor, weights: Tensor) -> Tensor:
    """‖Σ_p w_p ĝ_p‖² - Σ_p w_p² (plug-in_p - unbiased_p): the debiased norm of the weighted mean gap [derived]."""
    mean = (weights[:, None] * vectors).sum(0)
    return mean.square().sum() - (weights.square() * (naive - unbiased)).sum()


def alignment(direction: Tensor, vector: Tensor) -> Tensor:
    """Δμ = ⟨w, g⁺ - g⁻⟩ [paper A]."""
    return direction.double().flatten() @ vector.double().flatten()
