"""Suites gradient_gap at three levels: per-response gradients of 64 responses, then the same estimator for everyone."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear, log_softmax, softmax

import rlvr_fast as rf
from rlvr_fast.bench.head_suites import FLOOR, NATIVE_MISSING, trl_chunked
from rlvr_fast.bench.suite import COMPILE_MISSING, TRL_MISSING, Provider, Suite, compiled
from rlvr_fast.bench.truth import head_truth, relative_error
from rlvr_fast.bench.workload import RESPONSES, Workload
from rlvr_fast.estimates import GapEstimate, estimate_gap


def _rlvr_gap(workload: Workload, level: str, backend: str) -> rf.Gap:
    return rf.gradient_gap(workload.hidden, workload.weight, workload.rollouts, level=level, backend=backend)


def _responses(workload: Workload) -> rf.Responses:
    rollouts = workload.rollouts
    return rf.Responses(rollouts.correct, rollouts.prompt_index, rollouts.prompt_ids)


def _gap_of(gradients, workload: Workload, level: str) -> rf.Gap:
    """A peer's [R, K] response gradients, then the estimator that rlvr_fast uses too."""
    vectors = rf.ResponseGradients(_responses(workload), gradients(workload))
    return rf.gap_from_gradients(vectors, level=level, length_norm=True)


def _vector_error(gap: rf.Gap, workload: Workload, level: str) -> float:
    return relative_error(gap.gradients.vectors, getattr(head_truth(workload), level))


# -- column sums of (one-hot − p); equal lengths let the peers use a plain mean ----------------------------------------


