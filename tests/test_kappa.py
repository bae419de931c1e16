"""kappa, its population view, and the recovery of success rates: against enumeration and closed forms."""

import itertools
import math

import pytest
import torch
from advantage_batches import BATCHES, make_rollouts, reference_advantages

from rlvr_fast.advantages import advantages
from rlvr_fast.kappa import (
    NOT_PROPORTIONAL,
    PROPORTIONAL,
    RECOVERABLE,
    WITH_EPS,
    kappa,
    population_kappa,
    recover_from_advantages,
)

GIVEN = torch.zeros(16)


# -- kappa: the share of the gap in the update -------------------------------------------------------------------------


def one_group(size, n_correct, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.randperm(size, generator=generator) < n_correct).float()
    return rewards, torch.randn(size, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("estimator", PROPORTIONAL)
@pytest.mark.parametrize("size", [2, 3, 8, 16])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
def test_update_is_kappa_times_the_gap(estimator, size, eps):
    with_eps = {"eps": eps} if estimator in WITH_EPS else {}
    for n_correct in range(1, size):
        rewards, scores = one_group(size, n_correct)
        rollouts = make_rollouts(rewards, [0] * size, [3] * size)
        gap = scores[rewards == 1].mean(0) - scores[rewards == 0].mean(0)
        update = reference_advantages(rollouts, estimator, **with_eps) @ scores / size
        factor = kappa(rewards.double().mean(), size, estimator, **with_eps)
        torch.testing.assert_close(update, factor * gap, rtol=1e-12, atol=1e-14)


def test_kappa_follows_shapes_dtypes_and_ragged_groups():
    rates = torch.tensor([[0.5, 0.25], [0.0, float("nan")]])
    got = kappa(rates, torch.tensor([2, 4]), "rloo")
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.25], [0.0, float("nan")]]), equal_nan=True)
    assert kappa(0.5, 4, "dr_grpo").dtype == torch.float32
    assert kappa(torch.tensor(0.5, dtype=torch.float64), 4, "dr_grpo").dtype == torch.float64
    for estimator in PROPORTIONAL:
        assert kappa(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([4, 4, 1]), estimator).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", sorted(NOT_PROPORTIONAL))
def test_kappa_refuses_what_is_no_multiple_of_the_gap(estimator):
    with pytest.raises(ValueError, match="not a known multiple of the gap"):
        kappa(0.5, 8, estimator)


@pytest.mark.parametrize("estimator", sorted(set(NOT_PROPORTIONAL) - {"grpo_batch_std", "gpg", "reinforce"}))
def test_the_refused_updates_leave_the_gap(estimator):
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0]).float()
    rollouts = make_rollouts(rewards, [0] * 4 + [1] * 4, [1, 2, 5, 3, 2, 9, 4, 1])
    scores = one_group(4, 1)[1]
    gap = scores[0] - scores[1:].mean(0)
    update = reference_advantages(rollouts, estimator)[:4] @ scores
    assert torch.cosine_similarity(update, gap, dim=0).abs() < 0.995


@pytest.mark.parametrize("estimator", ["grpo_batch_std", "gpg"])
def test_the_refused_factors_depend_on_other_prompts(estimator):
    def first(*others):
        return reference_advantages(make_rollouts([1, 0, *others], [0, 0, 1, 1], [1] * 4), estimator)[0]
    assert first(1, 0) != first(1, 1)


