"""Peers that need nothing but torch: eager and compiled with [N, V] in memory, and library products in chunks.

None lacks anything. Eager and compiled code takes its logits in the operands' dtype, as an lm_head layer gives them;
the chunked ones ask the library for float32, which is the accuracy that the project's own error is held against.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch.nn.functional import linear, log_softmax

import rlvr_fast as rf
from rlvr_fast.bench.workload import GROUP_SIZE, RESPONSES, Workload

from .inputs import GivenLogits, Steps
from .suite import Provider, Result

STATISTICS = ("logp", "entropy", "sum_p_sq", "score_sq")
CHUNK_BYTES = 500_000_000  # float32 logits held at a time: the project's bound on extra memory
FP32_CHUNKS = "torch fp32 chunks"  # the accuracy to be compared with


def chunk_rows(vocabulary: int) -> int:
    """Rows of float32 logits in CHUNK_BYTES, a multiple of 64."""
    return max(CHUNK_BYTES // (4 * vocabulary) // 64 * 64, 64)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as float32, the dtype of the library's accumulators."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def _chunks(inputs: Workload) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    step = chunk_rows(inputs.shape.vocabulary)
    return zip(inputs.hidden.split(step), inputs.tokens.split(step), strict=True)


def compile_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for ``device``; None if it can."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE=1)"
    names = ("gcc", "clang", "cc") if device.type == "cuda" else ("g++", "clang++")
    return None if any(map(shutil.which, names)) else f"torch.compile finds no compiler ({', '.join(names)})"


def compiled(function: Callable) -> Callable:
    """torch.compile for fixed shapes, at the first call."""
    build = cache(partial(torch.compile, function, dynamic=False))
    return lambda *arguments: build()(*arguments)


# -- statistics --------------------------------------------------------------------------------------------------------


def _rows(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_p = log_softmax(logits.float(), -1)
    p = log_p.exp()
    logp = log_p.gather(1, tokens[:, None]).squeeze(1)
    sum_p_sq = p.square().sum(1)
    return logp, -(p * log_p).sum(1), sum_p_sq, 1 - 2 * logp.exp() + sum_p_sq


def _statistics(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _rows(linear(hidden, weight), tokens)


_compiled_rows, _compiled_statistics = compiled(_rows), compiled(_statistics)


def _named(values: tuple[torch.Tensor, ...]) -> Result:
    return dict(zip(STATISTICS, values, strict=True))


def _at_once(inputs: Workload, function: Callable) -> Result:
    return _named(function(inputs.hidden, inputs.weight, inputs.tokens))


def _in_chunks(inputs: Workload, rows: Callable) -> Result:
    parts = [rows(product(hidden, inputs.weight.T), tokens) for hidden, tokens in _chunks(inputs)]
    return _named(tuple(map(torch.cat, zip(*parts, strict=True))))


def _given(inputs: GivenLogits, rows: Callable) -> Result:
    return _named(rows(inputs.logits, inputs.tokens))


def statistics(device: torch.device) -> tuple[Provider, ...]:
    no_compiler = compile_missing(device)
    return (Provider("torch eager", partial(_at_once, function=_statistics)),
            Provider("torch.compile", partial(_at_once, function=_compiled_statistics), missing=no_compiler),
            Provider(FP32_CHUNKS, partial(_in_chunks, rows=_rows)),
            Provider(f"{FP32_CHUNKS} compiled", partial(_in_chunks, rows=_compiled_rows), missing=no_compiler))


def rows(device: torch.device) -> tuple[Provider, ...]:
    return (Provider("torch eager", partial(_given, rows=_rows)),
            Provider("torch.compile", partial(_given, rows=_compiled_rows), missing=compile_missing(device)))


# -- gradients ---------------------------------------------------------------------------------------------------------


def _logp(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = log_softmax(linear(hidden, weight).float(), -1)
    detached = log_p.detach()
    return log_p.gather(1, tokens[:, None]).squeeze(1), -(detached.exp() * detached).sum(1)


_compiled_logp = compiled(_logp)


def differentiate(inputs: Workload, logp_and_more: Callable, names: tuple[str, ...], with_weight: bool) -> Result:
    """Forward and backward of ``logp_and_more`` (hidden, weight, tokens) -> logp and what ``names`` says.

    Per-token gradients of logp by hidden or, ``with_weight``, gradients of Σ c logp by hidden and weight.
    """
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(with_weight)
    values = logp_and_more(hidden, weight, inputs.tokens)
    outer = inputs.coefficients if with_weight else torch.ones_like(inputs.coefficients)
    wanted = (hidden, weight) if with_weight else (hidden,)
    gradients = torch.autograd.grad(values[0], wanted, outer.to(values[0].dtype))
    named = {name: value.detach() for name, value in zip(names, values, strict=True)}
    return named | dict(zip(("hidden_grad", "weight_grad"), gradients, strict=False))


def _gradient_in_chunks(inputs: Workload) -> Result:
    """Two library products per chunk; the derivatives are rounded to the operands' dtype between them."""
    parts = []
    for hidden, tokens in _chunks(inputs):
        p = torch.softmax(product(hidden, inputs.weight.T), -1).neg_()
        p.scatter_add_(1, tokens[:, None], p.new_ones(len(tokens), 1))
        parts.append(product(p.to(hidden.dtype), inputs.weight))
    return {"hidden_grad": torch.cat(parts)}


