"""State tracking over finite groups: the model against enumeration, its closed forms, and sampling against both."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch

from rlvr_fast.simulate.relay.exact import (
    curve,
    flow,
    hand_over,
    margin,
    mixture,
    plateau_exponent,
    rearrangements,
    signal,
    spread_slope,
    spread_success,
    step_probabilities,
)
from rlvr_fast.simulate.relay.group import alternating, cyclic, named, symmetric
from rlvr_fast.simulate.relay.task import Prompts, StateTracking
from rlvr_fast.simulate.relay.training import Recipe, gradient, level_gaps, train

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 sums of the same terms in another order
GROUPS = ("Z_5", "S_3")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every_prompt(task: StateTracking, length: int) -> Prompts:
    """Each ordered choice of actions and of identifiers once; where a chain starts does not matter."""
    order = task.group.order
    rows = [([*chosen, *(a for a in range(order) if a not in chosen)], identifiers)
            for chosen in permutations(range(order), length)
            for identifiers in permutations(range(task.n_identifiers), length)]
    order, identifiers = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Prompts(order, identifiers, torch.zeros(len(order), dtype=torch.int64))


def enumerated(task: StateTracking, q: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, ...]:
    """Per prompt and chain: probability [R, C], reward [R, C], length-normalised score [R, C, N²]."""
    step, length = task.step(q, prompts), prompts.length
    kernels = task.kernels(q, prompts).gather(2, prompts.order[:, None].expand(-1, length, -1))  # by place
    columns = []
    for chain in product(range(task.group.order), repeat=length):
        places = torch.tensor(chain).expand(len(prompts.order), -1)
        chance = kernels.gather(2, places[..., None])[..., 0].prod(1)
        scores = task.response_scores(step, task.through_attention(step, task.token_by_logit(step, places)))
        columns.append((chance, task.states(prompts, places)[1].double(), scores))
    return tuple(torch.stack(column, 1) for column in zip(*columns, strict=True))


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_success_and_its_gradient_are_the_enumerated_ones(name, length, generator):
    task = StateTracking(named(name), n_identifiers=4, c_b=1.5)
    q = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    prompts = task.prompts(length, 3, generator)
    with torch.no_grad():
        chance, reward, scores = enumerated(task, q, prompts)
    torch.testing.assert_close(chance.sum(1), torch.ones(3, dtype=torch.float64), **EXACT)
    rates = task.success(q, prompts)
    torch.testing.assert_close(rates, (chance * reward).sum(1), **EXACT)
    by_autograd, = torch.autograd.grad(rates.sum(), q)
    by_scores = length * torch.einsum("rc,rc,rcq->q", chance, reward, scores)
    torch.testing.assert_close(by_scores.view(4, 4), by_autograd, **EXACT)
    assert torch.einsum("rc,rcq->rq", chance, scores).abs().max() < 1e-12  # E[score] = 0


def test_entropy_and_its_derivative(generator):
    task = StateTracking(symmetric(3), n_identifiers=5)
    q = torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    prompts = task.prompts(4, 3, generator)
    step, kernels = task.step(q, prompts), task.kernels(q, prompts)
    torch.testing.assert_close(task.entropy(step), -(kernels * kernels.log()).sum(-1), **EXACT)
    by_autograd, = torch.autograd.grad(task.entropy(step).sum(), q, retain_graph=True)
    closed = task.total(step, task.through_attention(step, task.entropy_by_logit(step)))
    torch.testing.assert_close(closed, by_autograd, **EXACT)


def test_the_frozen_map_is_exact_given_the_right_position():
    task = StateTracking(cyclic(96))
    prompts = task.prompts(45, 2, torch.Generator().manual_seed(0))
    attentive = task.kernels(1e3 * torch.eye(48, dtype=torch.float64), prompts).gather(2, prompts.actions[..., None])
    torch.testing.assert_close(attentive, torch.full_like(attentive, 96 ** 4 / (96 ** 4 + 95)), **EXACT)
    assert task.success(1e3 * torch.eye(48, dtype=torch.float64), prompts).min() > 0.9999


def test_draws_follow_the_kernels(generator):
    task = StateTracking(alternating(4), n_identifiers=6, c_b=1.0)
    one = task.prompts(3, 1, generator)
    prompts = Prompts(*(part.expand(20_000, *part.shape[1:]) for part in one))
    q = torch.randn(6, 6, generator=generator)
    places = task.draw(task.step(q, prompts), generator)
    expected = task.kernels(q.double(), one)[0].gather(1, one.order.expand(3, -1))
    seen = torch.nn.functional.one_hot(places, 12).double().mean(0)
    assert ((seen - expected) / (expected * (1 - expected) / 20_000).sqrt()).abs().max() < 4  # 36 shares


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("length", [1, 3, 7])
def test_spread_errors_have_the_closed_form(name, length):
    """The paper's J ≈ 1/d + Δ^L and gradient ∝ Δ^L (1 − Δ), as exact statements."""
    group = named(name)
    logit = double(1.3).requires_grad_()
    right = torch.sigmoid(logit - math.log(group.order - 1))  # against d − 1 others with logit 0
    kernel = ((1 - right) / (group.order - 1)).expand(group.order) \
        + (right - (1 - right) / (group.order - 1)) * (torch.arange(group.order) == 2)
    reached = group.walk(kernel.expand(1, length, -1))[0]
    target = group.path(torch.tensor([group.identity]), torch.full((1, length), 2))[0, -1]
    delta = margin(right, group.order)
    torch.testing.assert_close(reached[target], spread_success(delta, length, group.order)[0], **EXACT)
    slope, = torch.autograd.grad(reached[target], logit)
    torch.testing.assert_close(slope / length, spread_slope(delta, length, group.order).detach(), **EXACT)


