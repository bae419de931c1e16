"""The Triton backend's gradients against the specification: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BF16,
    BIASED,
    EPS,
    FP16,
    PROBLEMS,
    Case,
    assert_close_to_terms,
    assert_grams,
    assert_pass,
    peaked,
    random_coefficients,
)
from policies import HeadProblem, within

import rlvr_fast.reference as ref
from rlvr_fast.backends import triton_backend, triton_blocks
from rlvr_fast.head import Head
from rlvr_fast.kernels import config

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_hidden_gradient_matches_the_reference(problem, device):
    case = Case(problem, device)
    gradient = triton_backend.hidden_gradient(*case.inputs, case.token_pass())
    assert gradient.dtype == torch.float32
    assert_close_to_terms(gradient, *case.hidden_gradient(), case.derivative_error)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradient_with_the_pass_matches_the_reference(problem, chunk_bytes, device, monkeypatch):
    """No digit is lost to the pass's own probabilities, so the bound is that of the gradient after an exact pass."""
    monkeypatch.setattr(config, "CHUNK_BYTES", chunk_bytes)
    case = Case(problem, device)
    actual, gradient = triton_backend.head_pass_with_gradient(*case.inputs)
    assert_pass(actual, case.expected, case.error)
    assert gradient.dtype == torch.float32
    assert_close_to_terms(gradient, *case.hidden_gradient(), case.derivative_error)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_gradients_of_nearly_certain_tokens_keep_their_digits(dtype, device):
    """p_y = 1 - 5e-4 to 1 - 5e-11: the target's entry of the derivative is the off-target mass, not 1 - p."""
    case = peaked(device, dtype)
    assert (1 - case.expected["off_mass"]).float().max() == 1.0
    for gradient in (triton_backend.hidden_gradient(*case.inputs, case.token_pass()),
                     triton_backend.head_pass_with_gradient(*case.inputs)[1]):
        assert_close_to_terms(gradient, *case.hidden_gradient(), case.derivative_error)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_slices_a_thousand_nats_apart(dtype, offset, device, generator):
    """Whole slices of the vocabulary lie 1000 nats above or below the rest, or at -inf: offsets grow and fall by 1443
    powers of two, further than any float reaches, and the sampled tokens lie on both sides."""
    hidden, weight, tokens, bias = HeadProblem(200, 8, 12, dtype, bias="random").tensors()
    bias[64:128] += offset
    bias[128:192] = -torch.inf
    tokens = tokens % 128
    tokens[:3] = tokens[:3] % 64 + 64
    case = Case(HeadProblem(200, 8, 12, dtype), device, (hidden, weight, tokens, bias))
    coefficients, cu_seqlens = random_coefficients(12, generator), torch.tensor([0, 5, 12])
    actual, gradient = triton_backend.head_pass_with_gradient(*case.inputs)
    assert_pass(actual, case.expected, case.error)
    assert_close_to_terms(gradient, *case.hidden_gradient(), case.derivative_error)
    _, sums = triton_backend.head_pass_with_sums(*case.inputs, coefficients.to(device), cu_seqlens.to(device))
    assert_close_to_terms(sums, *case.score_sums(coefficients, cu_seqlens), case.derivative_error)
    grams = triton_backend.head_pass_with_gram(*case.inputs, coefficients.to(device), [[(0, 5), (5, 12)]])[1]
    assert_grams(grams, case, coefficients, [0, 5, 12], [[0, 1]])


@pytest.mark.parametrize(("n_processors", "parts"), [(1, 1), (3, 3), (132, 32)])
def test_a_long_product_in_parts(n_processors, parts, device, generator, monkeypatch):
    """As many parts as the multiprocessors ask for, and a rest; 1100 fp32 additions err by half a unit each at most."""
    monkeypatch.setattr(triton_blocks, "processors", lambda device: n_processors)
    assert triton_blocks._parts(1, n_processors) == parts
    a, b = torch.randn(5, 1100, generator=generator), torch.randn(1100, 7, generator=generator)
    actual = triton_blocks.long_product(a.to(device), b.to(device)).cpu()
    assert_close_to_terms(actual, a.double() @ b.double(), a.abs().double() @ b.abs().double(), 1100 * EPS / 2)


def test_a_flat_tail_keeps_its_mass_in_fp16(device):
    """2000 tokens at 2^-30 of the largest, below fp16's smallest number if it stood at 1: their share of the gradient
    stays, to half a unit of 2^-40 each."""
    weight = torch.zeros(2001, 2)
    weight[:, 1] = torch.arange(2001) % 2 + 1.0  # what the tail pulls on
    weight[0, 0], weight[0, 1] = 1.0, 0.0
    hidden = torch.tensor([[20.75, 0.0]])  # 20.75 nats are 29.9 binary digits
    tokens = torch.tensor([0])
    bias = torch.zeros(2001)
    bias[1] = 20.75  # another token as large as the target
    case = Case(HeadProblem(2001, 2, 1, FP16), device, (hidden.half(), weight.half(), tokens, bias))
    _, gradient = triton_backend.head_pass_with_gradient(*case.inputs)
    expected = case.hidden_gradient()[0][0, 1]
    tail = (case.score[0, 2:] @ case.weight[2:, 1].double()).item()
    assert abs(tail) > 1e-6
    error = case.derivative_error * case.score[0, 1].abs().item() + 2000 * 2.0**-40
    assert abs(gradient[0, 1].item() - expected.item()) <= error
    rollouts = (torch.ones(1).to(device), torch.tensor([0, 1]).to(device))
    sums = triton_backend.head_pass_with_sums(*case.inputs, *rollouts)[1][0, 2:]
    assert within(sums.sum().cpu(), case.score[0, 2:].sum(), rtol=case.derivative_error, atol=2000 * 2.0**-40)


def test_results_repeat_bit_for_bit(device, generator):
    case = Case(HeadProblem(67, 24, 20, BF16), device)
    coefficients = random_coefficients(20, generator).to(device)
    assert torch.equal(*(triton_backend.head_pass_with_gradient(*case.inputs)[1] for _ in range(2)))
    assert torch.equal(*(triton_backend.head_pass_with_gram(*case.inputs, coefficients, [[(0, 9), (9, 20)]])[1][0]
                         for _ in range(2)))


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
    for gradient, exact, needed in zip(actual, expected, needs, strict=True):
        assert (gradient is not None) == needed
        if needed:
            assert gradient.dtype == torch.float32
            rounding = 64 * (case.error + EPS) + 2 * case.rounding
            assert within(gradient.cpu(), exact, rtol=rounding, atol=rounding * exact.abs().max().item())


def test_blocks_do_not_change_the_gradients(device, generator, monkeypatch):
    """Several blocks of tokens and of vocabulary add up to the gradient from one block, to rounding."""
    case = Case(HeadProblem(70, 16, 20), device)
    grads = [torch.randn(20, generator=generator).to(device) for _ in range(2)]
    arguments = (*grads, *case.inputs, case.token_pass(), (True, True, False))
    whole = triton_backend.linear_logprob_backward(*arguments)
    monkeypatch.setattr(config, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_blocks, "BLOCK_ROWS", 16)
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


