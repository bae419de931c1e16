"""Suites that never see the vocabulary: advantages with loss weights, and measure_step. Microseconds, called often."""

from __future__ import annotations

from collections import defaultdict

import torch

import rlvr_fast as rf
from rlvr_fast import reference
from rlvr_fast.bench.head_suites import FLOOR
from rlvr_fast.bench.suite import COMPILE_MISSING, Provider, Suite, compiled
from rlvr_fast.bench.truth import relative_error
from rlvr_fast.bench.workload import GROUP_SIZE, RESPONSES, Workload
from rlvr_fast.step.measure import StepMeasure, measure_step

CALLS = 20

# -- advantages: GRPO, each token's weight in the objective ------------------------------------------------------------


def _rlvr_weights(workload: Workload) -> torch.Tensor:
    return rf.loss_weights(workload.rollouts, rf.advantages(workload.rollouts, "grpo"), "grpo")


def _grouped_view(workload: Workload) -> torch.Tensor:
    """TRL's way: responses of a prompt stand together, so that groups are a view and tokens a padded batch."""
    groups = workload.rollouts.rewards.view(-1, GROUP_SIZE)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    mask = torch.ones(RESPONSES, workload.shape.length)
    return (advantages[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1.0) / RESPONSES).flatten()


def _dict_of_groups(workload: Workload) -> torch.Tensor:
    """verl's way: scores collected per prompt id in a Python dictionary."""
    rewards, ids = workload.rollouts.rewards, workload.rollouts.prompt_index.tolist()
    groups = defaultdict(list)
    for identity, reward in zip(ids, rewards, strict=True):
        groups[identity].append(reward)
    mean, std = {}, {}
    for identity, members in groups.items():
        scores = torch.stack(members)
        mean[identity], std[identity] = scores.mean(), scores.std()
    advantages = torch.stack([(reward - mean[identity]) / (std[identity] + 1e-4)
                              for identity, reward in zip(ids, rewards, strict=True)])
    mask = torch.ones(RESPONSES, workload.shape.length)
    return (advantages[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1.0) / RESPONSES).flatten()


def _weights_error(weights: torch.Tensor, workload: Workload) -> float:
    arguments = workload.rollouts.prompt_index, workload.rollouts.lengths
    advantages = reference.grpo_advantages(workload.rollouts.rewards, *arguments)
    return relative_error(weights, reference.grpo_weights(advantages, *arguments))


ADVANTAGES = Suite(
    "advantages + loss_weights",
    (
        FLOOR,
        Provider("rlvr_fast", _rlvr_weights),
        Provider("torch, grouped view", _grouped_view),
        Provider("torch, dict of groups", _dict_of_groups),
    ),
    _weights_error, "max |Δw| / max |w|", calls=CALLS)


# -- measure_step: log-odds gain, alignment and curvature per prompt ---------------------------------------------------


def _rlvr_step(workload: Workload) -> StepMeasure:
    return measure_step(workload.logp_before, workload.logp_after, workload.rollouts,
                        logp_reverse=workload.logp_reverse, in_sample=False)


def _grouped_step(before: torch.Tensor, after: torch.Tensor, reverse: torch.Tensor,
                  correct: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[P] each, from a [P, G] view with the class as a mask."""
    def per_group(logp):
        return (logp.double() - before.double()).view(-1, GROUP_SIZE, before.numel() // RESPONSES).sum(2)

    forward, backward = per_group(after), per_group(reverse)
    s, h = (forward - backward) / 2, forward + backward

    def statistics(mask):
        n = mask.sum(1).double()
        gain = forward.masked_fill(~mask, -torch.inf).logsumexp(1) - n.log()
        mean_s, mean_h = (s * mask).sum(1) / n, (h * mask).sum(1) / n
        variance = ((s - mean_s[:, None]).square() * mask).sum(1) / (n - 1)
        return gain, mean_s, variance + mean_h

    mask = correct.view(-1, GROUP_SIZE)
    return tuple(a - b for a, b in zip(statistics(mask), statistics(~mask), strict=True))


_compiled_step = compiled(_grouped_step)


def _torch_step(workload: Workload, function=_grouped_step) -> tuple[torch.Tensor, ...]:
    return function(workload.logp_before, workload.logp_after, workload.logp_reverse, workload.rollouts.correct)


def _compiled(workload: Workload) -> tuple[torch.Tensor, ...]:
    return _torch_step(workload, _compiled_step)


def _step_error(result, workload: Workload) -> float:
    if isinstance(result, StepMeasure):
        result = result.log_odds_gain, result.alignment, result.curvature
    cu_seqlens, correct = workload.rollouts.cu_seqlens, workload.rollouts.correct
    forward = reference.log_ratios(workload.logp_before, workload.logp_after, cu_seqlens)
    backward = reference.log_ratios(workload.logp_before, workload.logp_reverse, cu_seqlens)
    s, h = (forward - backward) / 2, forward + backward
    per_prompt = [(reference.log_odds_gain(forward[i], correct[i]), reference.step_alignment(s[i], correct[i]),
                   reference.step_curvature(s[i], h[i], correct[i])) for i in map(list, workload.rollouts.members)]
    truth = map(torch.stack, zip(*per_prompt, strict=True))
    return max(relative_error(value, wanted) for value, wanted in zip(result, truth, strict=True))


MEASURE_STEP = Suite(
    "measure_step",
    (
        FLOOR,
        Provider("rlvr_fast", _rlvr_step),
        Provider("torch eager, grouped view", _torch_step),
        Provider("torch.compile, grouped view", _compiled, COMPILE_MISSING, True),
    ),
    _step_error, "max |Δ| / max, worst of gain, alignment, curvature", calls=CALLS)
