"""The simulation's oracle: exact figures against enumeration and autograd, sampled updates against exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy

import rlvr_fast as rf
from rlvr_fast.simulate import lines
from rlvr_fast.simulate.estimators import end_slope, ratio_gains, two_ended
from rlvr_fast.simulate.problems import Bandit, SignTask, sample
from rlvr_fast.simulate.rules import NAMES, Rule
from rlvr_fast.simulate.runs import SCANNED, relative, scan, vouched

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # both sides are float64 sums of the same terms in another order


def theta_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bandit(generator: torch.Generator, n_prompts: int = 5) -> tuple[Bandit, torch.Tensor]:
    return (Bandit.random(n_prompts, 4, 3, generator), torch.randn(3, generator=generator, dtype=torch.float64))


# -- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.3, -0.1, 2.5])
def test_sign_task_agrees_with_the_enumerated_policy(theta):
    policies = [SignPolicy(24, margin, theta) for margin in (2, 7, 12)]
    task = SignTask(24, (2, 7, 12))
    torch.testing.assert_close(task.log_odds(theta_of(theta)), theta_of(*(p.log_odds() for p in policies)), **EXACT)
    fisher = (policies[0].probability() * policies[0].score() ** 2).sum()
    torch.testing.assert_close(task.fisher(theta_of(theta))[0, 0], fisher, **EXACT)


def test_bandit_agrees_with_its_softmax(generator):
    problem, theta = bandit(generator)
    probability = (problem.features @ theta).softmax(-1)
    rate = (probability * problem.correct).sum(1)
    torch.testing.assert_close(problem.log_odds(theta), torch.logit(rate), **EXACT)
    score = problem.features - (probability[..., None] * problem.features).sum(1, keepdim=True)
    fisher = torch.einsum("pk,pkd,pke->de", probability, score, score) / problem.n_prompts
    torch.testing.assert_close(problem.fisher(theta), fisher, **EXACT)
    assert score.norm(dim=-1).max() <= problem.score_norm


def test_a_batch_of_parameters_is_each_of_them(generator):
    problem, theta = bandit(generator)
    batch = torch.stack([theta, 2 * theta, -theta])
    for figure in (problem.log_odds, problem.fisher):
        torch.testing.assert_close(figure(batch)[1], figure(2 * theta), **EXACT)
    for name in NAMES:
        torch.testing.assert_close(Rule(name).exact(problem, batch)[2], Rule(name).exact(problem, -theta), **EXACT)


@pytest.mark.parametrize("kind", ["signs", "bandit"])
def test_sampled_rollouts_follow_the_policy(kind, generator):
    problem, theta = (SignTask(12, (2, 4)), theta_of(0.3)) if kind == "signs" else bandit(generator)
    batch = sample(problem, theta, 200, 50, generator)
    rate = lines.success(problem, theta).item()
    # 10,000 responses; prompts differ, so the error over prompts is at most √(1/200)/2
    assert batch.rollouts.rewards.mean().item() == pytest.approx(rate, abs=4 * 0.5 / 200 ** 0.5)
    per_prompt = problem.log_odds(theta).sigmoid()[batch.prompts]
    found = batch.rollouts.rewards.view(200, 50).double().mean(1) - per_prompt
    assert found.mean().abs() < 4 * 0.5 / 10_000 ** 0.5
    # E[ρ] = 1 for the log-probs of a nearby policy: the log-probs are those of what was sampled
    before, after = problem.logp(theta, batch), problem.logp(theta + 0.1, batch)
    step = rf.measure_step(before, after, batch.rollouts, in_sample=False)
    assert abs(step.mean_ratio - 1) < 4 * step.mean_ratio_stderr


@pytest.mark.parametrize(("length", "margins", "message"), [
    (0, (0,), "at least 1, got 0"), (8, (), "at least 1"), (8, (2, 8), "0 to 7 for length 8, got 8"),
    (9, (0,), "1 to 8 for length 9, got 0"), (8, (-1,), "got -1"),
])
def test_impossible_sign_tasks_are_refused(length, margins, message):
    with pytest.raises(ValueError, match=message):
        SignTask(length, margins)


def test_impossible_bandits_are_refused():
    features = torch.zeros(2, 3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="a right and a wrong arm"):
        Bandit(features, torch.tensor([[True, False, False], [True, True, True]]))
    with pytest.raises(ValueError, match=r"correct must have shape \[2, 3\]"):
        Bandit(features, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="features must have dtype float64"):
        Bandit(features.float(), torch.ones(2, 3, dtype=torch.bool))


# -- rules ------------------------------------------------------------------------------------------------------------


def test_reinforce_is_the_gradient_of_success(generator):
    problem, theta = bandit(generator)
    at = theta.requires_grad_()
    expected, = torch.autograd.grad(lines.success(problem, at), at)
    torch.testing.assert_close(Rule("reinforce").exact(problem, theta.detach()), expected, **EXACT)


def test_rules_differ_by_the_factor_of_the_gap():
    task, theta = SignTask(64, (8,)), theta_of(0.2)
    rate = lines.success(task, theta)
    gap = Rule("reinforce").exact(task, theta) / (rate * (1 - rate))
    torch.testing.assert_close(Rule("grpo").exact(task, theta), gap * (rate * (1 - rate)).sqrt(), **EXACT)
    torch.testing.assert_close(Rule("dr_grpo", group_size=8).exact(task, theta), gap * rate * (1 - rate) * 7 / 8,
                               **EXACT)
    torch.testing.assert_close(Rule("grpo", True).exact(task, theta) * 64, Rule("grpo").exact(task, theta), **EXACT)
    assert Rule("unit_norm", True).exact(task, theta).item() == pytest.approx(-1)
    large = Rule("grpo", group_size=4096).exact(task, theta)  # E √(p̂(1 − p̂)) is short of √(J(1 − J)) by O(1/G)
    torch.testing.assert_close(large, Rule("grpo").exact(task, theta), rtol=1e-3, atol=0)


def test_tabular_natural_gradient_moves_the_log_odds_by_the_rate():
    """[derived] F⁺∇J is the advantage of every arm: right arms gain 1 − J, wrong ones −J."""
    problem = Bandit(torch.eye(5, dtype=torch.float64)[None], torch.tensor([[True, False, True, False, False]]))
    theta = theta_of(0.3, -1.0, 0.2, 2.0, 0.1)
    moved = theta + 0.7 * Rule("natural").exact(problem, theta)
    assert (problem.log_odds(moved) - problem.log_odds(theta)).item() == pytest.approx(0.7, rel=1e-6)


def test_natural_gradient_of_a_deterministic_policy_is_no_rounding_noise():
    """Fisher's eigenvalue there is 1e-17 or less, with either sign."""
    problem = Bandit(torch.tensor([[[1.0, 0.5], [0.0, 0.2]]]).double(), torch.tensor([[True, False]]))
    assert Rule("natural").exact(problem, theta_of(40.0, 1.0)).norm() == 0