def gradients(device: torch.device, with_weight: bool) -> tuple[Provider, ...]:
    run = partial(differentiate, names=("logp", "entropy"), with_weight=with_weight)
    autograd = (Provider("torch eager", partial(run, logp_and_more=_logp)),
                Provider("torch.compile", partial(run, logp_and_more=_compiled_logp), missing=compile_missing(device)))
    return autograd if with_weight else (*autograd, Provider(FP32_CHUNKS, _gradient_in_chunks, lacks="statistics"))


# -- gap: the gradients of all responses, then the estimator that rlvr_fast uses too ---------------------------------


def gap_of(gradients: torch.Tensor, inputs: Workload, level: str) -> Result:
    rollouts = inputs.rollouts
    responses = rf.Responses(rollouts.correct, rollouts.prompt_index, rollouts.prompt_ids)
    found = rf.gap_from_gradients(rf.ResponseGradients(responses, gradients), level=level, length_norm=True,
                                  sizes=[len(prompt) for prompt in rollouts.members])
    return {"gradients": gradients, "norm_sq": found.norm_sq}


def _column_means(logits: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Mean over each response's tokens of one-hot minus p; equal lengths make it a view."""
    means = -torch.softmax(logits.float(), -1).view(-1, length, logits.shape[1]).mean(1)
    return means.scatter_add(1, tokens.view(-1, length), means.new_full((len(means), length), 1 / length))


_compiled_column_means = compiled(_column_means)


def _column_sums(inputs: Workload, means: Callable) -> Result:
    """Whole responses in chunks of float32 logits, then the means through the lm_head."""
    length, parts = inputs.shape.length, []
    step = max(chunk_rows(inputs.shape.vocabulary) // length, 1) * length
    for hidden, tokens in zip(inputs.hidden.split(step), inputs.tokens.split(step), strict=True):
        parts.append(means(product(hidden, inputs.weight.T), tokens, length))
    return gap_of(product(torch.cat(parts).to(inputs.weight.dtype), inputs.weight), inputs, "hidden")


def _one_backward(inputs: Workload, logp_and_more: Callable) -> Result:
    gradient = differentiate(inputs, logp_and_more, ("logp", "entropy"), False)["hidden_grad"]
    return gap_of(gradient.float().unflatten(0, (RESPONSES, -1)).mean(1), inputs, "hidden")


def hidden_gap(device: torch.device) -> tuple[Provider, ...]:
    no_compiler = compile_missing(device)
    return (Provider(f"{FP32_CHUNKS}: column sums", partial(_column_sums, means=_column_means)),
            Provider(f"{FP32_CHUNKS} compiled: column sums", partial(_column_sums, means=_compiled_column_means),
                     missing=no_compiler),
            Provider("torch eager: one backward", partial(_one_backward, logp_and_more=_logp)),
            Provider("torch.compile: one backward", partial(_one_backward, logp_and_more=_compiled_logp),
                     missing=no_compiler))


def _token_pairs(inputs: Workload) -> Result:
    """⟨G_i, G_j⟩ = Σ_{t∈i, u∈j} ⟨s_t, s_u⟩⟨h_t, h_u⟩ / length², one prompt's scores [M, V] at a time."""
    length, grams = inputs.shape.length, []
    rows = GROUP_SIZE * length
    for hidden, tokens in zip(inputs.hidden.split(rows), inputs.tokens.split(rows), strict=True):
        scores = torch.softmax(product(hidden, inputs.weight.T), -1).neg_()
        scores.scatter_add_(1, tokens[:, None], scores.new_ones(len(tokens), 1))
        scores = scores.to(hidden.dtype)
        pairs = product(scores, scores.T) * product(hidden, hidden.T) / length**2
        grams.append(pairs.unflatten(0, (-1, length)).unflatten(2, (-1, length)).sum((1, 3)))
    return {"gram": torch.stack(grams)}


def _weight_gradients(inputs: Workload) -> Result:
    """What a training script would write: autograd's [V, D] gradient of one response after the other."""
    weight, length, grams = inputs.weight.detach().requires_grad_(), inputs.shape.length, []
    pairs = list(zip(inputs.hidden.split(length), inputs.tokens.split(length), strict=True))
    for prompt in inputs.rollouts.members:
        means = (_logp(hidden, weight, tokens)[0].mean() for hidden, tokens in (pairs[i] for i in prompt))
        # [V, G, D]: one small product per vocabulary entry keeps a GPU busy, one of depth V·D does not.
        rows = torch.stack([torch.autograd.grad(mean, weight)[0] for mean in means], dim=1)
        grams.append(_batched_product(rows, rows.mT).sum(0))
    return {"gram": torch.stack(grams)}


def _batched_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``product`` of a batch."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def head_gap(device: torch.device) -> tuple[Provider, ...]:
    return (Provider(f"{FP32_CHUNKS}: token pairs", _token_pairs, lacks="the estimate"),
            Provider("autograd: per response", _weight_gradients, lacks="the estimate"))


# -- no vocabulary -----------------------------------------------------------------------------------------------------


def _grouped_weights(rewards: torch.Tensor, length: int) -> torch.Tensor:
    groups = rewards.view(-1, GROUP_SIZE)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    return (advantages / (length * len(rewards)))[:, None].expand(-1, length).flatten()


def _grouped_step(before: torch.Tensor, after: torch.Tensor, reverse: torch.Tensor, correct: torch.Tensor
                  ) -> tuple[torch.Tensor, ...]:
    """[P] each, from a [P, G] view with the class as a mask."""
    def per_response(logp):
        return (logp - before).view(-1, GROUP_SIZE, before.numel() // correct.numel()).sum(2, dtype=torch.float64)

    forward, backward = per_response(after), per_response(reverse)
    s, h = (forward - backward) / 2, forward + backward

    def of_class(mask):
        n = mask.sum(1).double()
        gain = forward.masked_fill(~mask, -torch.inf).logsumexp(1) - n.log()
        mean_s, mean_h = (s * mask).sum(1) / n, (h * mask).sum(1) / n
        return gain, mean_s, ((s - mean_s[:, None]).square() * mask).sum(1) / (n - 1) + mean_h

    mask = correct.view(-1, GROUP_SIZE)
    return tuple(a - b for a, b in zip(of_class(mask), of_class(~mask), strict=True))


_compiled_weights, _compiled_step = compiled(_grouped_weights), compiled(_grouped_step)


def _weights(inputs: Steps, function: Callable) -> Result:
    return {"weights": function(inputs.rollouts.rewards, inputs.rollouts.bounds[1])}


def _step(inputs: Steps, function: Callable) -> Result:
    values = function(inputs.logp_before, inputs.logp_after, inputs.logp_reverse, inputs.rollouts.correct)
    return dict(zip(("log_odds_gain", "alignment", "curvature"), values, strict=True))


def advantages(device: torch.device) -> tuple[Provider, ...]:
    return (Provider("torch eager: grouped view", partial(_weights, function=_grouped_weights)),
            Provider("torch.compile: grouped view", partial(_weights, function=_compiled_weights),
                     missing=compile_missing(device)))


def steps(device: torch.device) -> tuple[Provider, ...]:
    lacks = "errors and pooled figures"
    return (Provider("torch eager: grouped view", partial(_step, function=_grouped_step), lacks=lacks),
            Provider("torch.compile: grouped view", partial(_step, function=_compiled_step), lacks=lacks,
                     missing=compile_missing(device)))
