"""GRPO on arithmetic with the gradient gap and the step threshold measured inside the loop.

A small transformer learns two-digit addition: a short supervised warm-up from scratch, then GRPO with verified 0/1
rewards, twice from the same warm-started model, at a safe learning rate and at one that is too large. Every update is
judged before it is applied, on rollouts that had no part in it, and then applied whatever the verdict, so that the
forecast can be held against what happened. ``train`` is the loop to copy from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch

import rlvr_fast as rf
from rlvr_fast.demo import task
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.records import Forecast, Run, StepRecord
from rlvr_fast.demo.report import Listener
from rlvr_fast.demo.sampling import completion_hidden, completion_logp, exact_success, sample
from rlvr_fast.demo.warmup import warm_up


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the two runs."""

    safe_rate: float = 5e-4
    large_rate: float = 5e-3
    safe_steps: int = 40
    large_steps: int = 24
    ramp_steps: int = 16  # the learning rate grows to its full size over these
    warm_up_success: float = 0.3
    n_held_out: int = 768  # problems for the forecasts and for the exact success rate, never trained on
    probe_group_size: int = 4
    n_prompts: int = 128
    group_size: int = 8
    multiples: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)


QUICK = Settings(safe_steps=3, large_steps=3, warm_up_success=0.1, n_held_out=128, n_prompts=32)


def train(policy: Policy, problems: torch.Tensor, held_out: torch.Tensor, name: str, learning_rate: float, n_steps: int,
          settings: Settings, seed: int, listener: Listener) -> Run:
    """GRPO for ``n_steps``; every update is announced, applied and held against the exact success rate."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    success = start = exact_success(policy, held_out)
    records = []
    for step in range(n_steps):
        rate = optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / settings.ramp_steps)

        # GRPO: sample, verify, weigh, back-propagate.
        batch = sample(policy, task.draw(problems, settings.n_prompts, generator), settings.group_size, generator)
        rollouts = batch.rollouts
        weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo")
        hidden = completion_hidden(policy, batch)
        logp, _ = rf.linear_logprob(hidden, policy.lm_head.weight, rollouts.tokens)
        optimizer.zero_grad()
        (-(weights * logp).sum()).backward()
        gap = rf.gradient_gap(hidden, policy.lm_head.weight, rollouts)

        # The step that Adam wants to take, judged on fresh rollouts of problems that are not trained on.
        update = rf.propose(optimizer, parameters)
        probe = sample(policy, held_out, settings.probe_group_size, generator)
        scan = rf.scan_step(partial(completion_logp, policy, probe), parameters, update, probe.rollouts,
                            multiples=settings.multiples, in_sample=False)
        forecast = Forecast.of(rate, gap, scan)
        listener.announce(step, forecast, success)

        optimizer.step()
        before, success = success, exact_success(policy, held_out)
        records.append(StepRecord(name, step, forecast, before, success))
        listener.outcome(records[-1])
    return Run(name, learning_rate, start, records)


def safe_and_large(settings: Settings, seed: int, listener: Listener) -> tuple[Run, Run]:
    """Warm up once, then train twice from there: at the safe learning rate and at the large one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    problems, held_out = task.split_problems(settings.n_held_out, generator)
    warm = Policy(task.VOCABULARY_SIZE, task.PROMPT_LENGTH + task.MAX_ANSWER_LENGTH)
    success = warm_up(warm, problems, held_out, settings.warm_up_success, generator, listener.warm_up)
    listener.warmed_up(success)

    def run(name: str, rate: float, n_steps: int) -> Run:
        listener.start(name, rate)
        return train(copy.deepcopy(warm), problems, held_out, name, rate, n_steps, settings, seed + 1, listener)

    return (run("safe", settings.safe_rate, settings.safe_steps),
            run("large", settings.large_rate, settings.large_steps))