@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr_grpo", "grpo", "natural"])
def test_sampled_updates_are_the_exact_ones_in_the_mean(name, length_norm, generator):
    task, theta, size = SignTask(8, (2, 4)), theta_of(0.3), 6
    rule = Rule(name, length_norm, size)
    draws = torch.stack([rule.sampled(task, theta, sample(task, theta, 64, size, generator)) for _ in range(40)])
    error = draws.std(0) / 40 ** 0.5
    assert (draws.mean(0) - rule.exact(task, theta)).abs() < 4 * error


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of reinforce, .*got 'ppo'"):
        Rule("ppo")


# -- lines and runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "margins", "theta"), [
    (64, (4, 8, 12), 0.06), (256, (48,), -0.35), (9, (1, 3), 0.8)])
def test_break_even_found_by_search_is_twice_the_distance(length, margins, theta):
    task = SignTask(length, margins)
    direction = Rule("unit_norm").exact(task, theta_of(theta))
    assert lines.break_even(task, theta_of(theta), direction) == pytest.approx(2 * abs(theta), rel=1e-6)


def test_no_break_even_where_every_step_gains():
    problem = Bandit(torch.tensor([[[1.0], [0.0]]]).double(), torch.tensor([[True, False]]))
    assert lines.break_even(problem, theta_of(0.0), theta_of(1.0)) == math.inf
    assert lines.first_loss(lambda x: -x, 1.0) == 0
    assert lines.first_loss(lambda x: x * (1e-8 - x), 1.0) == pytest.approx(1e-8, rel=1e-9)  # below the grid


