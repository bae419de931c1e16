"""A vocabulary cut into shards within one process: what the ranks of a group would compute and gather."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

EPS = 2.0**-23


def splits_of(vocabulary: int) -> list[tuple[int, ...]]:
    """Borders of shards: one shard, single rows at either end and inside, uneven ones."""
    inner = [(), (1,), (vocabulary - 1,), (vocabulary // 3, vocabulary // 3 + 1), (1, vocabulary // 2, vocabulary - 1)]
    return sorted({(0, *(b for b in sorted(set(borders)) if 0 < b < vocabulary), vocabulary) for borders in inner})


def local_ids(tokens: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return torch.where((tokens >= start) & (tokens < stop), tokens - start, -1)


def shard_passes(head_pass, hidden, weight, tokens, bias, bounds: Sequence[int], **options) -> torch.Tensor:
    """[W, 6, N]: what the ranks would gather, shard w being rows bounds[w]:bounds[w+1]."""
    return torch.stack([
        torch.stack(head_pass(hidden, weight[a:b], local_ids(tokens, a, b), None if bias is None else bias[a:b],
                              **options))
        for a, b in itertools.pairwise(bounds)])


def merge_error(lse: torch.Tensor) -> float:
    """Relative error of a shard's probability, whose lse is rounded to float32. It adds to that of fp32 logits."""
    return EPS / 2 * lse.abs().max().item() if lse.numel() else 0.0
