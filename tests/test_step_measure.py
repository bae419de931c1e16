"""measure_step against the specification, against exact expectations, and against the truth of sampled policies."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy
from step_batches import NAN, expect, measure_log_ratios, one_token_rollouts, ragged_batch

from rlvr_fast import Rollouts
from rlvr_fast import reference_step as reference
from rlvr_fast.simulate.coverage import problem_of
from rlvr_fast.simulate.lines import success
from rlvr_fast.simulate.problems import sample
from rlvr_fast.step.measure import measure_step


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("both_ways", [True, False])
def test_agrees_with_the_specification_on_ragged_groups(seed, both_ways):
    rollouts, before, after, reverse = ragged_batch(seed)
    measure = measure_step(before, after, rollouts, logp_reverse=reverse if both_ways else None, in_sample=False)
    forward = reference.log_ratios(before, after, rollouts.cu_seqlens)
    backward = reference.log_ratios(before, reverse, rollouts.cu_seqlens)
    s, h = ((forward - backward) / 2, forward + backward) if both_ways else (forward, torch.full_like(forward, NAN))

    rates, compared, slopes, bends, ratios = [], [], [], [], []
    for p in range(rollouts.n_prompts):
        mine = rollouts.prompt_index == p
        l, c = forward[mine], rollouts.correct[mine]
        sp, hp = s[mine], h[mine]
        n = (int(c.sum()), int((~c).sum()))
        assert (int(measure.n_correct[p]), int(measure.n_incorrect[p])) == n
        assert bool(measure.defined[p]) == (min(n) >= 1)
        expect(measure.ess[p], reference.effective_sample_size(l))
        for chosen, ess in ((c, measure.ess_correct[p]), (~c, measure.ess_incorrect[p])):
            expect(ess, reference.effective_sample_size(l[chosen]) if chosen.any() else 0.0)
        expect(measure.log_odds_gain[p], reference.log_odds_gain(l, c) if min(n) >= 1 else NAN)
        expect(measure.alignment[p], reference.step_alignment(sp, c) if min(n) >= 1 else NAN)
        expect(measure.stderr[p], reference.class_jackknife(lambda l: l.logsumexp(0) - math.log(len(l)), c, l)
               if min(n) >= 2 else NAN)
        expect(measure.alignment_stderr[p], reference.class_jackknife(torch.mean, c, sp) if min(n) >= 2 else NAN)
        curvature = reference.step_curvature(sp, hp, c) if min(n) >= 2 else torch.tensor(NAN)
        expect(measure.curvature[p], curvature)
        expect(measure.curvature_stderr[p], reference.class_jackknife(lambda s, h: s.var() + h.mean(), c, sp, hp)
               if min(n) >= 3 else NAN)
        slope = measure.alignment[p].item()
        expect(measure.peak[p], reference.step_peak(slope, curvature.item()))
        expect(measure.break_even[p], reference.step_break_even(slope, curvature.item()))
        if len(l) >= 2:
            rates.append(c.double().mean())
            compared.append((l, c))
            slopes.append(reference.success_slope(sp, c))
            bends.append(reference.success_curvature(sp, hp, c))
            ratios.append(l.exp().mean())

    gains = reference.controlled_gains(compared)
    rates, slopes, bends, ratios = map(torch.stack, (rates, slopes, bends, ratios))
    expect(measure.success_before, rates.mean())
    expect(measure.success_after, (rates + gains).mean())
    for name, values in (("success_gain", gains), ("success_slope", slopes), ("success_curvature", bends),
                         ("mean_ratio", ratios)):
        expect(getattr(measure, name), values.mean())
        expect(getattr(measure, f"{name}_stderr"), reference.jackknife(torch.mean, values))
    expect(measure.success_after_stderr, reference.jackknife(torch.mean, rates + gains))
    log_odds, log_odds_stderr = reference.success_log_odds_gain(rates, gains)
    expect(measure.success_log_odds_gain, log_odds)
    expect(measure.success_log_odds_gain_stderr, log_odds_stderr)
    expect(measure.ess_scarcer, torch.minimum(measure.ess_correct.sum(), measure.ess_incorrect.sum()))
    expect(measure.ess_fraction, reference.effective_sample_size(forward) / len(forward))
    expect(measure.success_peak, reference.step_peak(slopes.mean().item(), bends.mean().item()))
    if bends.mean() < 0:
        error = reference.jackknife(lambda a, b: -a.mean() / b.mean(), slopes, bends)
        expect(measure.success_peak_stderr, error)
        expect(measure.success_break_even_stderr, 2 * error)
    else:
        assert measure.success_peak_stderr.isnan()


def test_the_ragged_batches_reach_both_signs_of_pooled_curvature():
    """Without both, the peak's comparison above would leave one branch untested."""
    signs = set()
    for seed in range(4):
        rollouts, before, after, reverse = ragged_batch(seed)
        signs.add(bool(measure_step(before, after, rollouts, logp_reverse=reverse).success_curvature < 0))
    assert signs == {True, False}


