"""The head pass of every implementation against the float64 specification, and against the formulas that fail.

Tolerances follow one model. fp32 logits err by ``logit_error``: two roundings of the largest logit, and a chain of D
fused multiply-adds whose partial sums grow to the logits' own spread. log p, log Σ and H inherit that error (H times
the spread of the surprisal), probabilities inherit it relatively, once per power.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from kernel_cases import rounding_error
from policies import HeadProblem, reference_gradients, reference_pass, within, worst

import rlvr_fast as rf
import rlvr_fast.reference as ref
from rlvr_fast import Rollouts
from rlvr_fast.head import Head

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 2.0**-23
PROBLEMS = (
    HeadProblem(1, 1, 1),
    HeadProblem(1, 5, 33, bias="random"),
    HeadProblem(2, 5, 31),
    HeadProblem(2, 1, 257, temperature=0.3),
    HeadProblem(33, 5, 0),
    HeadProblem(33, 65, 33, BF16, bias="random"),
    HeadProblem(33, 65, 257, FP16, temperature=2.0, softcap=5.0),
    HeadProblem(1009, 65, 31, FP16, bias="masked", temperature=0.3),
    HeadProblem(1009, 576, 257),
    HeadProblem(1009, 1500, 33, temperature=0.3),
    HeadProblem(4097, 1500, 33, BF16, temperature=2.0),
    HeadProblem(4097, 1, 33, softcap=30.0),
    HeadProblem(4097, 5, 1, bias="masked", softcap=30.0, spread=20.0),
    HeadProblem(49152, 5, 3, bias="masked"),
    HeadProblem(49152, 64, 9, spread=6.0),
    HeadProblem(49152, 65, 2, BF16, bias="random", softcap=30.0),
)


@dataclass(frozen=True)
class Answer:
    """A problem's tensors, what the reference says of them, and how far fp32 logits may be off."""

    tensors: tuple
    statistics: dict[str, torch.Tensor]
    scores: torch.Tensor  # [N, V]
    logit_error: float


@cache
def answer(problem: HeadProblem) -> Answer:
    hidden, weight, tokens, bias = tensors = problem.tensors()
    z = ref.logits(hidden, weight, bias, **problem.options)
    slope = ref.logit_slope(hidden, weight, bias, **problem.options)
    largest = z[z.isfinite()].abs().max().item() if z.numel() else 0.0
    chain = problem.spread * problem.width**0.5 + (problem.softcap or 0.0)
    return Answer(tensors, reference_pass(hidden, weight, tokens, bias, **problem.options), ref.score(z, tokens, slope),
                  2 * EPS * (largest + chain / problem.temperature))


def assert_pass(actual, expected: dict[str, torch.Tensor], error: float) -> None:
    """``actual`` TokenPass against the reference, for logits that are off by ``error``."""
    tolerances = {"logp": {"atol": 2 * error}, "lse": {"atol": error, "rtol": EPS},
                  "entropy": {"atol": 4 * error, "rtol": 4 * EPS}, "off_mass": {"rtol": 2 * error + 4 * EPS},
                  "sum_p_sq": {"rtol": 4 * error + 4 * EPS}, "score_sq": {"rtol": 4 * error + 8 * EPS}}
    for name, tolerance in tolerances.items():
        column, exact = getattr(actual, name), expected[name]
        assert column.dtype == torch.float32
        assert within(column, exact, **tolerance), f"{name}: {worst(column, exact)}, allowed {tolerance}"


def assert_sums(actual, exact, magnitude, error: float, rounding: float = 0.0) -> None:
    """Sums of scores whose terms, ``magnitude`` together, each have p's relative error; below 1e-37 fp32 may flush.

    ``rounding`` is the error of each term on top of that.
    """
    assert actual.dtype == torch.float32
    excess = (actual.double() - exact).abs() - (4 * error + 16 * EPS + rounding) * magnitude
    assert not (excess > 1e-37).any(), worst(actual, exact)


