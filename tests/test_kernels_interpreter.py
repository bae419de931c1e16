"""The Triton backend against the float64 specification: on the GPU where there is one, else in Triton's interpreter.

Tolerances follow from fp32 logits that are off by ``logit_error``: two roundings of the largest logit and a dot product
of D terms. logp and lse inherit it, probabilities inherit it relatively, once per power. Gradients round each
derivative to the operands' dtype: half an ulp, relative to the sum of what is added up, on top of that.
"""

from __future__ import annotations

import os
from itertools import pairwise

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

import pytest
import torch
from policies import HeadProblem, reference_pass, within, worst
from rlvr_fast.kernels import config

import rlvr_fast.reference as ref
from rlvr_fast.backends import TokenPass, triton_backend
from rlvr_fast.head import Head

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]
BF16, FP16 = torch.bfloat16, torch.float16
EPS = 2.0**-23
HALF_ULP = {torch.float32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-8}
PROBLEMS = (
    HeadProblem(1, 1, 2),
    HeadProblem(2, 5, 1),
    HeadProblem(33, 5, 19, bias="random"),
    HeadProblem(33, 64, 17, BF16, bias="random", temperature=0.7),
    HeadProblem(67, 24, 18, FP16, temperature=2.0, softcap=5.0),
    HeadProblem(101, 16, 33),
    HeadProblem(101, 37, 5, BF16, softcap=30.0, spread=10.0),
    HeadProblem(131, 40, 6, bias="masked", temperature=0.3, softcap=3.0),
    HeadProblem(131, 19, 6, FP16, bias="masked"),
    HeadProblem(257, 16, 3, BF16, bias="masked", spread=8.0),
)
BIASED = (
    HeadProblem(33, 5, 19, bias="random"),
    HeadProblem(101, 24, 9, BF16, bias="random"),
    HeadProblem(67, 24, 18, FP16, bias="random", temperature=0.4, softcap=5.0),
)


class Case:
    """A problem on the device, with what the reference says of it."""

    def __init__(self, problem: HeadProblem, device: torch.device, tensors: tuple | None = None):
        self.hidden, self.weight, self.tokens, self.bias = tensors or problem.tensors()
        options = (self.bias, problem.temperature, problem.softcap)
        self.z = ref.logits(self.hidden, self.weight, *options)
        self.slope = ref.logit_slope(self.hidden, self.weight, *options)
        self.score = ref.score(self.z, self.tokens, self.slope)
        self.expected = reference_pass(self.hidden, self.weight, self.tokens, *options)
        largest = self.z[self.z.isfinite()].abs().max().item()
        chain = problem.spread * problem.width**0.5 + (problem.softcap or 0.0)
        self.error = 2 * EPS * (largest + chain / problem.temperature)
        bias = None if self.bias is None else self.bias.to(device)
        self.head = Head(self.weight.to(device), bias, problem.temperature, problem.softcap)
        self.inputs = (self.hidden.to(device), self.tokens.to(device), self.head)

    def token_pass(self) -> TokenPass:
        """The reference's statistics in float32, so that gradients are tested apart from the forward pass."""
        device = self.inputs[0].device
        return TokenPass(*(self.expected[name].float().to(device) for name in TokenPass._fields))


def assert_pass(actual: TokenPass, expected: dict[str, torch.Tensor], error: float) -> None:
    tolerances = {"logp": {"atol": 2 * error}, "lse": {"atol": error, "rtol": EPS},
                  "entropy": {"atol": 4 * error, "rtol": 4 * EPS}, "off_mass": {"rtol": 2 * error + 4 * EPS},
                  "sum_p_sq": {"rtol": 4 * error + 4 * EPS}, "score_sq": {"rtol": 4 * error + 8 * EPS}}
    for name, tolerance in tolerances.items():
        column = getattr(actual, name)
        assert column.dtype == torch.float32
        assert within(column.cpu(), expected[name], **tolerance), f"{name}: {worst(column.cpu(), expected[name])}"


def assert_close_to_terms(actual: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, rtol: float) -> None:
    """|actual - expected| against the sum of the magnitudes that were added up."""
    excess = (actual.cpu().double() - expected).abs() - rtol * terms
    assert (excess <= 1e-30).all(), f"{worst(actual.cpu(), expected)}; beyond the allowed by {excess.max():.3g}"


