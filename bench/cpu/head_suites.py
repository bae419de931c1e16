"""Suites token_stats and linear_logprob: statistics of sampled tokens, and the differentiable log-prob."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch.nn.functional import linear, log_softmax

import rlvr_fast as rf
from rlvr_fast.backends import native_backend
from rlvr_fast.bench.suite import (
    COMPILE_MISSING,
    TRL_CHUNK_SIZE,
    TRL_MISSING,
    ChunkedLogProbFunction,
    Provider,
    Suite,
    compiled,
)
from rlvr_fast.bench.truth import head_truth, relative_error
from rlvr_fast.bench.workload import Shape, Workload

NATIVE_MISSING = native_backend.unavailable(torch.device("cpu"))

# -- floors ------------------------------------------------------------------------------------------------------------


@cache
def _buffer(shape: Shape) -> torch.Tensor:
    return torch.empty(shape.n_tokens, shape.vocabulary)


def gemm(workload: Workload) -> torch.Tensor:
    """[N, V] logits into a buffer that is there already."""
    return torch.mm(workload.hidden, workload.weight.T, out=_buffer(workload.shape))


def gemm_onednn(workload: Workload) -> torch.Tensor:
    """The same product by oneDNN, which torch ships but uses for float32 only in compiled inference."""
    return torch.ops.mkldnn._linear_pointwise(workload.hidden, workload.weight, None, "none", [], "")


FLOOR = Provider("gemm", gemm, check=lambda result, workload: float("nan"))


def _logp_error_of_logits(logits: torch.Tensor, workload: Workload) -> float:
    chunks = zip(logits.split(256), workload.tokens.split(256), strict=True)
    logp = [z.double().log_softmax(1).gather(1, tokens[:, None]).squeeze(1) for z, tokens in chunks]
    return float((torch.cat(logp) - head_truth(workload).logp).abs().max())


# -- token_stats: (logp, entropy, Σp², score norm) ---------------------------------------------------------------------


def _rlvr_stats(workload: Workload, backend: str) -> tuple[torch.Tensor, ...]:
    stats = rf.token_stats(workload.hidden, workload.weight, workload.tokens, backend=backend)
    return stats.logp, stats.entropy, stats.sum_p_sq, stats.score_sq


def _statistics(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_p = log_softmax(linear(hidden, weight), -1)
    p = log_p.exp()
    logp = log_p.gather(1, tokens[:, None]).squeeze(1)
    sum_p_sq = p.square().sum(1)
    return logp, -(p * log_p).sum(1), sum_p_sq, 1 - 2 * logp.exp() + sum_p_sq


_compiled_statistics = compiled(_statistics)


def _torch_stats(workload: Workload, function) -> tuple[torch.Tensor, ...]:
    return function(workload.hidden, workload.weight, workload.tokens)


def trl_chunked(hidden, weight, tokens, outputs: tuple[str, ...]) -> tuple[torch.Tensor | None, ...]:
    """The operator behind TRL's fused lm_head at TRL's own tile size: (logp, entropy, log Σp², ...)."""
    return ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, TRL_CHUNK_SIZE, None, 1.0, outputs)


def _trl_stats(workload: Workload) -> tuple[torch.Tensor, ...]:
    logp, entropy, log_sum_p_sq, *_ = trl_chunked(workload.hidden, workload.weight, workload.tokens,
                                                  ("entropy", "log_sum_sq_probs"))
    sum_p_sq = log_sum_p_sq.exp()
    return logp, entropy, sum_p_sq, 1 - 2 * logp.exp() + sum_p_sq


def _logp_error(result: tuple[torch.Tensor, ...], workload: Workload) -> float:
    return float((result[0].double() - head_truth(workload).logp).abs().max())


ONEDNN_MISSING = None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"
TOKEN_STATS = Suite(
    "token_stats",
    (
        Provider("gemm", gemm, check=_logp_error_of_logits),
        Provider("gemm, oneDNN", gemm_onednn, ONEDNN_MISSING, check=_logp_error_of_logits),
        Provider("rlvr_fast native", partial(_rlvr_stats, backend="native"), NATIVE_MISSING),
        Provider("rlvr_fast torch", partial(_rlvr_stats, backend="torch")),
        Provider("torch eager", partial(_torch_stats, function=_statistics)),
        Provider("torch.compile", partial(_torch_stats, function=_compiled_statistics), COMPILE_MISSING, True),
        Provider("trl chunked", _trl_stats, TRL_MISSING),
    ),
    _logp_error, "max |Δlogp|", flops=lambda shape: shape.product_flops)


# -- linear_logprob: logp and entropy forward, gradients of Σ c logp for hidden and weight -----------------------------


def _forward_backward(workload: Workload, function) -> tuple[torch.Tensor, ...]:
    hidden, weight = workload.hidden.detach().requires_grad_(), workload.weight.detach().requires_grad_()
    logp, entropy, *_ = function(hidden, weight, workload.tokens)
    gradients = torch.autograd.grad((workload.coefficients * logp).sum(), (hidden, weight))
    return logp.detach(), entropy.detach(), *gradients


def _logprob(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_p = log_softmax(linear(hidden, weight), -1)
    detached = log_p.detach()
    return log_p.gather(1, tokens[:, None]).squeeze(1), -(detached.exp() * detached).sum(1)


_compiled_logprob = compiled(_logprob)


def _gradient_error(result: tuple[torch.Tensor, ...], workload: Workload) -> float:
    truth = workload.coefficients.double()[:, None] * head_truth(workload).token_gradient
    return relative_error(result[2], truth)


LINEAR_LOGPROB = Suite(
    "linear_logprob fwd+bwd",
    (
        FLOOR,
        Provider("rlvr_fast", partial(_forward_backward, function=rf.linear_logprob)),
        Provider("torch eager", partial(_forward_backward, function=_logprob)),
        Provider("torch.compile", partial(_forward_backward, function=_compiled_logprob), COMPILE_MISSING, True),
        Provider("trl chunked", partial(_forward_backward, function=partial(trl_chunked, outputs=("entropy",))),
                 TRL_MISSING),
    ),
    _gradient_error, "max |Δ∇hidden| / max |∇hidden|", flops=lambda shape: 3 * shape.product_flops)