@pytest.mark.parametrize("step", [0.1, 0.6, 1.0, 1.7])
def test_exact_on_a_sample_that_is_the_policy(step):
    """Each response as often as its probability says: sample means are expectations, and the identity is exact."""
    policy, rollouts = SignPolicy.exact_sample(6, 2, n_prompts=2)
    moved = policy.moved(step * policy.break_even)
    measure = measure_step(policy.logp_of(rollouts), moved.logp_of(rollouts), rollouts, in_sample=False)
    expect(measure.log_odds_gain, [moved.log_odds() - policy.log_odds()] * 2, 1e-9)
    gain = moved.success_rate() - policy.success_rate()  # A is n/(n − 1) times that, and so is B + βZ at most
    assert abs(measure.success_gain.item() - gain) <= 1.001 * abs(gain) / (4 ** 6 - 1) + 1e-12
    expect(measure.success_before, policy.success_rate(), 1e-9)
    expect(measure.mean_ratio, 1.0, 1e-9)


def test_alignment_and_curvature_from_a_short_step_are_the_derivatives():
    """Central differences: relative error (step)² = 1e-8 on s and h; curvature corrected from n − 1 to n."""
    policy, rollouts = SignPolicy.exact_sample(6, 2)
    step = 1e-4
    logps = [policy.moved(multiple * step).logp_of(rollouts) for multiple in (0, 1, -1)]
    measure = measure_step(logps[0], logps[1], rollouts, logp_reverse=logps[2])
    probability = policy.probability()
    expect(measure.alignment / step, [reference.step_alignment(policy.score(), policy.correct, probability)], 1e-7)
    curvature = sum(sign * (n / (n - 1) * reference.variance(policy.score()[chosen], probability[chosen])).item()
                    for sign, chosen, n in ((1, policy.correct, measure.n_correct[0]),
                                            (-1, ~policy.correct, measure.n_incorrect[0])))
    expect(measure.curvature / step ** 2, [curvature], 1e-5)  # h is the same for every response and drops out


def test_long_responses_keep_small_changes_and_survive_huge_ratios():
    length = 100_000
    rollouts = Rollouts.from_packed(torch.ones(4 * length, dtype=torch.int64), torch.arange(5) * length,
                                    torch.tensor([1.0, 0.0, 1.0, 0.0]), group_size=2)
    before = torch.full((4, length), -0.2, dtype=torch.float32)
    change = torch.tensor([1e-6, -1e-6, 0.1, -0.1], dtype=torch.float64)[:, None]
    after = before.double() + change
    measure = measure_step(before.reshape(-1), after.reshape(-1), rollouts, in_sample=False)
    expect(measure.log_odds_gain, [0.2, 2e4], 1e-8)
    for name in ("ess", "success_gain", "success_gain_stderr", "success_after_stderr", "mean_ratio", "ess_fraction"):
        assert getattr(measure, name).isfinite().all(), name
    assert any("effective sample size gone" in warning for warning in measure.warnings)


def test_one_ratio_of_e_to_10000_leaves_every_error_finite():
    rollouts = one_token_rollouts(torch.tensor([True, True, True, False, False, False]), [0] * 6)
    l = torch.tensor([0.0, 1e4, -1e4, 0.5, -1e4, 0.0], dtype=torch.float64)
    start = torch.full_like(l, -1e5)
    measure = measure_step(start, start + l, rollouts)
    expect(measure.log_odds_gain, [reference.log_odds_gain(l, rollouts.correct)])
    expect(measure.stderr, [reference.class_jackknife(reference.log_mean_ratio, rollouts.correct, l)])
    assert measure.stderr.item() > 1000
    expect(measure.ess_correct, [1.0])


# -- error bars -------------------------------------------------------------------------------------------------------


def coverage(error, stderr):
    """Share of |error| < 2 stderr, and root mean square of stderr over that of the error."""
    share = (error.abs() < 2 * stderr).double().mean()
    return share.item(), (stderr.square().mean() / error.square().mean()).sqrt().item()


