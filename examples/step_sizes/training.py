"""One GRPO run, every update measured before it is applied and again where it ended."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

import rlvr_fast as rf
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.sampling import Samples, exact_success, sample
from rlvr_fast.demo.task import draw
from step_sizes.chained_sums import ChainedSums
from step_sizes.log import Evidence, RunLog, StepLog
from step_sizes.probe import Update, log_ratios, true_success
from step_sizes.settings import RunSettings
from step_sizes.shared_prompts import completion_logp

ADAM_BETAS = (0.9, 0.95)
EPSILON = 1 / 32
"""Slopes are central differences over this share of the update."""
DEAD = 1e-3
"""A run ends early below this success rate: a batch has not one right answer to learn from."""


def train(warm: Policy, problems: torch.Tensor, held_out: torch.Tensor, settings: RunSettings) -> RunLog:
    """``warm`` is left as it is."""
    task, policy = ChainedSums(settings.n_totals), copy.deepcopy(warm)
    parameters = list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, betas=ADAM_BETAS)
    generator = torch.Generator().manual_seed(settings.seed)
    success, update, steps = exact_success(policy, held_out, task), None, []

    def rollouts_of(pool: torch.Tensor, n_prompts: int, group_size: int) -> Samples:
        return sample(policy, draw(pool, n_prompts, generator), group_size, generator, task)

    def evidence(samples: Samples, logp: torch.Tensor, multiples: Sequence[float]) -> Evidence:
        return Evidence(multiples, log_ratios(policy, update, multiples, samples, logp).float(),
                        samples.rollouts.correct, len(samples.sequences) // samples.rollouts.n_prompts)

    for k in range(settings.n_steps + 1):
        # GRPO: sample, verify, weigh, back-propagate.
        batch = rollouts_of(problems, settings.n_prompts, settings.group_size)
        rollouts = batch.rollouts
        logp = completion_logp(policy, batch)
        optimizer.zero_grad()
        (-(rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo") * logp).sum()).backward()

        # Where the last update ended, seen by rollouts that it had no part in.
        if steps:
            steps[-1] = replace(steps[-1], end=evidence(batch, logp.detach(), (-1.0, -EPSILON, EPSILON, 1.0)))
        if k == settings.n_steps or success < DEAD:
            break

        # The next update, before it is applied, on rollouts of problems that are not trained on.
        rate = optimizer.param_groups[0]["lr"] = settings.rate_at(k)
        update = rf.propose(optimizer, parameters)
        probe = rollouts_of(held_out, settings.n_probe_prompts, settings.probe_group_size)
        with torch.no_grad():
            logp = completion_logp(policy, probe)
        start = evidence(probe, logp, (-EPSILON, EPSILON, *settings.scan_multiples))
        known = settings.true_multiples if k % settings.truth_every == 0 else ()
        truth = dict(zip(known, true_success(policy, update, known, held_out, task), strict=True))

        optimizer.step()
        before, success = success, exact_success(policy, held_out, task)
        steps.append(StepLog(k, rate, norm(update), before, success, truth, start, None, {}))
    return RunLog(settings, steps)


def norm(update: Update) -> float:
    return torch.stack([delta.square().sum() for delta in update.values()]).sum().sqrt().item()
