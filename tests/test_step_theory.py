"""The step-size specification against calculus: enumerated policies, autograd, and the closed-form policy.

Every check here is on exact expectations, so tolerances are rounding of float64 (1e-9), not statistics.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from closed_form import SignPolicy

from rlvr_fast import reference_step as reference


class EnumeratedPolicy:
    """Autoregressive softmax over 3 letters, 3 tokens, logits tanh-nonlinear in θ: 27 responses, none alike."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.responses = list(itertools.product(range(3), repeat=3))
        self.features = {prefix: normal(3, 5) for n in range(3) for prefix in itertools.product(range(3), repeat=n)}
        self.theta, self.direction = normal(5), normal(5)
        self.correct = torch.rand(27, generator=generator) < 0.4

    def logp(self, step):
        theta = self.theta + step * self.direction
        return torch.stack([
            sum(torch.log_softmax(torch.tanh(self.features[o[:t]]) @ theta + self.features[o[:t]] @ theta ** 2, 0)[o[t]]
                for t in range(3)) for o in self.responses])

    def success_rate(self, step):
        return self.logp(step).exp()[self.correct].sum()

    def log_odds(self, step):
        logp = self.logp(step)
        return logp[self.correct].logsumexp(0) - logp[~self.correct].logsumexp(0)


def derivative(function):
    """d/dx of a tensor-valued function of a scalar: d/dv of d/dx ⟨function(x), v⟩, two backward passes."""
    def of(x):
        value = function(x)
        v = torch.ones_like(value, requires_grad=True)
        return torch.autograd.grad(torch.autograd.grad((value * v).sum(), x, create_graph=True)[0], v,
                                   create_graph=True)[0]
    return of


def derivatives(function):
    """Value, first and second derivative at 0."""
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return [f(zero).detach() for f in (function, derivative(function), derivative(derivative(function)))]


@pytest.fixture(params=range(5))
def policy(request):
    return EnumeratedPolicy(request.param)


def test_alignment_and_curvature_are_the_derivatives_of_the_log_odds(policy):
    logp, s, h = derivatives(policy.logp)
    _, first, second = derivatives(policy.log_odds)
    probability = logp.exp()
    assert reference.step_alignment(s, policy.correct, probability).item() == pytest.approx(first.item(), rel=1e-9)
    curvature = reference.step_curvature(s, h, policy.correct, probability)
    assert curvature.item() == pytest.approx(second.item(), rel=1e-9, abs=1e-9)


def test_curvature_of_the_success_rate(policy):
    """J″ = J(1 − J)(f″ + (1 − 2J)Δμ²) = E[r(s² + h)]."""
    logp, s, h = derivatives(policy.logp)
    rate, first, second = derivatives(policy.success_rate)
    probability, reward = logp.exp(), policy.correct.double()
    gap = reference.step_alignment(s, policy.correct, probability)
    bend = reference.step_curvature(s, h, policy.correct, probability)
    assert (rate * (1 - rate) * gap).item() == pytest.approx(first.item(), rel=1e-9)
    assert (rate * (1 - rate) * (bend + (1 - 2 * rate) * gap ** 2)).item() == pytest.approx(second.item(), abs=1e-9)
    assert (probability * reward * (s ** 2 + h)).sum().item() == pytest.approx(second.item(), abs=1e-9)


@pytest.mark.parametrize("step", [-2.0, 1e-3, 0.5, 3.0])
def test_log_odds_gain_is_exact_for_any_step(policy, step):
    before, after = policy.logp(0.0), policy.logp(step)
    gain = reference.log_odds_gain(after - before, policy.correct, before.exp())
    assert gain.item() == pytest.approx((policy.log_odds(step) - policy.log_odds(0.0)).item(), rel=1e-9, abs=1e-9)


def test_score_identities(policy):
    """E[s] = 0, E[h] = −E[s²], and the Fisher form splits into the classes' variances and the gap."""
    logp, s, h = derivatives(policy.logp)
    probability = logp.exp()
    rate = policy.success_rate(0.0)
    fisher = reference.variance(s, probability)
    assert reference.mean(s, probability).item() == pytest.approx(0, abs=1e-9)
    assert reference.mean(h, probability).item() == pytest.approx(-fisher.item(), abs=1e-9)
    within = [reference.variance(s[chosen], probability[chosen]) for chosen in (policy.correct, ~policy.correct)]
    gap = reference.step_alignment(s, policy.correct, probability)
    total = rate * within[0] + (1 - rate) * within[1] + rate * (1 - rate) * gap ** 2
    assert total.item() == pytest.approx(fisher.item(), rel=1e-9)


# -- the closed-form policy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "margin", "theta"), [(8, 2, 0.3), (64, 16, 0.25), (256, 48, 0.15), (255, 31, -0.1)])
def test_break_even_of_the_closed_form_policy_is_twice_the_distance(length, margin, theta):
    policy = SignPolicy(length, margin, theta)
    for step in (0.3, 0.7, 1.0, 1.4):
        moved = policy.moved(step * policy.break_even)
        gain = reference.log_odds_gain(moved.logp() - policy.logp(), policy.correct, policy.probability()).item()
        assert gain == pytest.approx(moved.log_odds() - policy.log_odds(), rel=1e-9, abs=1e-9)
        assert (gain > 1e-9) == (step < 1)
        assert (gain < -1e-9) == (step > 1)


def overestimate(policy):
    probability = policy.probability()
    alignment = reference.step_alignment(policy.score(), policy.correct, probability)
    curvature = reference.step_curvature(policy.score(), policy.score_derivative(), policy.correct, probability)
    return reference.step_break_even(alignment.item(), curvature.item()) / policy.break_even - 1


@pytest.mark.parametrize(("margin", "success_rate", "expected"), [
    (0, 0.097, 0.005), (2, 0.286, 0.016), (8, 0.730, 0.073), (16, 0.964, 0.200), (30, 0.9999, 0.575),
])
def test_quadratic_break_even_is_too_long_near_success(margin, success_rate, expected):
    policy = SignPolicy(64, margin, 0.025)
    assert policy.success_rate() == pytest.approx(success_rate, abs=5e-4)
    assert overestimate(policy) == pytest.approx(expected, abs=5e-4)


def test_quadratic_break_even_far_from_the_optimum_is_wrong_or_undefined():
    assert overestimate(SignPolicy(256, 48, 0.35)) == pytest.approx(-0.368, abs=1e-3)
    assert overestimate(SignPolicy(256, 48, 0.2)) > 10
    assert overestimate(SignPolicy(256, 48, 0.15)) != overestimate(SignPolicy(256, 48, 0.15))  # NaN: f″ > 0