def test_per_prompt_error_bars_match_the_scatter():
    """4,000 prompts of 10 correct and 14 incorrect responses, normal s and h: the truth is known in closed form.

    0.92 to 0.96 brackets a t-distributed 95 % with these sizes plus four binomial errors (0.0035 each).
    """
    n_prompts, generator = 4000, torch.Generator().manual_seed(0)
    correct = (torch.arange(24) < 10).repeat(n_prompts)
    rollouts = one_token_rollouts(correct, torch.arange(n_prompts).repeat_interleave(24))
    deviation = torch.where(correct, 0.3, 0.2).double()
    s = 0.1 * correct + deviation * torch.randn(len(correct), generator=generator, dtype=torch.float64)
    h = -0.1 + 0.05 * torch.randn(len(correct), generator=generator, dtype=torch.float64)
    measure = measure_log_ratios(s + h / 2, rollouts, backward=-s + h / 2, in_sample=False)

    true_gain = 0.1 + (0.3 ** 2 - 0.2 ** 2) / 2  # log E[e^ℓ] of a normal ℓ is mean + variance/2; h cancels
    for error, stderr in ((measure.log_odds_gain - true_gain, measure.stderr),
                          (measure.alignment - 0.1, measure.alignment_stderr),
                          (measure.curvature - (0.3 ** 2 - 0.2 ** 2), measure.curvature_stderr)):
        assert abs(error.mean() / error.std()) < 0.1
        share, ratio = coverage(error, stderr)
        assert 0.90 < share < 0.96
        assert ratio == pytest.approx(1, abs=0.06)


def test_pooled_gain_slope_and_curvature_are_unbiased_with_honest_errors():
    """120 batches of 32 prompts x 8: pooled figures of the closed-form policy; the scatter's own error is 6.5 %."""
    policy, batches, generator = SignPolicy(16, 4, 0.3), 120, torch.Generator().manual_seed(1)
    step = 0.2 * policy.break_even
    moved, back = policy.moved(step), policy.moved(-step)
    forward, backward = moved.logp() - policy.logp(), back.logp() - policy.logp()
    s, h = (forward - backward) / 2, forward + backward
    probability, reward = policy.probability(), policy.correct.double()
    truth = {"success_gain": moved.success_rate() - policy.success_rate()}
    for name, x in (("success_slope", s), ("success_curvature", s ** 2 + h)):
        truth[name] = (reference.mean(x * reward, probability)
                       - reference.mean(x, probability) * policy.success_rate()).item()
    collected = {name: [] for name in truth}
    for _ in range(batches):
        rollouts = policy.sample(32, 8, generator)
        measure = measure_step(policy.logp_of(rollouts), moved.logp_of(rollouts), rollouts,
                               logp_reverse=back.logp_of(rollouts), in_sample=False)
        for name, values in collected.items():
            values.append(torch.stack([getattr(measure, name) - truth[name], getattr(measure, f"{name}_stderr")]))
    for name, values in collected.items():
        error, stderr = torch.stack(values, 1)
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(batches), name
        share, ratio = coverage(error, stderr)
        assert share > 0.88, name
        assert ratio == pytest.approx(1, abs=0.2), name