def _column_means(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[R, V]: mean over each response's tokens of one-hot − p."""
    length = hidden.shape[0] // RESPONSES
    p = softmax(linear(hidden, weight), -1)
    means = -p.view(RESPONSES, length, -1).mean(1)
    return means.scatter_add(1, tokens.view(RESPONSES, length), means.new_full((RESPONSES, length), 1 / length))


def _column_means_through_head(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return _column_means(hidden, weight, tokens) @ weight


_compiled_column_means = compiled(_column_means)
_compiled_through_head = compiled(_column_means_through_head)


def _gradients(workload: Workload, function) -> torch.Tensor:
    return function(workload.hidden, workload.weight, workload.tokens)


# -- autograd ----------------------------------------------------------------------------------------------------------


def _logp_sum(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_softmax(logits, -1).gather(1, tokens[:, None]).sum()


def _mean_per_response(token_gradients: torch.Tensor) -> torch.Tensor:
    return token_gradients.unflatten(0, (RESPONSES, -1)).mean(1)


def _one_backward_hidden(workload: Workload) -> torch.Tensor:
    hidden = workload.hidden.detach().requires_grad_()
    total = _logp_sum(linear(hidden, workload.weight), workload.tokens)
    return _mean_per_response(*torch.autograd.grad(total, hidden))


def _one_backward_logits(workload: Workload) -> torch.Tensor:
    logits = linear(workload.hidden, workload.weight).requires_grad_()
    return _mean_per_response(*torch.autograd.grad(_logp_sum(logits, workload.tokens), logits))


def _per_response_hidden(workload: Workload) -> torch.Tensor:
    """The loop that a training script would write: forward and backward of one response at a time."""
    gradients = []
    for hidden, tokens in _each_response(workload):
        hidden.requires_grad_()
        gradients.append(torch.autograd.grad(_logp_sum(linear(hidden, workload.weight), tokens), hidden)[0].mean(0))
    return torch.stack(gradients)


def _trl_one_backward(workload: Workload) -> torch.Tensor:
    hidden = workload.hidden.detach().requires_grad_()
    logp, *_ = trl_chunked(hidden, workload.weight, workload.tokens, ())
    return _mean_per_response(*torch.autograd.grad(logp.sum(), hidden))


def _each_response(workload: Workload) -> list[tuple[torch.Tensor, torch.Tensor]]:
    length = workload.shape.length
    pairs = zip(workload.hidden.split(length), workload.tokens.split(length), strict=True)
    return [(hidden.detach(), tokens) for hidden, tokens in pairs]


# -- level head: Gram matrices of the lm_head's weight gradients -------------------------------------------------------


def _estimate_of(grams, workload: Workload) -> tuple[list[torch.Tensor], GapEstimate]:
    grams = grams(workload)
    moments = rf.Moments.from_gram(_responses(workload), [gram.double() for gram in grams])
    return grams, estimate_gap(moments)


def _per_response_head(workload: Workload) -> list[torch.Tensor]:
    """[G, V·D] gradients of one prompt at a time."""
    weight, responses, grams = workload.weight.detach().requires_grad_(), _each_response(workload), []
    for prompt in workload.rollouts.members:
        gradients = torch.empty(len(prompt), weight.numel())
        for row, response in enumerate(prompt):
            hidden, tokens = responses[response]
            mean = _logp_sum(linear(hidden, weight), tokens) / len(tokens)
            gradients[row] = torch.autograd.grad(mean, weight)[0].flatten()
        grams.append(gradients @ gradients.T)
    return grams


def _token_pairs(workload: Workload) -> list[torch.Tensor]:
    """⟨Σ_t s_t h_tᵀ, Σ_u s_u h_uᵀ⟩ = Σ_{t,u} ⟨s_t, s_u⟩⟨h_t, h_u⟩, scores s of all tokens at once: [N, V]."""
    length = workload.shape.length
    scores = softmax(linear(workload.hidden, workload.weight), -1).neg_()
    scores.scatter_add_(1, workload.tokens[:, None], scores.new_ones(len(scores), 1))
    rows = len(workload.rollouts.members[0]) * length
    grams = []
    for score, hidden in zip(scores.split(rows), workload.hidden.split(rows), strict=True):
        pairs = (score @ score.T) * (hidden @ hidden.T) / length**2
        grams.append(pairs.unflatten(0, (-1, length)).unflatten(2, (-1, length)).sum((1, 3)))
    return grams


def _gram_error(result, workload: Workload) -> float:
    grams = result.gram if isinstance(result, rf.Gap) else result[0]
    return relative_error(torch.stack(list(grams)), head_truth(workload).gram)


# -- the suites --------------------------------------------------------------------------------------------------------


def _peer(name: str, gradients, level: str, missing: str | None = None, compiled: bool = False) -> Provider:
    return Provider(name, partial(_gap_of, gradients, level=level), missing, compiled)


def _ours(level: str, backend: str) -> Provider:
    missing = NATIVE_MISSING if backend == "native" else None
    return Provider(f"rlvr_fast {backend}", partial(_rlvr_gap, level=level, backend=backend), missing)


HIDDEN = Suite(
    "gradient_gap hidden",
    (
        FLOOR,
        _ours("hidden", "native"),
        _ours("hidden", "torch"),
        _peer("torch eager, column sums", partial(_gradients, function=_column_means_through_head), "hidden"),
        _peer("torch.compile, column sums", partial(_gradients, function=_compiled_through_head), "hidden",
              COMPILE_MISSING, True),
        _peer("autograd, one backward", _one_backward_hidden, "hidden"),
        _peer("autograd, per response", _per_response_hidden, "hidden"),
        _peer("trl chunked, one backward", _trl_one_backward, "hidden", TRL_MISSING),
    ),
    partial(_vector_error, level="hidden"), "max |ΔG| / max |G|", flops=lambda shape: shape.product_flops)

LOGITS = Suite(
    "gradient_gap logits",
    (
        FLOOR,
        _ours("logits", "native"),
        _peer("torch eager, column sums", partial(_gradients, function=_column_means), "logits"),
        _peer("torch.compile, column sums", partial(_gradients, function=_compiled_column_means), "logits",
              COMPILE_MISSING, True),
        _peer("autograd, one backward", _one_backward_logits, "logits"),
    ),
    partial(_vector_error, level="logits"), "max |ΔG| / max |G|", flops=lambda shape: shape.product_flops)

HEAD = Suite(
    "gradient_gap head",
    (
        FLOOR,
        Provider("rlvr_fast", partial(_rlvr_gap, level="head", backend="auto")),
        Provider("torch eager, token pairs", partial(_estimate_of, _token_pairs)),
        Provider("autograd, per response", partial(_estimate_of, _per_response_head)),
    ),
    _gram_error, "max |ΔGram| / max |Gram|", flops=lambda shape: 2 * shape.product_flops)
