"""Where runs start: the problems, and a policy warmed up on them by supervision, kept on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.task import VOCABULARY_SIZE
from rlvr_fast.demo.warmup import warm_up
from step_sizes.chained_sums import ChainedSums
from step_sizes.settings import RunSettings


def prepare(settings: RunSettings, directory: Path) -> tuple[Policy, torch.Tensor, torch.Tensor]:
    """(warmed-up policy, training problems, held-out problems), the same for all runs of one length and seed."""
    task, generator = ChainedSums(settings.n_totals), torch.Generator().manual_seed(settings.seed)
    problems, held_out = task.split_problems(settings.n_held_out, generator)
    torch.manual_seed(settings.seed)
    policy = Policy(VOCABULARY_SIZE, task.sequence_length, width=settings.width, n_heads=2)
    path = directory / f"{settings.warm_up_name}.pt"
    if path.exists():
        policy.load_state_dict(torch.load(path))
    else:
        warm_up(policy, problems, held_out, settings.warm_up_success, generator, lambda step, success: None, task)
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(policy.state_dict(), partial)
        partial.rename(path)
    return policy, problems, held_out
