"""What GapMonitor reports from verdicts, advantages, log-probs and token statistics, each worked out here."""

from __future__ import annotations

import math
import re

import pytest
import torch
from monitor_ranks import GROUP_SIZE, IDS, REWARDS, Step, monitor, once, without_time

import rlvr_fast as rf
from rlvr_fast.monitor import METRICS, describe_metrics

EXACT = 1e-12  # float64 sums in another order
FLOAT32 = 1e-6  # the head pass and response gradients are float32


@pytest.fixture(scope="module")
def step() -> Step:
    return Step.sample(0)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_safe_for_loggers_and_documented():
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert re.fullmatch(r"rlvr/[a-z_/]+", key)
        assert "min" not in key
        assert "max" not in key
        assert f"`{key}`" in describe_metrics()
    assert all(metric.meaning and metric.unit and metric.source and 0 <= metric.tier <= 5 for metric in METRICS)


def test_every_metric_of_tiers_0_to_3_is_reached_by_one_full_update(step):
    own = monitor(group_size=GROUP_SIZE)
    step.feed(own)
    found = own.compute()
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    # The random head has no gap to speak of: what divides by its norm is absent, not 0.
    absent = {metric.key for metric in METRICS if metric.tier <= 3} - set(found)
    assert absent <= {"rlvr/gap/stderr", "rlvr/gap/cos_update"}
    assert set(without_time(found)) <= {metric.key for metric in METRICS}


# -- tier 0 -----------------------------------------------------------------------------------------------------------


def test_groups_from_rewards_and_ids():
    found = once(rewards=REWARDS, prompt_ids=IDS)
    assert found == {"rlvr/group/frac_mixed": 0.5, "rlvr/group/frac_solved": 0.25, "rlvr/group/frac_failed": 0.25,
                     "rlvr/group/p_mean": 0.4375, "rlvr/group/p_mixed": 0.375, "rlvr/group/frac_unscored": 0.0}


def test_prompts_weigh_alike_whatever_their_number_of_responses():
    found = once(rewards=REWARDS[:13], prompt_ids=[0] * 4 + [1] * 8 + [2])  # solved, p = 1/8, a single correct one
    assert found["rlvr/group/p_mean"] == pytest.approx((1 + 1 / 8 + 1) / 3, rel=EXACT)
    assert found["rlvr/group/frac_mixed"] == pytest.approx(1 / 3, rel=EXACT)


def test_advantages_alone_tell_mixed_groups_and_their_rate_but_not_solved_from_failed():
    rollouts = rf.Rollouts.from_padded(torch.ones(16, 1, dtype=torch.int64), None, REWARDS, group_size=4)
    shuffled = rf.advantages(rollouts)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    found = once(of=monitor(group_size=4), advantages=shuffled)
    assert found.keys() == {"rlvr/group/frac_mixed", "rlvr/group/p_mixed", "rlvr/gap/kappa"}
    assert found["rlvr/group/frac_mixed"] == 0.5
    assert found["rlvr/group/p_mixed"] == pytest.approx(0.375, rel=EXACT)


def test_rewards_and_advantages_without_ids_tell_all_of_the_groups():
    rollouts = rf.Rollouts.from_padded(torch.ones(16, 1, dtype=torch.int64), None, REWARDS, group_size=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = once(of=monitor(group_size=4), advantages=rf.advantages(rollouts)[order], rewards=REWARDS[order])
    expected = once(rewards=REWARDS, prompt_ids=IDS)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=EXACT)


def test_without_the_group_size_zero_advantages_still_tell_solved_from_failed():
    rollouts = rf.Rollouts.from_padded(torch.ones(16, 1, dtype=torch.int64), None, REWARDS, group_size=4)
    found = once(advantages=rf.advantages(rollouts)[:12], rewards=REWARDS[:12])
    groups = {name: found[f"rlvr/group/frac_{name}"] for name in ("mixed", "solved", "failed")}
    assert groups == pytest.approx({"mixed": 1 / 3, "solved": 1 / 3, "failed": 1 / 3}, rel=EXACT)


def test_rewards_without_ids_tell_only_the_success_rate():
    assert once(rewards=REWARDS) == {"rlvr/group/p_mean": 0.4375, "rlvr/group/frac_unscored": 0.0}


def test_the_success_rate_of_whole_groups_stands_in_for_fragments():
    """Two responses of each group are here: of themselves they would make the group of p = 1/4 a failed one."""
    some = torch.tensor([0, 1, 4, 5, 10, 11, 12, 14])
    rate = REWARDS.view(4, 4).mean(1)[IDS]
    found = once(rewards=REWARDS[some], prompt_ids=IDS[some], success_rate=rate[some])
    assert found == once(rewards=REWARDS, prompt_ids=IDS)
    assert once(rewards=REWARDS[some], prompt_ids=IDS[some])["rlvr/group/frac_failed"] == 0.5


