"""Head problems on the device with what the float64 specification says of them: shared by the Triton backend's tests.

Tolerances follow from fp32 logits that are off by ``Case.error``: two roundings of the largest logit and a dot product
of D terms. logp and lse inherit it, probabilities inherit it relatively, once per power. Gradients round each
derivative to the operands' dtype: half an ulp, relative to the sum of what is added up, on top of that.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from policies import HeadProblem, reference_pass, within, worst

import rlvr_fast.reference as ref
from rlvr_fast.backends import TokenPass
from rlvr_fast.head import Head

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


def rounding_error(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one conversion from fp32. Triton's interpreter cuts off bf16's lost digits, a GPU rounds."""
    return HALF_ULP[dtype] * (2 if dtype == BF16 and device.type == "cpu" else 1)


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
        # Of one derivative, and so of a sum of them relative to the sum of magnitudes: p's error, fp32 arithmetic, and
        # one rounding to the operands' dtype (each is stored once; rescaling by powers of two rounds nothing).
        self.rounding = rounding_error(self.hidden.dtype, device)
        self.derivative_error = 4 * self.error + 16 * EPS + self.rounding
        self.head = Head(self.weight.to(device), bias, problem.temperature, problem.softcap)
        self.inputs = (self.hidden.to(device), self.tokens.to(device), self.head)

    def hidden_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """∂ logp/∂ hidden, and the magnitudes that it is a sum of."""
        return (ref.hidden_gradient(self.score, self.weight),
                ref.hidden_gradient(self.score.abs(), self.weight.abs()))

    def score_sums(self, coefficients: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_t c_t ∂ logp_t/∂ raw per response, and the magnitudes that it is a sum of."""
        c = coefficients.double()
        return (ref.response_gradients_logits(self.score, c, cu_seqlens),
                ref.response_gradients_logits(self.score.abs(), c.abs(), cu_seqlens))

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


def assert_grams(actual: list[torch.Tensor], case: Case, coefficients: torch.Tensor, cu_seqlens: list[int],
                 groups: list[list[int]]) -> None:
    """⟨G_i, G_j⟩ per prompt, to the error of each token's derivative times Σ_t |c_t| ‖∂ logp_t/∂ raw‖ ‖h_t‖.

    Both factors of a product carry the derivative's error, hence twice; the sums over pairs are fp32.
    """
    gradients = ref.response_gradients_head(case.score, case.hidden, coefficients.double(), cu_seqlens)
    size = coefficients.double().abs() * case.score.norm(dim=1) * case.hidden.double().norm(dim=1)
    sizes = torch.stack([size[start:stop].sum() for start, stop in pairwise(cu_seqlens)])
    assert len(actual) == len(groups)
    for gram, group in zip(actual, groups, strict=True):
        assert gram.dtype == torch.float64
        excess = ((gram.cpu() - gradients[group] @ gradients[group].T).abs()
                  - (2 * case.derivative_error + 64 * EPS) * sizes[group][:, None] * sizes[group][None, :])
        assert (excess <= 1e-30).all(), f"beyond the allowed by {excess.max():.3g}"


def peaked(device: torch.device, dtype: torch.dtype) -> Case:
    """Rows whose target has p = 1 - 5e-4, ..., 1 - 5e-11, off-target mass spread over 69 tokens; exact in any dtype."""
    heights = torch.tensor([12.0, 18.0, 23.0, 28.0])
    vocabulary, n = 70, len(heights)
    hidden = torch.stack([heights, torch.ones(n)], dim=1)
    weight = torch.stack([torch.zeros(vocabulary), torch.linspace(-2, 1, vocabulary).bfloat16().float()], dim=1)
    tokens = torch.full((n,), 41)
    weight[41, 0] = 1.0
    return Case(HeadProblem(vocabulary, 2, n), device, (hidden.to(dtype), weight.to(dtype), tokens, None))


def random_coefficients(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)