def test_rearrangements_are_exact_where_no_other_sum_coincides():
    """Actions 1, 4, 16 of Z_200: no three of them add up to 21 in another way than once each."""
    group, u, v, w = cyclic(200), 0.5, 0.1, 0.3 / 197
    actions = torch.tensor([1, 4, 16])
    kernels = torch.full((1, 3, 200), w, dtype=torch.float64)
    kernels[0, :, actions] = v
    kernels[0, torch.arange(3), actions] = u
    permanent = rearrangements(double(u - v), double(v - w), 3)
    expected = permanent + (1 - (1 - 200 * w) ** 3) / 200
    torch.testing.assert_close(group.walk(kernels)[:, 21], expected, **EXACT)
    assert float(rearrangements(double(0.0), double(1.0), 6)) == 720


@pytest.mark.parametrize(("order", "length"), [(5, 1), (6, 3), (7, 7)])
def test_step_probabilities_along_the_line(order, length, generator):
    task = StateTracking(cyclic(order), n_identifiers=8)
    prompts = task.prompts(length, 1, generator)
    kernel = task.kernels(0.7 * torch.eye(8).double(), prompts)[0].gather(1, prompts.order.expand(length, -1))
    right, another, other = step_probabilities(task, length, double(0.7))
    torch.testing.assert_close(kernel[0, :1], right, **EXACT)
    torch.testing.assert_close(kernel[0, 1:length], another.expand(length - 1), **EXACT)
    torch.testing.assert_close(kernel[0, length:], other.expand(order - length), **EXACT)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_expected_gradient_keeps_to_one_direction(name, beta):
    """Over every prompt and chain: ∇J, its norm and the gap's from the slope along I alone."""
    n_identifiers, length = 4, 2
    task = StateTracking(named(name), n_identifiers, c_b=1.5)
    prompts, line = every_prompt(task, length), torch.eye(n_identifiers, dtype=torch.float64)
    at = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(task.success(at * line, prompts).mean(), at)
    q = (beta * line).requires_grad_()
    rates = task.success(q, prompts)
    full, = torch.autograd.grad(rates.mean(), q)
    torch.testing.assert_close(full, slope / (n_identifiers - 1) * (line - 1 / n_identifiers), **EXACT)
    with torch.no_grad():
        chance, reward, scores = enumerated(task, q, prompts)
        means = [torch.einsum("rc,rcq->q", chance * verdict, scores) / (chance * verdict).sum()
                 for verdict in (reward, 1 - reward)]
    rate = float(rates.detach().mean())
    expected = slope.abs() / (length * (n_identifiers - 1) ** 0.5 * rate * (1 - rate))
    torch.testing.assert_close((means[0] - means[1]).norm(), expected, **EXACT)