@pytest.mark.parametrize("estimator", ["grpo", "grpo_population_std", "dr_grpo", "rloo", "maxrl"])
def test_kappa_is_the_gaps_weight_in_the_update_for_every_proportional_estimator(estimator):
    rollouts = rf.Rollouts.from_padded(torch.ones(16, 1, dtype=torch.int64), None, REWARDS, group_size=4)
    found = once(of=monitor(estimator=estimator), rewards=REWARDS, prompt_ids=IDS,
                 advantages=rf.advantages(rollouts, estimator))
    eps = 1e-4 if estimator.startswith("grpo") else 0.0
    expected = rf.kappa(torch.tensor([1, 0, 0.25, 0.5], dtype=torch.float64), 4, estimator, eps=eps).mean()
    assert found["rlvr/gap/kappa"] == pytest.approx(float(expected), rel=FLOAT32)


def test_an_unscored_response_has_no_class_and_is_counted():
    rewards = REWARDS.clone()
    rewards[9] = math.nan  # one of three incorrect ones
    found = once(rewards=rewards, prompt_ids=IDS)
    assert found["rlvr/group/frac_unscored"] == 1 / 16
    assert found["rlvr/group/p_mixed"] == pytest.approx((1 / 3 + 1 / 2) / 2, rel=EXACT)


def test_a_success_rate_that_is_not_known_is_left_out():
    rate = torch.tensor([0.5, 0.5, math.nan, math.nan])
    found = once(rewards=torch.tensor([1.0, 0, math.nan, math.nan]), prompt_ids=[0, 0, 1, 1], success_rate=rate)
    assert found["rlvr/group/p_mean"] == 0.5
    assert found["rlvr/group/frac_mixed"] == 1.0
    assert found["rlvr/group/frac_failed"] == 0.0


def test_kappa_is_not_reported_for_estimators_that_are_no_multiple_of_the_gap():
    found = once(of=monitor(estimator="grpo_batch_std"), rewards=REWARDS, prompt_ids=IDS, advantages=REWARDS - 0.4)
    assert "rlvr/gap/kappa" not in found


def test_threshold_and_correct_split_other_rewards():
    by_threshold = once(of=monitor(threshold=0.3), rewards=REWARDS / 2, prompt_ids=IDS)
    assert by_threshold == once(correct=REWARDS.bool(), prompt_ids=IDS) == once(rewards=REWARDS, prompt_ids=IDS)


def test_length_bias_index_with_ids_and_recovered_from_advantages():
    lengths = torch.tensor([3, 3, 3, 3, 5, 5, 5, 5, 2, 6, 7, 8, 1, 3, 4, 8])
    mask = torch.arange(8) < lengths[:, None]
    correct, incorrect = (2 + 2) / 2, (7 + 6) / 2  # means over the two mixed prompts
    found = once(rewards=REWARDS, prompt_ids=IDS, mask=mask)
    assert found["rlvr/length/bias_index"] == pytest.approx((incorrect - correct) / (incorrect + correct), rel=EXACT)
    assert found["rlvr/length/mean"] == lengths.double().mean()
    advantages = rf.advantages(rf.Rollouts.from_padded(torch.ones_like(mask, dtype=torch.int64), mask, REWARDS,
                                                       group_size=4))
    recovered = once(of=monitor(group_size=4), advantages=advantages, mask=mask)
    assert recovered["rlvr/length/bias_index"] == pytest.approx(found["rlvr/length/bias_index"], rel=EXACT)


# -- tiers 1 and 2 ----------------------------------------------------------------------------------------------------


def class_gap(step: Step, values: torch.Tensor) -> list[float]:
    """Per mixed prompt mean of ``values`` [R] over correct less over incorrect responses, those without tokens out."""
    has_tokens, gaps = step.mask.any(1), []
    for name in dict.fromkeys(step.prompt_ids):
        own = torch.tensor([other == name for other in step.prompt_ids])
        if 0 < step.correct[own].sum() < own.sum():
            right, wrong = (values[own & side & has_tokens] for side in (step.correct, ~step.correct))
            gaps.append(float(right.mean() - wrong.mean()))
    return gaps


@pytest.fixture(scope="module")
def full_step() -> Step:
    """Every response has tokens."""
    step = Step.sample(3, prompts=8)
    step.mask[:, 0] = True
    return step


