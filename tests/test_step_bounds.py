"""Certified bounds: their formulas, their arguments, and that no tested policy loses success below them."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy

from rlvr_fast import reference_step as reference
from rlvr_fast.step.bounds import theorem_step_bound, token_step_bound


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("alignment", [-1.0, 0.0, 0.7])
def test_theorem_bound_is_the_specification(alignment, tight):
    bound = theorem_step_bound(alignment, 1.5, 0.25, tight=tight)
    assert isinstance(bound, float)
    assert bound == pytest.approx(reference.theorem_step_bound(alignment, 1.5, 0.25, tight=tight), rel=1e-15)


def test_theorem_bound_by_hand():
    assert theorem_step_bound(2.0, 0.5, 1.0) == pytest.approx(2 / (2 * (1 + 8 * 0.25)))
    assert theorem_step_bound(2.0, 0.5, 1.0, tight=True) == pytest.approx(2 / (2 * (1 + 0.125)))


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("success_rate", [0.0, 0.3, 1 - 1e-9, 1.0])
def test_token_bound_is_the_specification(success_rate, refined):
    bound = token_step_bound(0.7, success_rate, 512, 1.5, 0.25, refined=refined)
    expected = reference.token_step_bound(0.7, success_rate, 512, 1.5, 0.25, refined=refined)
    assert bound == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(bound)


def test_token_bound_by_hand():
    assert token_step_bound(3.0, 0.5, 100, 2.0, 1.0) == pytest.approx(0.5 * 3 / (100 * 5))
    expected = 3 / (100 * (2 + 16 * (math.log(2) + 0.35)))
    assert token_step_bound(3.0, 0.5, 100, 2.0, 1.0, refined=True) == pytest.approx(expected)


def test_bounds_broadcast_over_tensors():
    alignment = torch.tensor([-1.0, 0.5, 2.0])
    norm = torch.tensor([[1.0], [3.0]])
    bound = theorem_step_bound(alignment, norm, 0.1)
    assert bound.shape == (2, 3)
    assert bound.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            expected = theorem_step_bound(alignment[j].item(), norm[i].item(), 0.1)
            assert bound[i, j].item() == pytest.approx(expected, rel=1e-15)


def test_a_longer_response_and_a_higher_success_rate_shrink_the_token_bound():
    lengths = torch.tensor([10, 100, 1000])
    for refined in (False, True):
        assert (token_step_bound(1.0, 0.5, lengths, 1.0, 1.0, refined=refined).diff() < 0).all()
        rates = torch.tensor([0.1, 0.5, 0.9, 0.999])
        assert (token_step_bound(1.0, rates, 10, 1.0, 1.0, refined=refined).diff() < 0).all()


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("theta", [0.05, 0.2, 0.5])
def test_below_every_bound_the_closed_form_policy_gains(length, theta):
    """|d log π(o_t)/dθ| ≤ 2 and |d² log π(o_t)/dθ²| ≤ 1 for every token; sums over T tokens bound the response's."""
    policy = SignPolicy(length, length // 4, theta)
    probability = policy.probability()
    alignment = reference.step_alignment(policy.score(), policy.correct, probability).item()
    rate = policy.success_rate()
    bounds = [theorem_step_bound(alignment, 2.0 * length, 1.0 * length, tight=tight) for tight in (False, True)]
    bounds += [token_step_bound(alignment, rate, length, 2.0, 1.0, refined=refined) for refined in (False, True)]
    for bound in bounds:
        assert 0 < bound < policy.break_even
        assert policy.moved(bound).success_rate() > rate


def test_theorem_bounds_hold_on_random_bandits():
    """Three arms, logits linear in θ: score ≤ 2 max‖x‖, Hessian of log π ≤ max‖x‖² in norm."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        features = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        theta = 2 * torch.randn(2, generator=generator, dtype=torch.float64)
        correct = torch.tensor([True, False, False])
        p = torch.softmax(features @ theta, 0)
        score = features - p @ features
        gap = score[0] - (p[1:, None] * score[1:]).sum(0) / p[1:].sum()
        direction = gap / gap.norm()
        alignment = reference.step_alignment(score @ direction, correct, p).item()
        size = features.norm(dim=1).max().item()
        for tight in (False, True):
            step = theorem_step_bound(alignment, 2 * size, size ** 2, tight=tight)
            assert torch.softmax(features @ (theta + step * direction), 0)[0] > p[0]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"alignment": math.nan}, ValueError, "alignment"),
    ({"alignment": "1"}, TypeError, "alignment must be a number"),
    ({"alignment": torch.tensor([1.0, math.inf])}, ValueError, "alignment must be finite"),
    ({"alignment": torch.tensor([True])}, TypeError, "alignment must hold real numbers"),
    ({"score_norm": 0.0}, ValueError, "score_norm must be finite and positive"),
    ({"score_norm": torch.tensor([1.0, -1.0])}, ValueError, "score_norm must be finite and positive"),
    ({"score_norm": torch.tensor([math.inf])}, ValueError, "score_norm must be finite and positive"),
    ({"score_lipschitz": -0.1}, ValueError, "score_lipschitz must be finite and non-negative"),
    ({"alignment": torch.ones(2), "score_norm": torch.ones(3)}, ValueError, "broadcast"),
    ({"alignment": torch.ones(2), "score_norm": torch.ones(2, device="meta")}, ValueError, "score_norm must be on cpu"),
])
def test_theorem_bound_refuses(change, error, message):
    arguments = {"alignment": 1.0, "score_norm": 1.0, "score_lipschitz": 1.0} | change
    with pytest.raises(error, match=message):
        theorem_step_bound(**arguments)


@pytest.mark.parametrize(("change", "message"), [
    ({"success_rate": 1.1}, r"success_rate must be finite and in \[0, 1\]"),
    ({"success_rate": -0.1}, r"success_rate must be finite and in \[0, 1\]"),
    ({"length": 0}, "length must be finite and positive"),
    ({"token_norm": 0.0}, "token_norm must be finite and positive"),
    ({"token_lipschitz": -1.0}, "token_lipschitz must be finite and non-negative"),
])
def test_token_bound_refuses(change, message):
    arguments = {"alignment": 1.0, "success_rate": 0.5, "length": 10, "token_norm": 1.0, "token_lipschitz": 1.0}
    with pytest.raises(ValueError, match=message):
        token_step_bound(**(arguments | change))
