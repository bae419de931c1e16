"""What rollouts say about an update: their log-ratios along it, from which everything else follows; and the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.sampling import Samples, exact_success
from rlvr_fast.demo.task import Task
from rlvr_fast.step.line import StepLine
from step_sizes.shared_prompts import completion_logp

Update = dict[torch.Tensor, torch.Tensor]


def log_ratios(policy: Policy, update: Update, multiples: Sequence[float], samples: Samples, logp: torch.Tensor
               ) -> torch.Tensor:
    """[M, R] Σ_t log π_{θ + mΔ} − log π_θ of every response; ``logp``: log-probs of its tokens at θ, [N]."""
    lengths = samples.rollouts.lengths
    with StepLine(update, update) as line:
        moved = [line.at(multiple, lambda: completion_logp(policy, samples)) for multiple in multiples]
    return torch.stack([torch.segment_reduce(x.double() - logp.double(), "sum", lengths=lengths) for x in moved])


def true_success(policy: Policy, update: Update, multiples: Sequence[float], problems: torch.Tensor, task: Task
                 ) -> list[float]:
    """Exact success rate at every multiple of ``update``."""
    with StepLine(update, update) as line:
        return [line.at(multiple, lambda: exact_success(policy, problems, task)) for multiple in multiples]