def test_log_probs(full_step):
    step = full_step
    found = once(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp,
                 old_logp=step.old_logp)
    lengths = step.mask.sum(1)
    sums = (step.logp * step.mask).sum(1)
    assert found["rlvr/logp/token"] == pytest.approx(float(step.logp[step.mask].mean()), rel=EXACT)
    gaps = class_gap(step, sums / lengths)
    assert found["rlvr/logp/gap"] == pytest.approx(sum(gaps) / len(gaps), rel=EXACT)
    change = (step.logp - step.old_logp)[step.mask]
    assert found["rlvr/ratio/kl"] == pytest.approx(float((change.exp() - 1 - change).mean()), rel=1e-9)
    ratio = ((step.logp - step.old_logp) * step.mask).sum(1).exp()
    assert found["rlvr/ratio/mean"] == pytest.approx(float(ratio.mean()), rel=EXACT)
    ess = ratio.sum() ** 2 / ratio.square().sum() / len(ratio)
    assert found["rlvr/ratio/ess"] == pytest.approx(float(ess), rel=EXACT)


@pytest.mark.parametrize("length_norm", [True, False])
def test_energies_are_those_of_the_score_in_logits(full_step, length_norm):
    """‖e_y − p‖² from the distributions themselves, not from 1 − 2p + Σp²."""
    step = full_step
    found = once(of=monitor(length_norm=length_norm), correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask,
                 logp=step.logp, sum_p_sq=step.sum_p_sq, advantages=step.advantages)
    p = (step.hidden.double() @ step.weight.double().T).softmax(-1)
    score_sq = (torch.nn.functional.one_hot(step.ids, p.shape[-1]) - p).square().sum(-1) * step.mask
    assert found["rlvr/token/score_sq"] == pytest.approx(float(score_sq[step.mask].mean()), rel=FLOAT32)
    assert found["rlvr/token/collision"] == pytest.approx(float(p.square().sum(-1)[step.mask].mean()), rel=FLOAT32)
    energy = score_sq.sum(1) / (step.mask.sum(1) ** 2 if length_norm else 1)
    for name, side in (("pos", step.correct), ("neg", ~step.correct)):
        assert found[f"rlvr/token/energy_{name}"] == pytest.approx(float(energy[side].mean()), rel=FLOAT32)
    power = step.advantages.double() ** 2 * energy
    share = power[step.advantages < 0].sum() / power.sum()
    assert found["rlvr/token/power_neg_share"] == pytest.approx(float(share), rel=FLOAT32)


def test_sharpening_is_the_slope_of_the_log_odds_in_the_inverse_temperature():
    """Closed form: all tokens of a one-token response enumerated, weighted as the policy does by repeating them."""
    probabilities = torch.tensor([4, 2, 1, 1], dtype=torch.float64) / 8
    correct = torch.tensor([False, True, False, True])
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    log_p = (beta * probabilities.log()).log_softmax(0)
    (log_p[correct].logsumexp(0) - log_p[~correct].logsumexp(0)).backward()
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    entropy = -(probabilities * probabilities.log()).sum()
    found = once(correct=correct[tokens], prompt_ids=[0] * 8, mask=torch.ones(8, 1), logp=log_p.detach()[tokens, None],
                 entropy=entropy.expand(8, 1))
    assert found["rlvr/sharpening/alignment"] == pytest.approx(beta.grad.item(), rel=EXACT)
    assert found["rlvr/sharpening/control_z"] == pytest.approx(0.0, abs=1e-7)  # E[s] = 0 on policy
    off_policy = once(correct=correct[tokens], prompt_ids=[0] * 8, mask=torch.ones(8, 1),
                      logp=log_p.detach()[tokens, None] - 1, entropy=entropy.expand(8, 1))
    assert off_policy["rlvr/sharpening/control_z"] < -3


def test_sharpening_error_is_the_spread_over_prompts(full_step):
    step = full_step
    found = once(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp,
                 entropy=step.entropy)
    gaps = torch.tensor(class_gap(step, ((step.logp + step.entropy) * step.mask).sum(1)), dtype=torch.float64)
    assert found["rlvr/sharpening/alignment"] == pytest.approx(float(gaps.mean()), rel=1e-9)
    assert found["rlvr/sharpening/stderr"] == pytest.approx(float(gaps.std() / len(gaps) ** 0.5), rel=1e-9)


def test_token_stats_and_rollouts_say_the_same_as_tensors_and_mask(full_step):
    step = full_step
    rollouts = step.rollouts
    stats = rf.token_stats(rollouts.pack(step.hidden), step.weight, rollouts.tokens)
    packed = once(rollouts=rollouts, stats=stats)
    padded = once(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp,
                  sum_p_sq=step.sum_p_sq, entropy=step.entropy)
    assert packed == pytest.approx(padded, rel=FLOAT32, abs=FLOAT32)
