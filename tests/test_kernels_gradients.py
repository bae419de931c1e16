"""The Triton backend's gradients against the specification: on the GPU where there is one, else interpreted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_cases import BF16, BIASED, EPS, FP16, HALF_ULP, PROBLEMS, Case, assert_close_to_terms, random_coefficients
from policies import HeadProblem, within

import rlvr_fast.reference as ref
from rlvr_fast.backends import triton_backend
from rlvr_fast.head import Head
from rlvr_fast.kernels import config

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_hidden_gradient_matches_the_reference(problem, device):
    case = Case(problem, device)
    gradient = triton_backend.hidden_gradient(*case.inputs, case.token_pass())
    assert gradient.dtype == torch.float32
    terms = ref.hidden_gradient(case.score.abs(), case.weight.abs())
    rounding = 4 * case.error + 16 * EPS + 2 * HALF_ULP[problem.dtype]
    assert_close_to_terms(gradient, ref.hidden_gradient(case.score, case.weight), terms, rounding)


@pytest.mark.parametrize(("which", "needs"), [("both", (True, True, True)), ("logp", (False, True, False)),
                                              ("entropy", (True, False, True))], ids=str)
@pytest.mark.parametrize("problem", BIASED, ids=str)
def test_backward_matches_autograd(problem, which, needs, device, generator):
    case = Case(problem, device)
    leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    z = ref.logits(*leaves, problem.temperature, problem.softcap)
    grads = [torch.randn(problem.n_tokens, generator=generator) if which in (name, "both") else None
             for name in ("logp", "entropy")]
    objective = sum((value * grad).sum() for value, grad in
                    zip((ref.log_prob(z, case.tokens), ref.entropy(z)), grads, strict=True) if grad is not None)
    expected = torch.autograd.grad(objective, leaves)
    on_device = [None if grad is None else grad.to(device) for grad in grads]
    actual = triton_backend.linear_logprob_backward(*on_device, *case.inputs, case.token_pass(), needs)
    inputs = (case.hidden, case.weight, case.bias)
    for gradient, exact, needed, leaf in zip(actual, expected, needs, inputs, strict=True):
        assert (gradient is not None) == needed
        if needed:
            assert gradient.dtype == leaf.dtype
            rounding = 64 * (case.error + EPS) + 6 * HALF_ULP[problem.dtype]
            assert within(gradient.cpu(), exact, rtol=rounding, atol=rounding * exact.abs().max().item())


def test_blocks_do_not_change_the_gradients(device, generator, monkeypatch):
    """Several blocks of tokens and of vocabulary add up to the gradient from one block, to rounding."""
    case = Case(HeadProblem(70, 16, 20), device)
    grads = [torch.randn(20, generator=generator).to(device) for _ in range(2)]
    arguments = (*grads, *case.inputs, case.token_pass(), (True, True, False))
    whole = triton_backend.linear_logprob_backward(*arguments)
    monkeypatch.setattr(config, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_backend, "_BLOCK_ROWS", 16)
    for one, many in zip(whole[:2], triton_backend.linear_logprob_backward(*arguments)[:2], strict=True):
        assert within(many.cpu(), one.cpu(), rtol=64 * EPS, atol=64 * EPS * one.abs().max().item())


def test_fp16_gradients_of_small_coefficients_do_not_vanish(device):
    """A loss averaged over 1e7 tokens has coefficients below fp16's smallest number; the gradient's ratio stays."""
    case = Case(HeadProblem(101, 16, 8, FP16), device)
    ones = torch.ones(8).to(device)

    def hidden_gradient(coefficient):
        case32 = (case.inputs[0].float(), case.inputs[1], Head(case.head.weight.float()))
        half = triton_backend.linear_logprob_backward(ones * coefficient, None, *case.inputs, case.token_pass(),
                                                      (False, True, False))[1]
        full = triton_backend.linear_logprob_backward(ones * coefficient, None, *case32, case.token_pass(),
                                                      (False, True, False))[1]
        return half.cpu(), full.cpu()

    half, full = hidden_gradient(1e-3)
    assert within(half, full, rtol=2.0**-9, atol=2.0**-9 * full.abs().max().item())
    tiny_half, tiny_full = hidden_gradient(1e-7)
    smallest = 2.0**-24  # of fp16, the dtype of the result
    assert within(tiny_half, tiny_full, rtol=2.0**-9, atol=smallest)


@pytest.mark.parametrize("width", [5, 40], ids=["slices", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gram_matrices_match_the_reference(width, dtype, device, generator, monkeypatch):
    """Two prompts, interleaved spans, an empty response; more tokens than D and fewer; several vocabulary slices."""
    monkeypatch.setattr(config, "CHUNK_BYTES", 4096)
    problem = HeadProblem(101, width, 20, dtype, temperature=0.7, softcap=9.0)
    case = Case(problem, device)
    cu_seqlens = [0, 6, 6, 11, 20]
    spans = list(pairwise(cu_seqlens))
    groups = [[0, 1, 3], [2]]
    coefficients = random_coefficients(20, generator)
    actual = triton_backend.head_gram(*case.inputs, case.token_pass(), coefficients.to(device),
                                      [[spans[i] for i in group] for group in groups])
    gradients = ref.response_gradients_head(case.score, case.hidden, coefficients.double(), cu_seqlens)
    for gram, group in zip(actual, groups, strict=True):
        expected = gradients[group] @ gradients[group].T
        norms = expected.diagonal().sqrt()
        assert gram.dtype == torch.float64
        rounding = 16 * (case.error + EPS) + 4 * HALF_ULP[dtype]
        assert ((gram.cpu() - expected).abs() <= rounding * norms[:, None] * norms[None, :]).all()
