"""What GapMonitor reports from measured gaps and steps, against their own summaries and planted truths."""

from __future__ import annotations

import math

import pytest
import torch
from monitor_ranks import Step, monitor, once

import rlvr_fast as rf

EXACT = 1e-12  # float64 sums in another order
FLOAT32 = 1e-6  # the head pass and response gradients are float32


@pytest.fixture(scope="module")
def step() -> Step:
    return Step.sample(0)


# -- tier 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["hidden", "logits", "head"])
def test_a_measured_gap_reports_what_its_own_summary_does(step, level):
    gap = rf.gradient_gap(step.hidden, step.weight, step.rollouts, level=level)
    summary = {key: value for key, value in gap.summary().items() if not math.isnan(value)}
    found = once(of=monitor(level=level), rollouts=step.rollouts, hidden=step.hidden, weight=step.weight)
    shared = summary.keys() - {"rlvr/gap/batch_norm_sq_stderr"}  # belongs to a batch, does not add
    assert {key: found[key] for key in shared} == pytest.approx({key: summary[key] for key in shared}, rel=FLOAT32)
    given = once(of=monitor(level=level), gap=gap)
    assert {key: given[key] for key in shared} == pytest.approx({key: summary[key] for key in shared}, rel=FLOAT32)


def test_a_gap_of_the_scored_responses_goes_with_the_rewards_of_all():
    gap, advantages, _, _ = planted(0)
    whole = once(gap=gap, advantages=advantages)
    rewards = torch.full((26,), math.nan)
    scored = torch.arange(26) % 13 != 5
    rewards[scored] = gap.moments.responses.correct.float()
    prompt_ids, spread = torch.full((26,), 2), torch.zeros(26)
    prompt_ids[scored], spread[scored] = gap.moments.responses.prompt_index, advantages
    found = once(gap=gap, rewards=rewards, prompt_ids=prompt_ids, advantages=spread)
    assert found["rlvr/group/frac_unscored"] == 2 / 26
    assert found["rlvr/gap/cos_update"] == whole["rlvr/gap/cos_update"]
    assert found["rlvr/gap/norm_sq"] == whole["rlvr/gap/norm_sq"]


def planted(seed: int, prompts: int = 3, n: int = 8, width: int = 6, noise: float = 1.0):
    """(a Gap of responses around planted class means, their advantages, the true gap and update vectors)."""
    generator = torch.Generator().manual_seed(seed)
    planted_means = torch.randn(prompts, 2, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    correct = (torch.arange(n) % 4 != 0).repeat(prompts)  # p = 3/4
    prompt = torch.arange(prompts).repeat_interleave(n)
    vectors = planted_means[prompt, correct.long()] + noise * torch.randn(prompts * n, width, generator=generator)
    advantages = torch.where(correct, 1.0, -3.0) * (1.0 + prompt)  # a multiple of the gap, another in every prompt
    responses = rf.Responses(correct, prompt, tuple(range(prompts)))
    gap = rf.gap_from_gradients(rf.ResponseGradients(responses, vectors.float()), level="hidden", length_norm=True)
    update = (advantages[:, None] * planted_means[prompt, correct.long()]).sum(0)
    return gap, advantages, (planted_means[:, 1] - planted_means[:, 0]).mean(0), update


def test_cosine_with_the_update_is_exact_without_noise():
    gap, advantages, true_gap, update = planted(0, noise=0.0)
    found = once(gap=gap, advantages=advantages)
    expected = torch.cosine_similarity(true_gap, update, dim=0)
    assert found["rlvr/gap/cos_update"] == pytest.approx(float(expected), rel=FLOAT32)


def test_products_behind_the_cosine_are_unbiased():
    """Each of the three means over 225 draws lies within four standard errors of the truth; uncorrected, none does."""
    draws = []
    for seed in range(225):
        gap, advantages, true_gap, update = planted(seed)
        own = monitor()
        own.update(gap=gap, advantages=advantages)
        own.compute()
        draws.append([own._sums[name] for name in ("gap_dot_update", "update_norm_sq", "update_gap_norm_sq")])
    draws = torch.tensor(draws, dtype=torch.float64)
    truth = torch.stack([true_gap @ update, update @ update, true_gap @ true_gap])
    error = (draws.mean(0) - truth).abs()
    stderr = draws.std(0) / 15
    assert (error < 4 * stderr).all()
    # What the noise adds: Σ a_i b_i tr Σ over 3 prompts of 6 + 2 responses in 6 coordinates of unit variance.
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    added = 6 * torch.stack([(scale * (1 + 3)).sum() / 3, (scale.square() * (6 * 1 + 2 * 9)).sum(),
                             torch.tensor(3 * (1 / 6 + 1 / 2) / 9)])
    assert (added > 8 * stderr).all()


# -- tiers 4 and 5 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_gap():
    """Two prompts' ModelGap over a small network, with a direction."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    ids = torch.randint(0, 5, (8, 3))
    rollouts = rf.Rollouts.from_padded(ids, None, torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 0]), group_size=4)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with rf.ModelGap(model, rollouts, method="segmented", direction=direction) as probe:
        logp = model(ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        probe.backward(logp)
        (-(rf.advantages(rollouts)[:, None] * logp)).sum().backward()
    return rollouts, probe.gap()


def test_a_model_gap_reports_its_own_summary(model_gap):
    rollouts, gap = model_gap
    found = once(of=monitor(level="model"), rollouts=rollouts, gap=gap)
    summary = {key: value for key, value in gap.summary().items() if not math.isnan(value)}
    assert {key: found[key] for key in summary} == pytest.approx(summary, rel=FLOAT32)
    assert {"rlvr/gap/coverage", "rlvr/model/alignment", "rlvr/gap/norm_sq"} <= summary.keys()


def test_a_prompt_without_vectors_cannot_come_twice(model_gap):
    _, gap = model_gap
    own = monitor(level="model")
    own.update(gap=gap)
    own.update(gap=gap)
    with pytest.raises(ValueError, match="a prompt occurs twice"):
        own.compute()


def measured_step(curvature: float) -> rf.StepMeasure:
    """Along a known direction: log-ratios whose success rate rises, and bends by ``curvature`` and noise."""
    generator = torch.Generator().manual_seed(0)
    correct = (torch.arange(512) % 2 == 0).float()
    slope = 0.02 * (2 * correct - 1) + 0.005 * torch.randn(512, generator=generator)
    bend = curvature * correct + 0.1 * torch.randn(512, generator=generator)
    rollouts = rf.Rollouts.from_packed(torch.ones(512, dtype=torch.int64), torch.arange(513), correct, group_size=8)
    start = torch.full((512,), -3.0)
    return rf.measure_step(start, start + slope + bend / 2, rollouts, logp_reverse=start - slope + bend / 2,
                           in_sample=False)


def test_learning_rate_bound_is_the_measured_break_even():
    step = measured_step(curvature=-0.05)
    found = once(step=step, learning_rate=1e-3)
    assert found["rlvr/lr/bound"] == pytest.approx(1e-3 * float(step.success_break_even), rel=EXACT)
    assert found["rlvr/lr/ratio"] == pytest.approx(1 / float(step.success_break_even), rel=EXACT)


@pytest.mark.parametrize("curvature", [0.05, 0.005])
def test_no_bound_where_the_success_rate_does_not_bend_down_beyond_its_error(curvature):
    step = measured_step(curvature)
    assert float(step.success_curvature) > -2 * float(step.success_curvature_stderr)
    assert once(step=step, learning_rate=1e-3) == {}