# -- against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_statistics_match_the_reference(head_pass, problem):
    exact = answer(problem)
    assert_pass(head_pass(*exact.tensors, **problem.options), exact.statistics, exact.logit_error)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_score_sums_match_the_reference(head_pass, problem, request):
    """Σ_t c_t ∂logp_t/∂raw over ragged responses; every entry carries its own p's relative error, summed over t.

    Triton rounds each derivative once to the operands' dtype, the others keep float32.
    """
    exact, n = answer(problem), problem.n_tokens
    backend, _, place = request.node.callspec.params["head_pass"].partition("-")
    rounding = rounding_error(problem.dtype, torch.device(place)) if backend == "triton" else 0.0
    cu_seqlens = torch.tensor([0, 0, n // 3, n // 3, n, n])
    coefficients = torch.linspace(-1.0, 2.0, n)
    actual, sums = head_pass(*exact.tensors, **problem.options, coefficients=coefficients, cu_seqlens=cu_seqlens)
    assert_pass(actual, exact.statistics, exact.logit_error)
    expected = ref.response_gradients_logits(exact.scores, coefficients.double(), cu_seqlens)
    magnitude = ref.response_gradients_logits(exact.scores.abs(), coefficients.double().abs(), cu_seqlens)
    assert_sums(sums, expected, magnitude, exact.logit_error, rounding)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_hidden_gradient_matches_the_reference(problem, device):
    """On a GPU the derivatives are rounded once to the operands' dtype, and a product adds V of them in a chain, whose
    rounding errors grow like √V."""
    exact = answer(problem)
    rounding = rounding_error(problem.dtype, device) + EPS * problem.vocabulary**0.5 if device.type == "cuda" else 0.0
    hidden, weight, tokens, bias = (None if x is None else x.to(device) for x in exact.tensors)
    stats = rf.token_stats(hidden, weight, tokens, bias=bias, hidden_grad=True, **problem.options)
    weight = exact.tensors[1]
    assert stats.hidden_grad.shape == hidden.shape
    assert_sums(stats.hidden_grad.cpu(), ref.hidden_gradient(exact.scores, weight),
                ref.hidden_gradient(exact.scores.abs(), weight.abs()), exact.logit_error, rounding)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_public_function_serves_every_field_from_every_backend(backend, device):
    """1e-5 absolute in logp for logits of magnitude 10 is what a training loop may count on."""
    if device.type != "cpu":
        pytest.skip("names CPU backends")
    problem = HeadProblem(4097, 64, 33, bias="random", temperature=0.8, softcap=40.0)
    hidden, weight, tokens, bias = problem.tensors()
    stats = rf.token_stats(hidden, weight, tokens, bias=bias, **problem.options, backend=backend)
    for name in ("logp", "lse", "entropy"):
        assert within(getattr(stats, name), answer(problem).statistics[name], atol=1e-5), name
    for name in ("sum_p_sq", "score_sq"):
        assert within(getattr(stats, name), answer(problem).statistics[name], rtol=3e-5), name
    assert stats.hidden_grad is None
    assert "tokens=33" in repr(stats)


def test_hidden_gradient_is_no_part_of_an_autograd_graph():
    """A graph behind a measurement would keep every tile of scores alive: an [N, V] buffer after all."""
    hidden, weight, tokens, bias = HeadProblem(33, 5, 7, bias="random").tensors()
    stats = rf.token_stats(hidden.requires_grad_(), weight.requires_grad_(), tokens, bias=bias.requires_grad_(),
                           hidden_grad=True)
    columns = (stats.logp, stats.lse, stats.entropy, stats.sum_p_sq, stats.score_sq, stats.hidden_grad)
    assert not any(column.requires_grad for column in columns)


# -- formulas that fail: each test shows the usual fp32 formula breaking the bound that the package keeps -------------


def certain_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of probability 1 - m with m from 1e-2 down to 1e-16: one token of 33 leads by up to 40 nats."""
    weight = torch.zeros(33, 1)
    weight[7] = 1.0
    off_mass = torch.logspace(-2, -16, 57, dtype=torch.float64)
    return (32 / off_mass).log().float()[:, None], weight, torch.full((57,), 7)


def test_score_norm_and_logp_keep_their_digits_when_the_token_is_certain(head_pass):
    """Relative 1e-4: a lead of 40 nats is known to 4e-6. 1 - 2p + Σp² has no digit left once 1 - p < 3e-4."""
    hidden, weight, tokens = certain_tokens()
    exact, actual = reference_pass(hidden, weight, tokens), head_pass(hidden, weight, tokens)
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    p = log_p.exp()
    target = p.gather(1, tokens[:, None])[:, 0]
    naive = {"score_sq": 1 - 2 * target + p.square().sum(1), "off_mass": 1 - target,
             "logp": (hidden @ weight.T).gather(1, tokens[:, None])[:, 0] - (hidden @ weight.T).logsumexp(1)}
    for name, formula in naive.items():
        column = getattr(actual, name)
        assert within(column, exact[name], rtol=1e-4), f"{name}: {worst(column, exact[name])}"
        assert not within(formula, exact[name], rtol=1e-4), f"the naive {name} is expected to fail"


def test_entropy_keeps_its_digits_when_it_is_small(head_pass):
    """Relative 1e-4 below 0.05 nats, logits around 40: lse - E[z] subtracts two numbers of 40 known to 4e-6.

    With 32 rivals at -ℓ and ε = 32 e^-ℓ, H = log(1 + ε) + ℓ ε / (1 + ε) exactly.
    """
    hidden, weight, tokens = certain_tokens()
    weight = weight + 40 / hidden.max()
    lead = (hidden.double() * (weight[7].double() - weight[0].double()))[:, 0]
    rivals = 32 * torch.exp(-lead)
    exact = torch.log1p(rivals) + lead * rivals / (1 + rivals)
    small = exact < 0.05
    z = hidden @ weight.T
    naive = z.logsumexp(1) - (torch.softmax(z, 1) * z).sum(1)
    assert small.sum() >= 40
    assert within(head_pass(hidden, weight, tokens).entropy[small], exact[small], rtol=1e-4)
    assert not within(naive[small], exact[small], rtol=1e-4)


def test_small_entropy_of_a_token_that_was_not_the_likely_one(head_pass):
    """The likely token is summed with the rest here, so H is known to a few fp32 roundings of 1, not relatively."""
    hidden, weight, tokens = certain_tokens()
    exact = reference_pass(hidden, weight, tokens - 1)
    actual = head_pass(hidden, weight, tokens - 1)
    assert within(actual.entropy, exact["entropy"], atol=4 * EPS, rtol=1e-4)
    assert within(actual.logp, exact["logp"], atol=1e-5)
    assert within(actual.score_sq, exact["score_sq"], rtol=1e-5)


def test_bf16_operands_do_not_round_the_logits(head_pass):
    """1e-5 in logp with fp32 accumulation; logits rounded to bf16 cost 1e-2 and more."""
    problem = HeadProblem(1009, 65, 33, BF16)
    hidden, weight, tokens, _ = problem.tensors()
    exact = answer(problem).statistics["logp"]
    rounded = torch.log_softmax((hidden.float() @ weight.float().T).bfloat16().float(), 1)
    assert within(head_pass(hidden, weight, tokens).logp, exact, atol=1e-5)
    assert not within(rounded.gather(1, tokens[:, None])[:, 0], exact, atol=1e-2)


def test_running_maximum_starts_below_every_logit(head_pass):
    """All logits near -300: with a maximum that starts at 0 every exponential underflows."""
    hidden, weight, tokens, _ = HeadProblem(1009, 5, 33).tensors()
    bias = torch.full((1009,), -300.0)
    exact, actual = reference_pass(hidden, weight, tokens, bias), head_pass(hidden, weight, tokens, bias)
    z = hidden @ weight.T + bias
    naive = z.gather(1, tokens[:, None])[:, 0] - torch.exp(z - z.amax(1, keepdim=True).clamp(min=0)).sum(1).log()
    assert within(actual.logp, exact["logp"], atol=2e-4)  # two roundings of 300
    assert within(actual.score_sq, exact["score_sq"], rtol=4e-4)
    assert not within(naive, exact["logp"], atol=2e-4)


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 1009, 4097])
def test_last_vocabulary_tile_adds_no_phantom_mass(head_pass, vocabulary):
    """Logits near -20: padding the vocabulary with zero logits up to a full tile would swallow all the mass."""
    hidden, weight, tokens, _ = HeadProblem(vocabulary, 5, 33, spread=1.0).tensors()
    bias = torch.full((vocabulary,), -20.0)
    exact, actual = reference_pass(hidden, weight, tokens, bias), head_pass(hidden, weight, tokens, bias)
    z = torch.nn.functional.pad(hidden @ weight.T + bias, (0, -vocabulary % 128))
    naive = torch.log_softmax(z, 1).gather(1, tokens[:, None])[:, 0]
    assert within(actual.logp, exact["logp"], atol=2e-5)
    assert within(actual.sum_p_sq, exact["sum_p_sq"], rtol=5e-5)
    assert not within(naive, exact["logp"], atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocabulary", [1, 1021, 1025, 4097, 8185, 8191])
def test_a_sampled_token_alone_in_the_last_tile(head_pass, vocabulary, softcap):
    """One entry more than a tile or split of some implementation: with the token held out, nothing is left in it."""
    hidden, weight, _, _ = HeadProblem(vocabulary, 1, 3, spread=1.0).tensors()
    tokens, cu_seqlens = torch.full((3,), vocabulary - 1), torch.tensor([0, 1, 3])
    exact = reference_pass(hidden, weight, tokens, softcap=softcap)
    assert_pass(head_pass(hidden, weight, tokens, softcap=softcap), exact, 1e-5)
    actual, sums = head_pass(hidden, weight, tokens, softcap=softcap, coefficients=torch.ones(3), cu_seqlens=cu_seqlens)
    assert_pass(actual, exact, 1e-5)
    scores = ref.score(ref.logits(hidden, weight, softcap=softcap), tokens,
                       ref.logit_slope(hidden, weight, softcap=softcap))
    assert within(sums, ref.response_gradients_logits(scores, torch.ones(3), cu_seqlens), rtol=1e-4, atol=1e-6)


def test_long_sums_do_not_drift(head_pass):
    """49,151 equal terms beside one larger: a single fp32 running sum rounds the same way every time and drifts."""
    weight = torch.zeros(49152, 1)
    weight[0] = 1.0
    hidden, tokens = torch.tensor([[0.5], [1.5674], [2.0216], [2.6156]]), torch.full((4,), 5)  # the last three: worst
    lse = (hidden[:, 0].double().exp() + 49151).log()
    actual = head_pass(hidden, weight, tokens)
    terms = np.exp(np.concatenate([np.zeros((4, 1)), -hidden.expand(-1, 49151).numpy()], 1)).astype(np.float32)
    naive = hidden[:, 0] + torch.from_numpy(np.cumsum(terms, axis=1, dtype=np.float32)[:, -1]).log()
    assert within(actual.lse, lse, atol=1e-5)
    assert within(actual.logp, -lse, atol=1e-5)
    assert not within(naive, lse, atol=1e-4)


def test_slope_of_a_saturated_softcap(head_pass):
    """∂z/∂raw = sech²(raw/cap) relative to 1e-4 up to raw = 3 caps, where it is 1e-2 and 1 - tanh² errs by 1e-7."""
    hidden, weight = torch.linspace(0.5, 3.0, 34)[:, None] * 4, torch.tensor([[1.0], [-1.0]])
    tokens = torch.arange(34) % 2
    exact = reference_pass(hidden, weight, tokens, softcap=4.0)["score_sq"]
    actual = head_pass(hidden, weight, tokens, softcap=4.0).score_sq
    assert within(actual, exact, rtol=1e-4), worst(actual, exact)


def test_a_wide_softcap_keeps_the_precision_of_the_logits(head_pass):
    """cap·tanh(raw/cap) to the fp32 precision of raw, not of cap: a tanh that errs by 1e-7 absolute is not enough."""
    hidden, weight, tokens, _ = HeadProblem(33, 5, 31).tensors()
    exact = reference_pass(hidden, weight, tokens, softcap=1e3)["logp"]
    tanh = 1 - 2 / (torch.exp(2 * hidden @ weight.T / 1e3) + 1)
    naive = torch.log_softmax(1e3 * tanh, 1).gather(1, tokens[:, None])[:, 0]
    actual = head_pass(hidden, weight, tokens, softcap=1e3).logp
    assert within(actual, exact, atol=1e-5), worst(actual, exact)
    assert not within(naive, exact, atol=3e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bias_of_minus_infinity_takes_a_token_out_of_the_vocabulary(head_pass, softcap):
    """Masked entries change nothing, with a softcap too: cap·tanh(-inf) would bring them back at -cap."""
    hidden, weight, tokens, bias = HeadProblem(33, 5, 31, bias="masked").tensors()
    kept = bias.isfinite()
    renumbered = (kept.cumsum(0) - 1)[tokens]
    exact = reference_pass(hidden, weight[kept], renumbered, bias[kept], softcap=softcap)
    assert_pass(head_pass(hidden, weight, tokens, bias, softcap=softcap), exact, 1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(head_pass, sign):
    """Differences of 2e4 nats are exact in fp32, and no probability but 0 and 1 can be seen."""
    hidden, weight = torch.full((3, 1), sign * 1e4), torch.tensor([[1.0], [-1.0], [0.0]])
    tokens = torch.tensor([0, 1, 2])
    actual = head_pass(hidden, weight, tokens)
    likely, unlikely = (0, 1) if sign > 0 else (1, 0)
    assert actual.logp[[likely, 2, unlikely]].tolist() == [0.0, -1e4, -2e4]
    assert actual.lse.tolist() == [1e4] * 3
    assert actual.entropy.tolist() == [0.0] * 3
    assert actual.sum_p_sq.tolist() == [1.0] * 3
    assert actual.off_mass[[likely, 2, unlikely]].tolist() == [0.0, 1.0, 1.0]
    assert actual.score_sq[[likely, 2, unlikely]].tolist() == [0.0, 2.0, 2.0]


def test_a_common_shift_of_all_logits_changes_nothing_but_lse(head_pass):
    """Two roundings of 1024 (2.4e-4) at most, in any basis of the exponential; exp without a maximum would overflow."""
    hidden, weight, tokens, _ = HeadProblem(33, 1, 31, spread=1.0).tensors()
    weight, hidden = (weight * 64).round() / 64, (hidden * 8).round() / 8  # so that adding 1024 is exact
    plain = head_pass(hidden, weight, tokens, torch.zeros(33))
    shifted = head_pass(hidden, weight, tokens, torch.full((33,), 1024.0))
    for name in ("logp", "entropy", "sum_p_sq", "score_sq", "off_mass"):
        column = getattr(shifted, name)
        assert within(column, getattr(plain, name), rtol=5e-4, atol=2.5e-4), name
    assert within(shifted.lse, plain.lse + 1024.0, atol=2.5e-4)


# -- layouts, threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_layout_of_the_inputs_does_not_matter(backend):
    hidden, weight, tokens, bias = HeadProblem(33, 12, 31, bias="random").tensors()
    plain = rf.token_stats(hidden, weight, tokens, bias=bias, backend=backend)
    strided = (torch.stack([hidden, hidden], 2)[:, :, 0], weight.T.contiguous().T,
               torch.stack([tokens, tokens], 1)[:, 1], torch.stack([bias, bias], 1)[:, 0])
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (hidden, weight, tokens, bias)]
    narrow = (hidden, weight, tokens.int(), bias)
    assert not any(x.is_contiguous() for x in strided)
    assert all(x.storage_offset() == 1 for x in shifted)
    for h, w, y, b in (strided, shifted, narrow):
        stats = rf.token_stats(h, w, y, bias=b, backend=backend)
        for name in ("logp", "lse", "entropy", "sum_p_sq", "score_sq"):
            assert within(getattr(stats, name), getattr(plain, name), rtol=1e-6, atol=1e-6), name


def test_equal_rows_have_equal_statistics(head_pass):
    """One token at one hidden state, wherever it stands in the batch: bitwise, so no lane leaks into another."""
    hidden, weight, tokens, _ = HeadProblem(1009, 65, 1).tensors()
    actual = head_pass(hidden.expand(67, -1), weight, tokens.expand(67).contiguous())
    for name, column in actual._asdict().items():
        assert (column == column[0]).all(), name


def test_native_results_do_not_depend_on_the_number_of_threads():
    problem = HeadProblem(4097, 33, 257)
    hidden, weight, tokens, _ = problem.tensors()
    native = pytest.importorskip("rlvr_fast._native", reason="the native extension is not built") and \
        rf.backends.native_backend
    head, before = Head(weight), torch.get_num_threads()
    coefficients, cu_seqlens = torch.linspace(0, 1, 257), torch.tensor([0, 100, 100, 257])
    runs = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with_sums, sums = native.head_pass_with_sums(hidden, tokens, head, coefficients, cu_seqlens)
            runs.append([*native.head_pass(hidden, tokens, head), *with_sums, sums])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# -- from what the caller already has ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("vocabulary", [1, 33, 4097])
def test_from_logits_matches_the_reference(dtype, vocabulary, generator):
    logits = (3 * torch.randn(17, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(0, vocabulary, (17,), generator=generator)
    masked = torch.rand(17, vocabulary, generator=generator) < 0.3
    logits[masked.scatter(1, tokens[:, None], False)] = -torch.inf
    stats = rf.token_stats_from_logits(logits, tokens, temperature=0.7)
    z = logits.double() / 0.7
    exact = {"logp": ref.log_prob(z, tokens), "lse": z.logsumexp(1), "entropy": ref.entropy(z),
             "sum_p_sq": ref.sum_p_sq(z), "score_sq": ref.score_sq(z, tokens, torch.tensor(1 / 0.7))}
    for name in ("logp", "lse", "entropy"):
        assert within(getattr(stats, name), exact[name], atol=1e-5), name
    for name in ("sum_p_sq", "score_sq"):
        assert within(getattr(stats, name), exact[name], rtol=1e-5), name


def test_from_logits_agrees_with_the_head_pass():
    hidden, weight, tokens, _ = HeadProblem(1009, 65, 33).tensors()
    from_head = rf.token_stats(hidden, weight, tokens, backend="torch")
    from_logits = rf.token_stats_from_logits(hidden @ weight.T, tokens)
    for name in ("logp", "lse", "entropy", "sum_p_sq", "score_sq"):
        assert within(getattr(from_logits, name), getattr(from_head, name), rtol=1e-5, atol=1e-5), name


def test_from_logprobs_agrees_with_the_head_pass():
    """Σp² - p² is a difference of the caller's fp32 numbers: absolute 3e-7, and never a negative norm."""
    hidden, weight, tokens, _ = HeadProblem(1009, 65, 33).tensors()
    stats = rf.token_stats(hidden, weight, tokens)
    derived = rf.token_stats_from_logprobs(stats.logp, stats.sum_p_sq)
    assert within(derived.score_sq, stats.score_sq, atol=3e-7, rtol=1e-6)
    assert torch.equal(derived.logp, stats.logp)
    assert derived.lse is None
    assert derived.entropy is None
    assert "entropy=n/a" in repr(derived)


def test_from_logprobs_is_exact_where_the_formula_is():
    """Two equal tokens, and a certain one: 1 - 2p + Σp² = 1/2 and 0."""
    stats = rf.token_stats_from_logprobs(torch.tensor([0.5, 1.0]).log(), torch.tensor([0.5, 1.0]))
    assert within(stats.score_sq, torch.tensor([0.5, 0.0]), atol=1e-7)
    rounded_up = rf.token_stats_from_logprobs(torch.tensor([-1e-9]), torch.tensor([0.9999999]))
    assert 0.0 <= rounded_up.score_sq.item() <= 1e-12


def test_level_gradients_follow_from_the_statistics():
    """‖∂logp/∂raw‖² summed over one-token responses is what the logits level calls their squared norms."""
    hidden, weight, tokens, _ = HeadProblem(33, 5, 8).tensors()
    rollouts = Rollouts.from_packed(tokens, torch.arange(9), torch.tensor([0.0, 1.0] * 4), group_size=4)
    gradients = reference_gradients(hidden, weight, rollouts, "logits", True)
    assert within(rf.token_stats(hidden, weight, tokens).score_sq, gradients.square().sum(1), rtol=1e-5)
