"""Supervised warm-up from scratch, stopped as soon as the policy is right often enough for rewards to vary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rlvr_fast.demo import task as addition
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.sampling import exact_success
from rlvr_fast.demo.task import Task, draw

LEARNING_RATE, RAMP_STEPS, BATCH_SIZE, CHECK_EVERY, MAX_STEPS = 3e-3, 50, 256, 5, 1000


def warm_up(policy: Policy, problems: torch.Tensor, held_out: torch.Tensor, target: float, generator: torch.Generator,
            on_check: Callable[[int, float], None], task: Task = addition) -> float:
    """Train until the success rate on ``held_out`` reaches ``target``, and return it; RuntimeError if it never does."""
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95))
    for step in range(1, MAX_STEPS + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / RAMP_STEPS)
        supervised_step(policy, optimizer, draw(problems, BATCH_SIZE, generator), task)
        if step % CHECK_EVERY == 0:
            success = exact_success(policy, held_out, task)
            on_check(step, success)
            if success >= target:
                return success
    raise RuntimeError(f"warm-up: success rate {success:.3f} after {MAX_STEPS} steps, wanted {target}")


def supervised_step(policy: Policy, optimizer: torch.optim.Optimizer, problems: torch.Tensor, task: Task) -> None:
    """One step towards the right answers of ``problems``."""
    answers, mask = task.answer_tokens(problems)
    hidden = policy(torch.cat([task.prompt_tokens(problems), answers[:, :-1]], 1))[:, task.PROMPT_LENGTH - 1:]
    loss = F.cross_entropy(policy.lm_head(hidden[mask]), answers[mask])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