def random_coefficients(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


# -- statistics and sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_statistics_match_the_reference(problem, device):
    case = Case(problem, device)
    actual = triton_backend.head_pass(*case.inputs)
    assert_pass(actual, case.expected, case.error)
    assert (actual.logp <= 0).all()


@pytest.mark.parametrize("rows_per_chunk", [16, 4096])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_score_sums_match_the_reference(problem, rows_per_chunk, device, generator, monkeypatch):
    """Ragged responses, empty ones first, inside and last, in one chunk and across chunks of 16 tokens."""
    case, n = Case(problem, device), problem.n_tokens
    monkeypatch.setattr(config, "CHUNK_BYTES", 4 * problem.vocabulary * rows_per_chunk)
    cu_seqlens = torch.tensor([0, 0, n // 4, n // 4, n // 4, n - n // 3, n, n])
    coefficients = random_coefficients(n, generator)
    actual, sums = triton_backend.head_pass_with_sums(*case.inputs, coefficients.to(device), cu_seqlens.to(device))
    assert_pass(actual, case.expected, case.error)
    assert sums.dtype == torch.float32
    expected = ref.response_gradients_logits(case.score, coefficients.double(), cu_seqlens)
    terms = ref.response_gradients_logits(case.score.abs(), coefficients.double().abs(), cu_seqlens)
    assert_close_to_terms(sums, expected, terms, 4 * case.error + 16 * EPS)


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
    expected = ref.response_gradients_logits(case.score, coefficients.double(), cu_seqlens)
    terms = ref.response_gradients_logits(case.score.abs(), coefficients.double().abs(), cu_seqlens)
    assert_close_to_terms(sums, expected, terms, 4 * case.error + 16 * EPS)


# -- where formulas fail ----------------------------------------------------------------------------------------------


def peaked(device: torch.device, dtype: torch.dtype) -> Case:
    """Rows whose target has p = 1 - 5e-4, ..., 1 - 5e-11, off-target mass spread over 69 tokens; exact in any dtype."""
    heights = torch.tensor([12.0, 18.0, 23.0, 28.0])
    vocabulary, n = 70, len(heights)
    hidden = torch.stack([heights, torch.ones(n)], dim=1)
    weight = torch.stack([torch.zeros(vocabulary), torch.linspace(-2, 1, vocabulary).bfloat16().float()], dim=1)
    tokens = torch.full((n,), 41)
    weight[41, 0] = 1.0
    return Case(HeadProblem(vocabulary, 2, n), device, (hidden.to(dtype), weight.to(dtype), tokens, None))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_nearly_certain_tokens_keep_their_digits(dtype, device):
    """logp, off-target mass, entropy, score and gradients keep a relative error of fp32 logits; 1 - p has none left."""
    case = peaked(device, dtype)
    actual = triton_backend.head_pass(*case.inputs)
    assert (1 - case.expected["off_mass"]).float().max() == 1.0
    relative = {"rtol": 2 * case.error + 8 * EPS}
    for name in ("logp", "off_mass", "entropy", "score_sq"):
        assert within(getattr(actual, name).cpu(), case.expected[name], rtol=4 * relative["rtol"]), name
    gradient = triton_backend.hidden_gradient(*case.inputs, case.token_pass())
    terms = ref.hidden_gradient(case.score.abs(), case.weight.abs())
    rounding = 4 * case.error + 16 * EPS + 2 * HALF_ULP[dtype]
    assert_close_to_terms(gradient, ref.hidden_gradient(case.score, case.weight), terms, rounding)


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


# -- gradients --------------------------------------------------------------------------------------------------------


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


# -- shapes and layouts -----------------------------------------------------------------------------------------------


def test_no_tokens(device):
    case = Case(HeadProblem(33, 5, 3), device)
    empty = (case.inputs[0][:0], case.inputs[1][:0], case.head)
    nothing = torch.zeros(0).to(device)
    actual, sums = triton_backend.head_pass_with_sums(*empty, nothing, torch.zeros(3, dtype=torch.int64).to(device))
    assert all(column.shape == (0,) for column in actual)
    assert torch.equal(sums.cpu(), torch.zeros(2, 33))
    assert triton_backend.hidden_gradient(*empty, actual).shape == (0, 5)
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