def test_zero_is_a_saddle_only_where_actions_commute():
    at = double(0.0, 0.2)
    flat, tilted = (curve(StateTracking(named(name), 4), 3, at, n_prompts=400) for name in ("Z_30", "A_4"))
    assert abs(float(flat.slope[0])) < 1e-12
    assert flat.slope[1] > 1e-3
    assert tilted.slope[0] > 1e-2


def test_long_horizons_follow_the_margin_alone():
    """J = 1/d + (1 − 1/d)Δ^L also where errors are not spread: to 1e-4 at L = 15, to 1e-2 at L = 5."""
    task, beta = StateTracking(cyclic(96)), torch.arange(0.2, 4, 0.4, dtype=torch.float64)
    for length, within in ((5, 1e-2), (15, 1e-4)):
        level = curve(task, length, beta, n_prompts=16)
        assert (level.success - spread_success(level.margin, length, 96)).abs().max() < within


# -- the flow ---------------------------------------------------------------------------------------------------------


def test_flow_takes_the_time_of_small_steps():
    task = StateTracking(cyclic(12), n_identifiers=8)
    beta = torch.arange(0.0, 4, 0.02, dtype=torch.float64)
    levels = [curve(task, length, beta, n_prompts=4) for length in (2, 6)]
    expected = flow(levels, 8, entropy_weight=1e-3, start=0.1)
    speed = sum(level.slope / level.length + 1e-3 * level.entropy_slope for level in levels) / 2 / 7
    now, time = 0.1, 0.0
    while now < levels[1].first(0.9):
        i = int(now / 0.02)
        now += 0.05 * float(speed[i] + (now / 0.02 - i) * (speed[i + 1] - speed[i]))
        time += 0.05
    assert expected.reaches(levels[1], 0.9) == pytest.approx(time, rel=5e-3)
    assert expected.stalled_at == math.inf
    assert expected.reaches(levels[0], 0.05) == 0
    assert expected.reaches(levels[1], 1.5) == math.inf


def test_ratio_seven_waits_ten_times_longer_and_for_ever_with_an_entropy_bonus():
    """In expectation, Z_96: {5, 15, 45} and {5, 35}, and each level's own signal at the hand-over."""
    task, beta = StateTracking(cyclic(96)), torch.arange(0.1, 5.5, 0.1, dtype=torch.float64)
    levels = {length: curve(task, length, beta, n_prompts=4) for length in (5, 15, 35, 45)}
    waits = []
    for easy, hard in ((5, 15), (5, 35)):
        way = flow([levels[easy], levels[hard]], 48)
        waits.append(way.times(96)[hard][0] - way.times(96)[easy][1])
        handing = hand_over(levels[easy], levels[hard])
        i = int((beta - handing["beta"]).abs().argmin())
        assert signal(levels[hard], 48)[i] > signal(levels[easy], 48)[i]
        assert signal(levels[hard], 48)[i - 1] < signal(levels[easy], 48)[i - 1]
        assert handing["condition_beta"] == pytest.approx(handing["beta"], abs=0.25)  # the paper's condition, in β
        excess = levels[hard].margin ** hard - (1 - levels[easy].margin)
        i = int((beta - handing["condition_beta"]).abs().argmin())
        assert excess[i] > 0 > excess[i - 1]
    assert waits[1] > 10 * abs(waits[0])
    relay, stuck = (flow([levels[length] for length in lengths], 48, entropy_weight=1e-3)
                    for lengths in ((5, 15, 45), (5, 35)))
    assert relay.times(96)[45][1] < math.inf
    assert stuck.times(96)[35] == (math.inf, math.inf)
    assert 1.5 < stuck.stalled_at < 3