def test_cross_fitting_takes_the_bias_out_of_a_long_step_s_gain():
    """400 batches of 16 prompts x 8 at a step of 1.2 break-evens, of which 3 % of the sample are left.

    The mean gain is within four of its standard errors of the truth; with β from the same prompts it is eight away.
    """
    task, theta, update = problem_of("far")
    truth = float(success(task, theta + 1.2 * update) - success(task, theta))
    batch = sample(task, theta, 400 * 16, 8, torch.Generator().manual_seed(3))
    l = reference.log_ratios(task.logp(theta, batch), task.logp(theta + 1.2 * update, batch), batch.rollouts.cu_seqlens)
    change, reward = (x.view(400, 16, 8) for x in (l.exp() - 1, batch.rollouts.correct.double()))
    b = reward * change
    z = 8 / 7 * (reward - reward.mean(2, keepdim=True)) * change - b
    within_b, within_z = (x - x.mean(2, keepdim=True) for x in (b, z))
    shared, spread = ((within_z * x).sum(2) for x in (within_b, within_z))
    of_all = -shared.sum(1, keepdim=True) / spread.sum(1, keepdim=True)
    of_others = -(shared.sum(1, keepdim=True) - shared) / (spread.sum(1, keepdim=True) - spread)
    gains = [(b + beta.clamp(0, 1)[:, :, None] * z).mean((1, 2)) for beta in (of_others, of_all)]
    fitted, naive = (float((g.mean() - truth) / g.std() * 20) for g in gains)
    assert abs(fitted) < 4
    assert abs(naive) > 8
    first = torch.arange(16 * 8)
    rollouts = one_token_rollouts(batch.rollouts.correct[first], first // 8)
    expect(measure_log_ratios(l[first], rollouts).success_gain, gains[0][0], 1e-9)


def test_pooled_log_odds_gain_is_undefined_outside_the_unit_interval():
    rollouts = one_token_rollouts(torch.tensor([True, True, True, False]), [0, 0, 1, 1])
    measure = measure_log_ratios(torch.tensor([2.0, 2.0, 2.0, -2.0], dtype=torch.float64), rollouts)
    assert measure.success_after > 1
    assert measure.success_log_odds_gain.isnan()
    assert measure.success_log_odds_gain_stderr.isnan()


# -- what is defined where --------------------------------------------------------------------------------------------


def test_prompts_without_a_gap_are_nan_and_have_no_slope():
    correct = torch.tensor([True, False, True, True, False, False, True])
    rollouts = one_token_rollouts(correct, ["a", "a", "b", "b", "c", "c", "single"])
    l = torch.tensor([0.2, -0.1, 3.0, 2.0, -3.0, 1.0, 5.0], dtype=torch.float64)
    measure = measure_log_ratios(l, rollouts, backward=-l, in_sample=False)
    assert measure.defined.tolist() == [True, False, False, False]
    for name in ("log_odds_gain", "alignment", "curvature", "peak", "break_even"):
        assert getattr(measure, name)[1:].isnan().all()
    mine = [(l[i:i + 2], correct[i:i + 2]) for i in (0, 2, 4)]
    expect(measure.success_gain, reference.controlled_gains(mine).mean())  # the single response measured nothing
    expect(measure.success_before, (0.5 + 1 + 0) / 3)
    expect(measure.success_slope, 0.15 / 3)


def test_without_the_reversed_update_only_first_order_figures_remain():
    rollouts, before, after, _ = ragged_batch(0)
    measure = measure_step(before, after, rollouts)
    for name in ("curvature", "curvature_stderr", "peak", "break_even", "success_curvature", "success_peak",
                 "success_break_even", "success_peak_stderr"):
        assert getattr(measure, name).isnan().all()
    assert measure.alignment[measure.defined].isfinite().all()
    assert measure.success_slope.isfinite()


def test_a_downhill_update_has_a_negative_peak():
    s = torch.tensor([-0.2, -0.1, 0.1, 0.3], dtype=torch.float64)
    h = torch.tensor([-1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    rollouts = one_token_rollouts(torch.tensor([True, True, False, False]), [0] * 4)
    measure = measure_log_ratios(s + h / 2, rollouts, backward=-s + h / 2)
    assert measure.curvature.item() < 0
    assert measure.peak.item() < 0
    assert measure.break_even.item() == pytest.approx(2 * measure.peak.item())


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
def test_batches_without_tokens(lengths):
    n = len(lengths)
    rollouts = Rollouts.from_packed(torch.zeros(0, dtype=torch.int64), torch.zeros(n + 1, dtype=torch.int64),
                                    torch.arange(n).remainder(2).float(), [0] * n)
    measure = measure_step(torch.zeros(0), torch.zeros(0), rollouts, logp_reverse=torch.zeros(0))
    if n:
        expect(measure.log_odds_gain, [0.0])
        expect(measure.success_gain, 0.0)
    else:
        assert measure.success_gain.isnan()
        assert measure.ess_fraction.isnan()
        assert "nothing was measured" in " ".join(measure.warnings)
    assert isinstance(repr(measure), str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_padded_layout_and_dtypes(dtype):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(8, 6, generator=generator) < 0.7
    rollouts = Rollouts.from_padded(torch.ones(8, 6, dtype=torch.int64), mask, torch.tensor([0.0, 1.0] * 4),
                                    group_size=4)
    before, after = (-3 * torch.rand(2, 8, 6, generator=generator)).to(dtype)
    before[~mask] = NAN  # padding is never looked at
    measure = measure_step(before, after, rollouts, in_sample=False)
    same = measure_step(rollouts.pack(before).double(), rollouts.pack(after).double(), rollouts, in_sample=False)
    assert torch.equal(measure.log_odds_gain, same.log_odds_gain)
    assert ("half precision" in " ".join(measure.warnings)) == (dtype in (torch.bfloat16, torch.float16))


def test_inputs_that_require_grad_leave_no_graph():
    rollouts, before, after, _ = ragged_batch(0)
    measure = measure_step(before, after.requires_grad_(), rollouts)
    assert not measure.log_odds_gain.requires_grad
