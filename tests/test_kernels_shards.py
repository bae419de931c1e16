"""The Triton backend over shards of the vocabulary: each shard's share adds up to what one head over all of it gives.

What ranks would exchange is taken from the float64 specification, so that a shard is judged by itself.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_cases import (
    BF16,
    EPS,
    FP16,
    Case,
    assert_close_to_terms,
    assert_grams,
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

# (problem, first row of each shard): uneven, one of a single row, one that is masked altogether
SHARDED = (
    (HeadProblem(101, 24, 18, bias="random"), (0, 40)),
    (HeadProblem(131, 40, 17, BF16, temperature=0.7), (0, 100, 101)),
    (HeadProblem(150, 16, 18, FP16, softcap=5.0, bias="random"), (0, 7, 120)),
)


class Shard:
    """Rows [first, stop) of a case's head, its own pass by the specification, and the exchange with the others."""

    def __init__(self, case: Case, first: int, stop: int, largest: int, device: torch.device):
        head, self.columns = case.head, slice(first, stop)
        bias = None if head.bias is None else head.bias[first:stop]
        self.head = Head(head.weight[first:stop], bias, head.temperature, head.softcap)
        inside = (case.tokens >= first) & (case.tokens < stop)
        self.tokens = torch.where(inside, case.tokens - first, -1)
        self.inputs = (case.inputs[0], self.tokens.to(device), self.head)
        self.expected = self._pass(case, inside)
        self.share = torch.exp(self.expected["lse"] - case.expected["lse"]).float().to(device)
        self.whole, self.largest_shard, self.merged = case.token_pass(), largest, []
        self.order = torch.arange(len(case.tokens), device=device)  # in which the tokens come to be merged

    def _pass(self, case: Case, inside: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the softmax over this shard; where the sampled token is elsewhere, nothing is held out."""
        z, slope = case.z[:, self.columns], case.slope[:, self.columns]
        p = torch.softmax(z, 1).nan_to_num(0.0)  # a shard at -inf has no mass
        own = ref.score(z, self.tokens.clamp_min(0), slope).square().sum(1)
        elsewhere = {"logp": torch.tensor(-torch.inf), "lse": z.logsumexp(1), "off_mass": torch.tensor(1.0),
                     "entropy": -torch.special.xlogy(p, p).sum(1), "sum_p_sq": p.square().sum(1),
                     "score_sq": (p * slope).square().sum(1)}
        here = {"logp": ref.log_prob(z, self.tokens.clamp_min(0)), "off_mass": ref.off_target_mass(
            z, self.tokens.clamp_min(0)), "score_sq": own}
        return {name: torch.where(inside, here.get(name, value), value.double()) for name, value in elsewhere.items()}

    def __call__(self, local: TokenPass) -> tuple[TokenPass, torch.Tensor]:
        """Merge one chunk: the exchange."""
        start = sum(len(part.logp) for part in self.merged)
        self.merged.append(TokenPass(*(column.clone() for column in local)))
        rows = self.order[start:start + len(local.logp)]
        return TokenPass(*(column[rows] for column in self.whole)), self.share[rows]

    @property
    def local(self) -> TokenPass:
        """What was handed to the exchange."""
        return TokenPass(*map(torch.cat, zip(*self.merged, strict=True)))


def split(case: Case, firsts: tuple[int, ...], device: torch.device) -> list[Shard]:
    borders = list(pairwise([*firsts, len(case.weight)]))
    largest = max(stop - first for first, stop in borders)
    return [Shard(case, first, stop, largest, device) for first, stop in borders]


def assert_local(actual: TokenPass, shard: Shard, error: float) -> None:
    """``assert_pass``, with -inf where the token is elsewhere (whose difference from -inf is NaN)."""
    actual, expected = actual._asdict(), dict(shard.expected)
    assert (actual["off_mass"].cpu()[shard.tokens < 0] == 1).all()
    for name in ("logp", "lse"):
        nothing = expected[name] == -torch.inf
        assert torch.equal(actual[name].cpu() == -torch.inf, nothing)
        actual[name] = actual[name].cpu().masked_fill(nothing, 0.0)
        expected[name] = expected[name].masked_fill(nothing, 0.0)
    assert_pass(TokenPass(**actual), expected, error)


@pytest.fixture(params=SHARDED, ids=lambda param: f"{param[0]}-{len(param[1])} shards")
def sharded(request, device):
    problem, firsts = request.param
    case = Case(problem, device)
    return case, split(case, firsts, device)


def test_statistics_of_a_shard(sharded):
    case, shards = sharded
    for shard in shards:
        assert_local(triton_backend.head_pass(*shard.inputs), shard, case.error)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["many chunks", "one chunk"])
def test_score_sums(sharded, chunk_bytes, device, generator, monkeypatch):
    """A shard's columns of the whole's score sums, and the whole's pass."""
    monkeypatch.setattr(config, "CHUNK_BYTES", chunk_bytes)
    case, shards = sharded
    n = len(case.tokens)
    coefficients, cu_seqlens = random_coefficients(n, generator), torch.tensor([0, n // 3, n // 3, n])
    expected, terms = case.score_sums(coefficients, cu_seqlens)
    for shard in shards:
        rollouts = (coefficients.to(device), cu_seqlens.to(device))
        actual, sums = triton_backend.head_pass_with_sums(*shard.inputs, *rollouts, merge=shard)
        assert_local(shard.local, shard, case.error)
        assert all(torch.equal(a, b) for a, b in zip(actual, shard.whole, strict=True))
        columns = (slice(None), shard.columns)
        assert_close_to_terms(sums, expected[columns], terms[columns], case.derivative_error)
    assert len({len(shard.merged) for shard in shards}) == 1


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["many chunks", "one chunk"])
def test_hidden_gradients(sharded, chunk_bytes, monkeypatch):
    """With the pass and after it; every rank meets at the same borders."""
    monkeypatch.setattr(config, "CHUNK_BYTES", chunk_bytes)
    case, shards = sharded
    shares = []
    for shard in shards:
        actual, gradient = triton_backend.head_pass_with_gradient(*shard.inputs, merge=shard)
        assert_local(shard.local, shard, case.error)
        assert all(torch.equal(a, b) for a, b in zip(actual, shard.whole, strict=True))
        expected = ref.hidden_gradient(case.score[:, shard.columns], case.weight[shard.columns])
        terms = ref.hidden_gradient(case.score[:, shard.columns].abs(), case.weight[shard.columns].abs())
        assert_close_to_terms(gradient, expected, terms, case.derivative_error)
        shares.append(triton_backend.hidden_gradient(*shard.inputs, shard.whole))
        assert_close_to_terms(shares[-1], expected, terms, case.derivative_error)
    assert len({tuple(len(part.logp) for part in shard.merged) for shard in shards}) == 1
    assert_close_to_terms(sum(shares), *case.hidden_gradient(), case.derivative_error)


def test_gram_matrices(sharded, generator, device):
    """Their sum over the shards, with the pass and after it."""
    case, shards = sharded
    n = len(case.tokens)
    cu_seqlens, groups = [0, n // 4, n // 4, n // 2, n], [[0, 2], [1, 3]]
    coefficients = random_coefficients(n, generator)
    arguments = (coefficients.to(device),
                 [[(cu_seqlens[i], cu_seqlens[i + 1]) for i in group] for group in groups])
    after, with_pass = [], []
    for shard in shards:
        shard.order = torch.cat([torch.arange(*span, device=device) for prompt in arguments[1] for span in prompt])
        actual, grams = triton_backend.head_pass_with_gram(*shard.inputs, *arguments, merge=shard)
        assert all(torch.equal(a, b) for a, b in zip(actual, shard.whole, strict=True))
        with_pass.append(grams)
        after.append(triton_backend.head_gram(*shard.inputs, shard.whole, *arguments))
    for grams in (after, with_pass):
        assert_grams([sum(parts) for parts in zip(*grams, strict=True)], case, coefficients, cu_seqlens, groups)


def test_backward(sharded, generator, device):
    """The hidden gradient adds up, weight and bias gradients are the shard's own rows."""
    case, shards = sharded
    upstream = [torch.randn(len(case.tokens), generator=generator) for _ in range(2)]
    leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight)]
    z = ref.logits(*leaves, case.bias, case.head.temperature, case.head.softcap)
    objective = (ref.log_prob(z, case.tokens) * upstream[0]).sum() + (ref.entropy(z) * upstream[1]).sum()
    expected = torch.autograd.grad(objective, leaves)
    total = 0.0
    for shard in shards:
        grads = [grad.to(device) for grad in upstream]
        hidden, weight, _ = triton_backend.linear_logprob_backward(*grads, *shard.inputs, shard.whole,
                                                                   (True, True, False))
        total = total + hidden.cpu()
        exact = expected[1][shard.columns]
        rounding = 64 * (case.error + EPS) + 2 * case.rounding
        assert within(weight.cpu(), exact, rtol=rounding, atol=rounding * expected[1].abs().max().item())
    assert within(total, expected[0], rtol=rounding, atol=rounding * expected[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_off_target_mass_that_lies_in_another_shard(dtype, device):
    """The target's shard holds nothing else, or 1e-9 of what the other holds: the target's entry is the other's mass,
    far above anything in its own shard."""
    certain = peaked(device, dtype)
    low = torch.cat([torch.zeros(42), torch.full((28,), -20.0)])
    for bias, firsts in ((None, (0, 41, 42)), (low, (0, 41))):
        case = Case(HeadProblem(70, 2, 4, dtype), device, (certain.hidden, certain.weight, certain.tokens, bias))
        for shard in split(case, firsts, device):
            _, gradient = triton_backend.head_pass_with_gradient(*shard.inputs, merge=shard)
            part = (case.score[:, shard.columns], case.weight[shard.columns])
            assert_close_to_terms(gradient, ref.hidden_gradient(*part), ref.hidden_gradient(*(x.abs() for x in part)),
                                  case.derivative_error)


def test_a_shard_without_probability(device, generator):
    """Padding rows at -inf fill a shard: no mass, no gradient, nothing that is NaN."""
    hidden, weight, tokens, bias = HeadProblem(90, 8, 6, bias="random").tensors()
    bias[60:], tokens = -torch.inf, tokens % 60
    case = Case(HeadProblem(90, 8, 6), device, (hidden, weight, tokens, bias))
    for shard in split(case, (0, 60), device):
        assert_local(triton_backend.head_pass(*shard.inputs), shard, case.error)
        coefficients, cu_seqlens = random_coefficients(6, generator), torch.tensor([0, 2, 6])
        rollouts = (coefficients.to(device), cu_seqlens.to(device))
        _, sums = triton_backend.head_pass_with_sums(*shard.inputs, *rollouts, merge=shard)
        expected, terms = case.score_sums(coefficients, cu_seqlens)
        assert_close_to_terms(sums, expected[:, shard.columns], terms[:, shard.columns], case.derivative_error)
        shard.merged.clear()
        _, gradient = triton_backend.head_pass_with_gradient(*shard.inputs, merge=shard)
        shard.merged.clear()
        grams = triton_backend.head_pass_with_gram(*shard.inputs, rollouts[0], [[(0, 2), (2, 6)]], merge=shard)[1]
        assert gradient.isfinite().all()
        assert grams[0].isfinite().all()
        if shard.columns.start == 60:
            assert (gradient == 0).all()
            assert (grams[0] == 0).all()