# -- population kappa --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", PROPORTIONAL)
@pytest.mark.parametrize("size", [2, 3])
def test_population_kappa_by_enumeration_of_a_bandit(estimator, size):
    """Every group of G draws from a softmax over four arms, two of them correct."""
    z = torch.tensor([0.3, -0.2, 0.8, 0.1], dtype=torch.float64)
    probability, reward = z.softmax(0), torch.tensor([1.0, 0.0, 1.0, 0.0])
    scores = torch.eye(4, dtype=torch.float64) - probability
    rate = probability @ reward.double()
    gap = (probability * reward / rate) @ scores - (probability * (1 - reward) / (1 - rate)) @ scores
    options = {"eps": 0.0} if estimator in WITH_EPS else {}
    mean, mixed = torch.zeros(4, dtype=torch.float64), 0.0
    for arms in itertools.product(range(4), repeat=size):
        arms = torch.tensor(arms)
        rollouts = make_rollouts(reward[arms], [0] * size, [1] * size)
        weight = probability[arms].prod()
        mean += weight * (reference_advantages(rollouts, estimator, **options) @ scores[arms]) / size
        mixed += weight * (0 < reward[arms].sum() < size)
    for filtered, share in ((False, 1.0), (True, mixed)):
        factor = population_kappa(rate, estimator, size, filtered=filtered)
        torch.testing.assert_close(mean / share, factor * gap, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_population_kappa_closed_forms(size):
    rate = torch.tensor([1e-9, 0.01, 0.3, 0.5, 0.99, 1 - 1e-9], dtype=torch.float64)
    square = rate * (1 - rate)
    binomial = torch.tensor([[math.comb(size, k) * j**k * (1 - j) ** (size - k) * math.sqrt(k / size * (1 - k / size))
                              for k in range(size + 1)] for j in rate.tolist()], dtype=torch.float64).sum(1)
    expected = {"reinforce": square, "rloo": square, "dr_grpo": (1 - 1 / size) * square,
                "maxrl": (1 - rate) * -torch.expm1((size - 1) * torch.log1p(-rate)),
                "grpo_population_std": binomial, "grpo": binomial * math.sqrt((size - 1) / size)}
    for estimator, values in expected.items():
        # 1 - J at J = 1 - 1e-9 keeps 7 digits of float64, raised to no higher power than 1 here.
        torch.testing.assert_close(population_kappa(rate, estimator, size), values, rtol=1e-11, atol=0)


def test_filtering_leaves_a_floor_at_the_extremes():
    extremes = torch.tensor([0.0, 1e-15, 1 - 2**-50, 1.0], dtype=torch.float64)
    floor = math.sqrt(1 / 8 * (1 - 1 / 8))
    got = population_kappa(extremes, "grpo_population_std", 8, filtered=True)
    torch.testing.assert_close(got, torch.full_like(got, floor), rtol=1e-12, atol=0)
    assert population_kappa(torch.tensor([0.0, 1.0]), "grpo", 8).tolist() == [0.0, 0.0]
    assert population_kappa(float("nan") * torch.ones(1), "grpo", 8).isnan().all()


# -- recovering p and the class from advantages ------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", RECOVERABLE)
@pytest.mark.parametrize("size", [2, 3, 8, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_advantages_give_back_the_success_rate(estimator, size, dtype):
    """Shuffled responses of groups with every possible number of correct ones."""
    n_correct = torch.arange(size + 1)
    rewards = (torch.arange(size) < n_correct[:, None]).float().flatten()
    prompts = torch.arange(size + 1).repeat_interleave(size)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(size))
    rewards, prompts = rewards[order], prompts[order]
    rates = n_correct[prompts] / size
    found = recover_from_advantages(
        advantages(make_rollouts(rewards, prompts, [1] * len(rewards)), estimator).to(dtype), size, estimator)
    mixed = (rates > 0) & (rates < 1)
    assert torch.equal(found.mixed, mixed)
    assert torch.equal(found.correct, mixed & (rewards == 1))
    torch.testing.assert_close(found.success_rate[mixed], rates[mixed], rtol=0, atol=1e-7)
    assert found.success_rate[~mixed].isnan().all()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_recovery_honours_eps(eps):
    rollouts = make_rollouts([1, 0, 0, 1, 1, 1, 0, 1], [0] * 4 + [1] * 4, [1] * 8)
    found = recover_from_advantages(advantages(rollouts, "grpo", eps=eps), 4, eps=eps)
    assert found.success_rate.tolist() == [0.5] * 4 + [0.75] * 4
    assert found.correct.tolist() == (rollouts.rewards == 1).tolist()


def test_recovery_agrees_with_the_closed_form():
    found = recover_from_advantages(advantages(BATCHES["contiguous"], "grpo", eps=0.0), 4, eps=0.0)
    positive = advantages(BATCHES["contiguous"], "grpo", eps=0.0)[found.correct]
    torch.testing.assert_close(found.success_rate[found.correct], 1 / (1 + positive.square() * 4 / 3))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: kappa(1.5, 8, "grpo"), ValueError, r"success_rate must be in \[0, 1\]"),
    (lambda: kappa("half", 8, "grpo"), TypeError, "success_rate must be a number"),
    (lambda: kappa(torch.tensor([1]), 8, "grpo"), TypeError, "success_rate must have dtype"),
    (lambda: kappa(0.5, 0, "grpo"), ValueError, "group_size must be >= 1, got 0"),
    (lambda: kappa(0.5, 8.0, "grpo"), TypeError, "group_size must be an int"),
    (lambda: kappa(torch.ones(2), torch.tensor([4, 0]), "grpo"), ValueError, "group_size must be >= 1"),
    (lambda: kappa(0.5, 8, "ppo"), ValueError, "estimator must be one of"),
    (lambda: kappa(0.5, 8, "rloo", eps=1e-4), ValueError, "eps must be 0 for estimator 'rloo'"),
    (lambda: kappa(0.5, 8, "grpo", eps=-1.0), ValueError, "eps must be >= 0"),
    (lambda: population_kappa(0.5, "grpo"), TypeError, "group_size must be an int >= 2, got None"),
    (lambda: population_kappa(0.5, "grpo", 1), ValueError, "group_size must be >= 2, got 1"),
    (lambda: population_kappa(0.5, "opo", 8), ValueError, "not a known multiple of the gap"),
    (lambda: population_kappa(0.5, "reinforce", filtered=True), ValueError, "no groups to filter"),
    (lambda: population_kappa(0.5, "grpo", 8, filtered="yes"), TypeError, "filtered must be a bool"),
    (lambda: recover_from_advantages([0.5], 8), TypeError, "advantages must be a torch.Tensor"),
    (lambda: recover_from_advantages(GIVEN[:, None], 8), ValueError, "advantages must have shape"),
    (lambda: recover_from_advantages(GIVEN / 0, 8), ValueError, "advantages must be finite"),
    (lambda: recover_from_advantages(GIVEN, 1), ValueError, "group_size must be >= 2"),
    (lambda: recover_from_advantages(GIVEN, 8, "maxrl"), ValueError, "'maxrl' cannot be inverted"),
    (lambda: recover_from_advantages(GIVEN, 8, "opo"), ValueError, "estimator must be one of"),
    (lambda: recover_from_advantages(GIVEN, 8, "dr_grpo", eps=1e-4), ValueError, "eps must be 0"),
    (lambda: recover_from_advantages(GIVEN + 0.3, 8, "dr_grpo"), ValueError, "never give 0.3"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
