"""One GRPO run under ``rf.StepGuard``, which measures and acts on its own; only what came of it is written down."""

from __future__ import annotations

import copy

import torch

import rlvr_fast as rf
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.sampling import exact_success, sample
from rlvr_fast.demo.task import draw
from step_sizes.chained_sums import ChainedSums
from step_sizes.log import RunLog, StepLog
from step_sizes.settings import RunSettings
from step_sizes.shared_prompts import completion_logp
from step_sizes.training import ADAM_BETAS, DEAD, norm

METRICS = ("scale", "break_even_rate", "backtracks", "undone")


def train_guarded(warm: Policy, problems: torch.Tensor, held_out: torch.Tensor, settings: RunSettings) -> RunLog:
    """The loop of ``training.train`` with a guard around its optimizer; ``warm`` is left as it is."""
    task, policy = ChainedSums(settings.n_totals), copy.deepcopy(warm)
    # share=None: measured at every step, however long that takes, so that runs can be repeated
    guard = rf.StepGuard(torch.optim.Adam(policy.parameters(), betas=ADAM_BETAS), settings.guard, share=None)
    recorder = rf.StepRecorder(policy.parameters())
    generator = torch.Generator().manual_seed(settings.seed)
    success, steps = exact_success(policy, held_out, task), []
    for k in range(settings.n_steps):
        batch = sample(policy, draw(problems, settings.n_prompts, generator), settings.group_size, generator, task)
        rollouts, logp = batch.rollouts, completion_logp(policy, batch)
        guard.zero_grad()
        (-(rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo") * logp).sum()).backward()
        guard.observe(lambda batch=batch: completion_logp(policy, batch), rollouts, logp=logp.detach())

        if settings.guard == "backtrack":
            probe = sample(policy, draw(held_out, settings.n_probe_prompts, generator), settings.probe_group_size,
                           generator, task)
            guard.check_with(lambda probe=probe: completion_logp(policy, probe), probe.rollouts)
        rate = guard.param_groups[0]["lr"] = settings.rate_at(k)
        with recorder:
            guard.step()

        before, success = success, exact_success(policy, held_out, task)
        metrics = guard.metrics()
        steps.append(StepLog(k, rate, norm(recorder.update), before, success, {}, None, None,
                             {name: metrics[f"rlvr/step/guard/{name}"] for name in METRICS}))
        if success < DEAD:
            break
    return RunLog(settings, steps)
