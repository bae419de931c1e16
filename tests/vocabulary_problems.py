"""The inputs of the ranks' scenarios, and the shard of them that a rank holds. Needs no pytest: ranks import it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from policies import HeadProblem, random_rollouts

import rlvr_fast as rf

PROBLEMS = (
    HeadProblem(33, 5, 19, bias="random", temperature=0.7),
    HeadProblem(67, 24, 18, torch.float16, softcap=5.0),
    HeadProblem(131, 40, 140, torch.bfloat16, bias="masked", spread=6.0),
)
GAP_VOCABULARY, GAP_WIDTH = 67, 6
SPLITS = ("even", "one row first", "one row last, ranks reversed")


def shard_of(split: str, size: int) -> rf.VocabularyShard:
    """This rank's shard of a vocabulary of ``size``."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if split == "even":
        return rf.VocabularyShard.even(size)
    borders = [size * i // (ranks - 1) for i in range(ranks)]
    if split == "one row first":
        borders = [0, *(max(b, 1) for b in borders)]
    else:
        borders = [*(min(b, size - 1) for b in borders), size]
        rank = ranks - 1 - rank
    return rf.VocabularyShard(borders[rank], borders[rank + 1] - borders[rank], size)


def rows(shard: rf.VocabularyShard, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if x is None else x[shard.first:shard.stop].detach().clone() for x in tensors)


def rollouts_of() -> tuple[torch.Tensor, torch.Tensor, dict, rf.Rollouts]:
    """hidden, weight, options and rollouts of the gap scenarios."""
    generator = torch.Generator().manual_seed(3)
    rollouts = random_rollouts(40, 6, GAP_VOCABULARY, generator)
    hidden = torch.randn(rollouts.n_tokens, GAP_WIDTH, generator=generator)
    weight = torch.randn(GAP_VOCABULARY, GAP_WIDTH, generator=generator)
    options = {"bias": torch.randn(GAP_VOCABULARY, generator=generator), "temperature": 0.8, "softcap": 4.0}
    return hidden, weight, options, rollouts


def direction_of(level: str) -> torch.Tensor:
    return torch.linspace(-1, 1, GAP_WIDTH if level == "hidden" else GAP_VOCABULARY)


def exact_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight and tokens whose logits are multiples of 1/8 below 4: float32 holds them exactly."""
    return torch.arange(9.0)[:, None] / 8, (torch.arange(33.0)[:, None] - 12) / 8, torch.arange(9) * 4
