"""The float64 specification itself: against autograd, closed forms and full enumeration. Tolerance 1e-10 throughout
(float64 with a few hundred operations), unless a test says otherwise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from policies import HeadProblem, TabularPolicy, random_rollouts, reference_gradients, within

import rlvr_fast.reference as ref

EXACT = {"rtol": 1e-10, "atol": 1e-10}
HEADS = (
    HeadProblem(11, 5, 6),
    HeadProblem(11, 5, 6, bias="random", temperature=0.7),
    HeadProblem(11, 5, 6, bias="random", temperature=2.0, softcap=3.0),
)


def leaves(problem: HeadProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The problem's tensors in float64, ready for autograd; the bias is zero where the problem has none."""
    hidden, weight, tokens, bias = problem.tensors()
    bias = torch.zeros(problem.vocabulary) if bias is None else bias
    return tokens, *(x.double().requires_grad_() for x in (hidden, weight, bias))


def autograd_logp(hidden, weight, bias, tokens, temperature, softcap):
    """(log p_y, all log p) by torch's own softmax."""
    raw = hidden @ weight.T + bias
    z = (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature
    log_p = torch.log_softmax(z, 1)
    return log_p.gather(1, tokens[:, None])[:, 0], log_p


# -- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", HEADS, ids=str)
def test_token_quantities_and_their_gradients_match_autograd(problem):
    tokens, hidden, weight, bias = leaves(problem)
    logp, log_p = autograd_logp(hidden, weight, bias, tokens, **problem.options)
    z = ref.logits(hidden, weight, bias, **problem.options)
    slope = ref.logit_slope(hidden, weight, bias, **problem.options)
    scores = ref.score(z, tokens, slope)
    assert within(ref.log_prob(z, tokens), logp, **EXACT)
    assert within(ref.entropy(z), -(log_p.exp() * log_p).sum(1), **EXACT)
    assert within(ref.sum_p_sq(z), log_p.exp().square().sum(1), **EXACT)
    assert within(ref.off_target_mass(z, tokens), 1 - logp.exp(), **EXACT)
    for row in range(problem.n_tokens):
        by_bias, by_hidden = torch.autograd.grad(logp[row], (bias, hidden), retain_graph=True)
        assert within(scores[row], by_bias, **EXACT)
        assert within(ref.score_sq(z, tokens, slope)[row], by_bias.square().sum(), **EXACT)
        assert within(ref.hidden_gradient(scores, weight)[row], by_hidden[row], **EXACT)


def test_closed_forms():
    """Uniform over V: log p = -log V, H = log V, Σp² = 1/V, ‖e_y - p‖² = 1 - 1/V."""
    z, tokens = torch.zeros(1, 8, dtype=torch.float64), torch.tensor([3])
    assert within(ref.log_prob(z, tokens), torch.tensor([-math.log(8)], dtype=torch.float64), **EXACT)
    assert within(ref.entropy(z), torch.tensor([math.log(8)], dtype=torch.float64), **EXACT)
    assert within(ref.sum_p_sq(z), torch.tensor([1 / 8]), **EXACT)
    assert within(ref.score_sq(z, tokens, torch.ones(1, 8)), torch.tensor([7 / 8]), **EXACT)
    one = torch.zeros(1, 1, dtype=torch.float64)
    first = torch.tensor([0])
    assert ref.log_prob(one, first) == 0
    assert ref.entropy(one) == 0
    assert ref.score_sq(one, first, torch.ones(1, 1)) == 0


@pytest.mark.parametrize("lead", [30.0, 100.0, 700.0])
def test_digits_of_a_certain_token(lead):
    """With one rival at -lead: 1 - p = e^-lead, log p = -e^-lead, H = (1 + lead) e^-lead, score² = 2 e^-2lead."""
    z, tokens = torch.tensor([[0.0, -lead]], dtype=torch.float64), torch.tensor([0])
    tail = torch.tensor([math.exp(-lead)], dtype=torch.float64)
    assert within(ref.off_target_mass(z, tokens), tail, rtol=1e-12)
    assert within(ref.log_prob(z, tokens), -tail, rtol=1e-12)
    assert within(ref.score(z, tokens, torch.ones(1, 2)), torch.stack([tail, -tail], 1), rtol=1e-12)
    if lead < 100:  # e^-lead is seen by log_softmax as -log1p, to a relative 1e-3; the other term carries the digits
        assert within(ref.entropy(z), (1 + lead) * tail, rtol=1e-4)


@pytest.mark.parametrize("gap", [50.0, 2e4])
def test_log_prob_of_a_hopeless_token_is_finite(gap):
    z = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    assert within(ref.log_prob(z, torch.tensor([1])), torch.tensor([-gap], dtype=torch.float64), rtol=1e-12)


def test_masked_tokens_are_out_of_the_vocabulary():
    z = torch.tensor([[1.0, -torch.inf, 2.0]], dtype=torch.float64)
    kept, tokens = z[:, [0, 2]], torch.tensor([0])
    for quantity in (ref.entropy, ref.sum_p_sq):
        assert within(quantity(z), quantity(kept), **EXACT)
    assert within(ref.log_prob(z, tokens), ref.log_prob(kept, tokens), **EXACT)
    assert ref.score(z, tokens, torch.ones(1, 3))[0, 1] == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_masked_bias_takes_a_token_out_whatever_the_softcap(softcap):
    hidden, weight, _, bias = HeadProblem(11, 5, 6, bias="masked").tensors()
    kept = bias.isfinite()
    masked = ref.logits(hidden, weight, bias, softcap=softcap)
    plain = ref.logits(hidden, weight[kept], bias[kept], softcap=softcap)
    assert within(masked.logsumexp(1), plain.logsumexp(1), **EXACT)
    assert ref.logit_slope(hidden, weight, bias, softcap=softcap).isfinite().all()


# -- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("problem", HEADS, ids=str)
def test_response_gradients_match_autograd(problem, length_norm, generator):
    """∂ Σ_t c_t logp_t for the bias, for a vector added to every hidden state, and for the head's weight."""
    rollouts = random_rollouts(6, 2, problem.vocabulary, generator)
    hidden = torch.randn(rollouts.n_tokens, problem.width, generator=generator, dtype=torch.float64)
    _, _, weight, bias = leaves(problem)
    offset = torch.zeros(problem.width, dtype=torch.float64, requires_grad=True)
    logp, _ = autograd_logp(hidden + offset, weight, bias, rollouts.tokens, **problem.options)
    gradients = {level: reference_gradients(hidden, weight, rollouts, level, length_norm, bias, **problem.options)
                 for level in ("logits", "hidden", "head")}
    for response, (start, stop) in enumerate(itertools.pairwise(rollouts.bounds)):
        objective = logp[start:stop].sum() / (max(stop - start, 1) if length_norm else 1)
        expected = torch.autograd.grad(objective, (bias, offset, weight), retain_graph=True)
        for level, gradient in zip(("logits", "hidden", "head"), expected, strict=True):
            assert within(gradients[level][response], gradient.flatten(), **EXACT), level


def enumerated(generator) -> tuple[TabularPolicy, torch.Tensor, dict[str, torch.Tensor]]:
    """A policy, a verdict on each of its responses, and every response's gradient at every level."""
    policy = TabularPolicy.random(3, 3, 4, generator)
    correct = torch.rand(len(policy.responses), generator=generator) < 0.4
    rollouts = policy.rollouts(correct)
    hidden = policy.hidden[policy.prefix_rows()]
    gradients = {level: reference_gradients(hidden, policy.weight, rollouts, level, False, policy.bias)
                 for level in ("logits", "hidden", "head")}
    return policy, correct, gradients


def class_means(probability, correct, gradients):
    """g⁺ and g⁻, the expectations over each class."""
    return tuple((probability[c, None] * gradients[c]).sum(0) / probability[c].sum() for c in (correct, ~correct))


def test_enumerated_policy_is_a_distribution(generator):
    policy, correct, _ = enumerated(generator)
    assert len(policy.responses) == len(set(policy.responses)) == 15
    assert within(policy.probability().sum(), torch.tensor(1.0), **EXACT)
    assert 0 < correct.sum() < 15


def test_gap_identity_over_a_whole_policy(generator):
    """∇J = J(1-J)(g⁺ - g⁻) [paper A], by autograd through the enumerated success rate."""
    policy, correct, gradients = enumerated(generator)
    offset = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weight, bias = policy.weight.clone().requires_grad_(), policy.bias.clone().requires_grad_()
    success = policy.log_probability(policy.hidden + offset, weight, bias).exp()[correct].sum()
    slopes = torch.autograd.grad(success, (bias, offset, weight))
    probability = policy.probability()
    rate = probability[correct].sum()
    for level, slope in zip(("logits", "hidden", "head"), slopes, strict=True):
        plus, minus = class_means(probability, correct, gradients[level])
        assert within(rate * (1 - rate) * (plus - minus), slope.flatten(), **EXACT), level
        assert within((probability[:, None] * gradients[level]).sum(0), torch.zeros_like(plus), **EXACT)  # E[s] = 0


def test_alignment_is_the_slope_of_the_log_odds(generator):
    """d/dη logit J(θ + ηw) = ⟨w, g⁺ - g⁻⟩ [paper A]; w in the head's weight."""
    policy, correct, gradients = enumerated(generator)
    direction = torch.randn(policy.weight.shape, generator=generator, dtype=torch.float64)
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rate = policy.log_probability(policy.hidden, policy.weight + step * direction, policy.bias).exp()[correct].sum()
    slope = torch.autograd.grad(torch.logit(rate), step)[0]
    plus, minus = class_means(policy.probability(), correct, gradients["head"])
    assert within(ref.alignment(direction, plus - minus), slope, **EXACT)


# -- estimates from a sample, by enumeration of every sample ----------------------------------------------------------


class FiniteClass:
    """Three possible gradients with unequal probabilities: every sample of a few can be listed."""

    def __init__(self, generator: torch.Generator, width: int = 2):
        self.values = torch.randn(3, width, generator=generator, dtype=torch.float64)
        self.probability = torch.softmax(torch.randn(3, generator=generator, dtype=torch.float64), 0)

    @property
    def mean(self) -> torch.Tensor:
        return self.probability @ self.values

    @property
    def noise(self) -> torch.Tensor:
        """tr Σ."""
        return self.probability @ (self.values - self.mean).square().sum(1)

    def samples(self, n: int) -> list[tuple[float, torch.Tensor]]:
        """(probability, gradients [n, K]) of every ordered sample."""
        picks = itertools.product(range(3), repeat=n)
        return [(float(self.probability[list(pick)].prod()), self.values[list(pick)]) for pick in picks]


def expectation(quantity, *sample_lists) -> torch.Tensor:
    """E of ``quantity(sample, ...)`` over independent samples."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for combination in itertools.product(*sample_lists):
        total = total + math.prod(p for p, _ in combination) * quantity(*(sample for _, sample in combination))
    return total


@pytest.mark.parametrize(("n_plus", "n_minus"), [(2, 2), (3, 2), (2, 4)])
def test_gap_estimates_have_the_stated_expectation(n_plus, n_minus, generator):
    plus, minus = FiniteClass(generator), FiniteClass(generator)
    samples = plus.samples(n_plus), minus.samples(n_minus)
    truth = (plus.mean - minus.mean).square().sum()
    bias = plus.noise / n_plus + minus.noise / n_minus
    assert bias > 0.1 * truth  # large enough to see
    assert within(expectation(ref.gap_norm_sq, *samples), truth, **EXACT)
    assert within(expectation(ref.gap_norm_sq_naive, *samples), truth + bias, **EXACT)
    assert within(expectation(ref.class_noise, samples[0]), plus.noise, **EXACT)


def test_gap_with_known_noise_is_unbiased_for_a_single_response(generator):
    plus, minus = FiniteClass(generator), FiniteClass(generator)

    def estimate(right, wrong):
        return ref.gap_norm_sq_given_noise(right, wrong, plus.noise, ref.class_noise(wrong))

    truth = (plus.mean - minus.mean).square().sum()
    assert within(expectation(estimate, plus.samples(1), minus.samples(3)), truth, **EXACT)


def test_pooled_noise_is_unbiased_and_leaves_single_responses_out(generator):
    one = FiniteClass(generator)
    pooled = expectation(lambda a, b, c: ref.pooled_noise([a, b, c]), one.samples(2), one.samples(1), one.samples(3))
    assert within(pooled, one.noise, **EXACT)
    assert ref.pooled_noise([one.values[:1], one.values[:0]]).isnan()


def test_batch_estimate_is_unbiased(generator):
    """Over two prompts of two responses per class: 6,561 samples; the plug-in norm of the mean is not."""
    prompts = [(FiniteClass(generator), FiniteClass(generator)) for _ in range(2)]
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    truth = sum(w * (p.mean - m.mean) for w, (p, m) in zip(weights, prompts, strict=True)).square().sum()
    tables = []  # per prompt: probability, gap vector, plug-in and unbiased norm of every sample
    for plus, minus in prompts:
        rows = [(p * q, ref.gap_vector(a, b), ref.gap_norm_sq_naive(a, b), ref.gap_norm_sq(a, b))
                for (p, a), (q, b) in itertools.product(plus.samples(2), minus.samples(2))]
        tables.append(rows)
    estimate, naive = 0.0, 0.0
    for one, two in itertools.product(*tables):
        vectors, plug_in, unbiased = (torch.stack([one[k], two[k]]) for k in (1, 2, 3))
        estimate += one[0] * two[0] * ref.batch_gap_norm_sq(vectors, plug_in, unbiased, weights)
        naive += one[0] * two[0] * (weights @ vectors).square().sum()
    assert within(estimate, truth, **EXACT)
    assert naive > truth + 0.01


# -- estimates from a sample, against their other forms ---------------------------------------------------------------


def sample(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n_plus", "n_minus"), [(2, 2), (3, 5), (6, 2)])
def test_gap_norm_sq_is_the_mean_over_pairs(n_plus, n_minus, generator):
    """The U-statistic: mean of ⟨G_i - H_j, G_k - H_l⟩ over i ≠ k and j ≠ l; and plug-in minus the classes' noise."""
    plus, minus = sample(n_plus, generator), sample(n_minus, generator)
    products = [(plus[i] - minus[j]) @ (plus[k] - minus[l])
                for i, k in itertools.permutations(range(n_plus), 2)
                for j, l in itertools.permutations(range(n_minus), 2)]
    assert within(ref.gap_norm_sq(plus, minus), torch.stack(products).mean(), **EXACT)
    given = ref.gap_norm_sq_given_noise(plus, minus, ref.class_noise(plus), ref.class_noise(minus))
    assert within(given, ref.gap_norm_sq(plus, minus), **EXACT)


def test_class_noise_is_the_trace_of_the_sample_covariance(generator):
    rows = sample(7, generator)
    assert within(ref.class_noise(rows), torch.cov(rows.T).trace(), **EXACT)


@pytest.mark.parametrize(("n_plus", "n_minus"), [(3, 3), (4, 7)])
def test_gap_stderr_is_the_jackknife_of_the_u_statistic(n_plus, n_minus, generator):
    plus, minus = sample(n_plus, generator), sample(n_minus, generator)
    variance = 0.0
    for own, other in ((plus, minus), (minus, plus)):
        left = [ref.gap_norm_sq(own[torch.arange(len(own)) != i], other) for i in range(len(own))]
        variance += (len(own) - 1) * torch.stack(left).var(correction=0)
    assert within(ref.gap_stderr(plus, minus), variance.sqrt(), **EXACT)


def test_gap_stderr_of_pairs(generator):
    """With two responses a replicate is one response against the other class, the noise left as it was: what varies is
    ‖G_i - mean⁻‖², and (n-1)/n Σ (θ_i - mean)² is a quarter of the squared difference."""
    plus, minus = sample(2, generator), sample(2, generator)
    differences = [(plus - minus.mean(0)).square().sum(1).diff(), (minus - plus.mean(0)).square().sum(1).diff()]
    assert within(ref.gap_stderr(plus, minus), torch.cat(differences).square().sum().sqrt() / 2, **EXACT)