@pytest.mark.parametrize("fraction", [0.3, 0.9, 1.2])
def test_relative_steps_contract_or_expand_the_distance(fraction):
    """θ becomes (1 − 2c)θ, so the break-even shrinks or grows by |1 − 2c| at every step."""
    _, lengths = relative(SignTask(64, (8,)), theta_of(0.1), fraction, 5)
    expected = 0.2 * abs(1 - 2 * fraction) ** torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close(lengths, expected, rtol=1e-6, atol=0)


def test_vouched_step_is_inside_the_true_break_even():
    task, theta = SignTask(64, (4, 8)), theta_of(0.1)
    direction = Rule("unit_norm").exact(task, theta)
    found = [vouched(scan(task, theta, direction, sample(task, theta, 64, 64, torch.Generator().manual_seed(seed)),
                          SCANNED)) for seed in range(10)]
    assert all(0.2 / 8 < length < 0.2 * 1.1 for length in found)
    noise = sample(task, theta, 4, 2, torch.Generator().manual_seed(0))
    assert vouched(scan(task, theta, -direction, noise, SCANNED)) == 0


# -- estimators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.06, 0.12])
def test_the_cross_fitted_control_variate_is_measure_step(theta):
    task, at = SignTask(16, (2, 10)), theta_of(theta)
    update = theta_of(-2.4 * theta)
    batch = sample(task, at, 32, 16, torch.Generator().manual_seed(1))
    found = ratio_gains(task, at, update, batch)["B + βZ"]
    step = rf.measure_step(task.logp(at, batch), task.logp(at + update, batch), batch.rollouts, in_sample=False)
    assert found.value == pytest.approx(step.success_gain.item(), rel=1e-9)
    assert found.stderr == pytest.approx(step.success_gain_stderr.item(), rel=1e-9)


@pytest.mark.parametrize("margins", [(2,), (10,)])
def test_control_variate_is_no_worse_than_either_part(margins):
    """Root mean square over 60 draws; 20 % room for the sampling of β and of the draws."""
    task, theta = SignTask(16, margins), theta_of(0.12)
    update = theta_of(-0.2)
    truth = (lines.success(task, theta + update) - lines.success(task, theta)).item()
    errors = {"A": 0.0, "B": 0.0, "B + βZ": 0.0}
    for seed in range(60):
        batch = sample(task, theta, 16, 64, torch.Generator().manual_seed(seed))
        for name, estimate in ratio_gains(task, theta, update, batch).items():
            errors[name] += (estimate.value - truth) ** 2
    assert errors["B + βZ"] < 1.2 ** 2 * min(errors["A"], errors["B"])


def test_two_ended_slopes():
    """Where slopes are those of a parabola the trapezoid is exact; on rollouts the end slope is the true one."""
    task, theta, update = SignTask(16, (2, 4)), theta_of(0.12), theta_of(-0.24)
    after = theta + update
    batch = sample(task, after, 400, 50, torch.Generator().manual_seed(0))
    true, _ = lines.derivatives(lambda step: lines.success(task, after + step * update))
    found = end_slope(task, after, update, batch)
    assert abs(found.value - true.item()) < 4 * found.stderr
    gain, crossing = two_ended(found._replace(value=0.3, stderr=0.03), found._replace(value=-0.1, stderr=0.04))
    assert gain == pytest.approx((0.1, 0.025))
    assert crossing == pytest.approx(1.5)
    assert two_ended(found, found)[1] == math.inf
