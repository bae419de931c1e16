"""The Triton backend's statistics against the specification: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BF16,
    EPS,
    FP16,
    PROBLEMS,
    Case,
    assert_close_to_terms,
    assert_pass,
    peaked,
    random_coefficients,
)
from policies import HeadProblem, within

import rlvr_fast.reference as ref
from rlvr_fast.backends import TokenPass, triton_backend
from rlvr_fast.head import Head
from rlvr_fast.kernels import config

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]


# -- statistics and sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_statistics_match_the_reference(problem, device):
    case = Case(problem, device)
    actual = triton_backend.head_pass(*case.inputs)
    assert_pass(actual, case.expected, case.error)
    assert (actual.logp <= 0).all()


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_score_sums_match_the_reference(problem, chunk_bytes, device, generator, monkeypatch):
    """Ragged responses, empty ones first, inside and last, in one chunk and across chunks of a single row tile."""
    case, n = Case(problem, device), problem.n_tokens
    monkeypatch.setattr(config, "CHUNK_BYTES", chunk_bytes)
    cu_seqlens = torch.tensor([0, 0, n // 4, n // 4, n // 4, n - n // 3, n, n])
    coefficients = random_coefficients(n, generator)
    actual, sums = triton_backend.head_pass_with_sums(*case.inputs, coefficients.to(device), cu_seqlens.to(device))
    assert_pass(actual, case.expected, case.error)
    assert sums.dtype == torch.float32
    assert_close_to_terms(sums, *case.score_sums(coefficients, cu_seqlens), case.derivative_error)


def test_chunks_do_not_change_the_statistics(device, monkeypatch):
    """Rows are independent: the same bits whatever the chunk."""
    case = Case(HeadProblem(67, 16, 40), device)
    whole = triton_backend.head_pass(*case.inputs)
    monkeypatch.setattr(config, "CHUNK_BYTES", 1)
    for one, many in zip(whole, triton_backend.head_pass(*case.inputs), strict=True):
        assert torch.equal(one, many)


def test_results_repeat_bit_for_bit(device, generator):
    case = Case(HeadProblem(67, 24, 20, BF16), device)
    coefficients, cu_seqlens = random_coefficients(20, generator).to(device), torch.tensor([0, 15, 20]).to(device)
    first, second = (triton_backend.head_pass_with_sums(*case.inputs, coefficients, cu_seqlens) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_a_token_sampled_by_every_row(device, generator):
    """All targets in one column: nothing is lost to colliding writes."""
    problem = HeadProblem(67, 16, 40)
    hidden, weight, _, _ = problem.tensors()
    case = Case(problem, device, (hidden, weight, torch.full((40,), 66), None))
    coefficients, cu_seqlens = random_coefficients(40, generator), torch.tensor([0, 40])
    actual, sums = triton_backend.head_pass_with_sums(*case.inputs, coefficients.to(device), cu_seqlens.to(device))
    assert_pass(actual, case.expected, case.error)
    assert_close_to_terms(sums, *case.score_sums(coefficients, cu_seqlens), case.derivative_error)


# -- where formulas fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_nearly_certain_tokens_keep_their_digits(dtype, device):
    """logp, off-target mass, entropy and score keep a relative error of fp32 logits; 1 - p has none left."""
    case = peaked(device, dtype)
    actual = triton_backend.head_pass(*case.inputs)
    assert (1 - case.expected["off_mass"]).float().max() == 1.0
    relative = {"rtol": 2 * case.error + 8 * EPS}
    for name in ("logp", "off_mass", "entropy", "score_sq"):
        assert within(getattr(actual, name).cpu(), case.expected[name], rtol=4 * relative["rtol"]), name


@pytest.mark.parametrize(("spread", "offset"), [(3.0, 1e4), (3.0, -1e4), (4000.0, 0.0)])
def test_logits_of_ten_thousand(spread, offset, device):
    """Spacing of fp32 at 1e4 is 1e-3: errors of that size, no overflow, no NaN."""
    hidden, weight, tokens, _ = HeadProblem(101, 16, 12, spread=spread).tensors()
    bias = torch.full((101,), offset)
    z = ref.logits(hidden, weight, bias)
    assert z.abs().max() > 9e3
    actual = triton_backend.head_pass(hidden.to(device), tokens.to(device), Head(weight.to(device), bias.to(device)))
    error = 2 * EPS * (z.abs().max().item() + 4 * spread)
    assert within(actual.logp.cpu(), torch.log_softmax(z, 1)[range(12), tokens], atol=2 * error)
    assert within(actual.entropy.cpu(), ref.entropy(z), atol=4 * error)
    assert all(torch.isfinite(column).all() for column in actual)


def test_a_vocabulary_of_one_remaining_token(device):
    """Everything else at -inf: certain, with no entropy and no gradient."""
    hidden, weight = torch.ones(3, 4), torch.ones(70, 4)
    bias = torch.full((70,), -torch.inf)
    bias[69] = 0.0
    inputs = (hidden.to(device), torch.full((3,), 69).to(device), Head(weight.to(device), bias.to(device)))
    rollouts = (torch.ones(3).to(device), torch.tensor([0, 3]).to(device))
    actual, sums = triton_backend.head_pass_with_sums(*inputs, *rollouts)
    expected = {"logp": 0.0, "lse": 4.0, "entropy": 0.0, "sum_p_sq": 1.0, "score_sq": 0.0, "off_mass": 0.0}
    for name, value in expected.items():
        assert (getattr(actual, name) == value).all(), name
    assert (sums == 0).all()
    assert (triton_backend.hidden_gradient(*inputs, actual) == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_entries_change_nothing(softcap, device):
    """An entry at -inf is as good as absent, also under a soft cap, which alone would bring it back at -cap."""
    hidden, weight, tokens, bias = HeadProblem(67, 8, 9, bias="masked").tensors()
    kept = bias.isfinite()
    position = torch.cumsum(kept, 0) - 1
    masked = triton_backend.head_pass(hidden.to(device), tokens.to(device),
                                      Head(weight.to(device), bias.to(device), softcap=softcap))
    small = triton_backend.head_pass(hidden.to(device), position[tokens].to(device),
                                     Head(weight[kept].to(device), bias[kept].to(device), softcap=softcap))
    for name in TokenPass._fields:
        assert within(getattr(masked, name).cpu(), getattr(small, name).cpu(), rtol=16 * EPS, atol=16 * EPS), name


def test_a_sampled_token_outside_the_vocabulary(device):
    """Its log-prob is -inf; the rest of the row is as without it, and no gradient is NaN."""
    hidden, weight, tokens, bias = HeadProblem(67, 8, 9, bias="random").tensors()
    bias[tokens] = -torch.inf
    inputs = (hidden.to(device), tokens.to(device), Head(weight.to(device), bias.to(device)))
    actual = triton_backend.head_pass(*inputs)
    assert (actual.logp == -torch.inf).all()
    assert (actual.off_mass == 1).all()
    z = ref.logits(hidden, weight, bias)
    assert within(actual.lse.cpu(), z.logsumexp(1), atol=64 * EPS)
    assert within(actual.entropy.cpu(), ref.entropy(z), atol=64 * EPS)
    ones = torch.ones(9).to(device)
    gradients = triton_backend.linear_logprob_backward(ones, ones, *inputs, actual, (True, True, True))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_nan_stays_in_its_row(device):
    hidden, weight, tokens, _ = HeadProblem(67, 8, 20).tensors()
    clean = triton_backend.head_pass(hidden.to(device), tokens.to(device), Head(weight.to(device)))
    hidden[7, 3] = torch.nan
    actual = triton_backend.head_pass(hidden.to(device), tokens.to(device), Head(weight.to(device)))
    others = torch.arange(20) != 7
    for name in TokenPass._fields:
        assert getattr(actual, name)[7].isnan(), name
        assert torch.equal(getattr(actual, name)[others], getattr(clean, name)[others]), name


# -- shapes and layouts -----------------------------------------------------------------------------------------------


def test_no_tokens(device):
    case = Case(HeadProblem(33, 5, 3), device)
    empty = (case.inputs[0][:0], case.inputs[1][:0], case.head)
    nothing = torch.zeros(0).to(device)
    actual, sums = triton_backend.head_pass_with_sums(*empty, nothing, torch.zeros(3, dtype=torch.int64).to(device))
    assert all(column.shape == (0,) for column in actual)
    assert torch.equal(sums.cpu(), torch.zeros(2, 33))
    assert triton_backend.hidden_gradient(*empty, actual).shape == (0, 5)
    assert triton_backend.head_pass_with_gradient(*empty)[1].shape == (0, 5)
    grams = triton_backend.head_pass_with_gram(*empty, nothing, [[(0, 0), (0, 0)]])[1]
    assert torch.equal(grams[0].cpu(), torch.zeros(2, 2, dtype=torch.float64))
    gradients = triton_backend.linear_logprob_backward(nothing, nothing, *empty, actual, (True, True, False))
    assert gradients[0].shape == (0, 5)
    assert torch.equal(gradients[1].cpu(), torch.zeros(33, 5))


@pytest.mark.parametrize("layout", ["strided rows", "strided elements", "misaligned"])
def test_layouts_do_not_change_the_results(layout, device):
    """Descriptors need 16-byte alignment: strided and misaligned inputs take other loads to the same numbers."""
    case = Case(HeadProblem(67, 24, 20), device)

    def laid_out(x):
        if layout == "strided rows":
            return torch.cat([x, x], dim=1)[:, : x.shape[1]]
        if layout == "strided elements":
            return x.T.contiguous().T
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    hidden, tokens, head = case.inputs
    other = (laid_out(hidden), tokens, Head(laid_out(head.weight)))
    for column, expected in zip(triton_backend.head_pass(*other), triton_backend.head_pass(*case.inputs), strict=True):
        assert torch.equal(column, expected)
    token_pass = case.token_pass()
    assert torch.equal(triton_backend.hidden_gradient(*other, token_pass),
                       triton_backend.hidden_gradient(*case.inputs, token_pass))


def test_unavailable_says_why(device):
    assert triton_backend.unavailable(device) is None
    assert "meta" in triton_backend.unavailable(torch.device("meta"))