def test_plateau_exponents():
    assert plateau_exponent(4, 4) == 1
    assert plateau_exponent(4, 1, derived=True) == 0  # equal levels do not wait
    assert plateau_exponent(4, 1e9) == pytest.approx(3, abs=1e-6)
    assert plateau_exponent(4, 1e9, derived=True) == pytest.approx(3, abs=1e-6)


def test_mixtures_grow_by_the_ratio():
    task = StateTracking(cyclic(96))
    assert mixture(task, 5, 3, 45) == (5, 15, 45)
    assert mixture(task, 5, 7, 45) == (5, 35)
    assert mixture(task, 25, 1.12, 32) == (25, 28, 32)  # 1.12 · 25 is 28, not the float just above


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Z_12", "A_4"])
def test_sampled_success_and_gap_are_the_exact_ones(name):
    task, generator = StateTracking(named(name), n_identifiers=8), torch.Generator().manual_seed(3)
    lengths, beta = (2, 3, 6), double(0.4, 0.8, 1.2, 1.6, 2.0)
    levels = [curve(task, length, beta, n_prompts=4000) for length in lengths]
    z = {"success": [], "gap": []}
    for i, at in enumerate(beta.float()):
        gap = level_gaps(task, at * torch.eye(8), lengths, 2000, generator)
        assert gap.prompt_ids == lengths
        for j, level in enumerate(levels):
            rate = float(level.success[i])
            truth = (float(level.slope[i]) / (level.length * rate * (1 - rate))) ** 2 / 7
            z["success"].append((float(gap.success_rate[j]) - rate) / (rate * (1 - rate) / 2000) ** 0.5)
            z["gap"].append(float((gap.norm_sq[j] - truth) / gap.stderr[j]))
    for values in map(torch.tensor, z.values()):
        assert values.abs().max() < 3.5
        assert abs(float(values.mean())) < 3 / len(values) ** 0.5


def test_batches_point_where_the_flow_goes():
    """Mean of 300 batches, baseline and entropy bonus included, against dβ/dt."""
    task, generator, lengths = StateTracking(cyclic(12), n_identifiers=8), torch.Generator().manual_seed(0), (2, 4)
    recipe, at, line = Recipe(batch_size=256, entropy_weight=0.1), double(0.9), torch.eye(8)
    expected = sum(level.slope / level.length + 0.1 * level.entropy_slope
                   for level in (curve(task, length, at, n_prompts=4000) for length in lengths)) / 2 / 7
    moved = []
    for _ in range(300):
        direction, reward = gradient(task, 0.9 * line, lengths, recipe, 0.4, generator)
        assert 0 < reward < 1
        moved.append(float((direction * line).mean() - (direction * (1 - line)).mean() / 7) * 8)
    moved = torch.tensor(moved, dtype=torch.float64)
    assert abs(moved.mean() - expected) < 3 * moved.std() / 300 ** 0.5
    assert moved.mean() > 10 * moved.std() / 300 ** 0.5  # so the comparison says something


def test_runs_repeat_and_ignore_how_they_are_watched():
    task, recipe = StateTracking(cyclic(12), n_identifiers=8), Recipe(10.0, 64)
    runs = [train(task, (2, 6), recipe, 6, seed=seed, measure_every=every, n_measured=n)
            for seed, every, n in ((1, 3, 16), (1, 6, 0), (2, 6, 0))]
    assert [run["step"].tolist() for run in runs] == [[0, 3, 6], [0, 6], [0, 6]]
    assert runs[0]["concentration"][-1] == runs[1]["concentration"][-1] != runs[2]["concentration"][-1]
    assert "signal" not in runs[1]
