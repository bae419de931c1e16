"""Sums over segments that are bitwise repeatable on every device (no float atomics)."""

from __future__ import annotations

import torch


def segment_sum(values: torch.Tensor, segment: torch.Tensor, n_segments: int) -> torch.Tensor:
    """Σ of the rows of ``values`` [R, ...] with equal ``segment`` [R] in [0, n_segments): [n_segments, ...]."""
    order = torch.argsort(segment, stable=True)
    counts = torch.zeros(n_segments, dtype=torch.int64, device=segment.device)
    counts.index_add_(0, segment, torch.ones_like(segment))  # integers: any order gives the same sum
    if segment.numel() == 0:
        return values.new_zeros(n_segments, *values.shape[1:])
    return torch.segment_reduce(values[order], "sum", lengths=counts, axis=0, initial=0, unsafe=True)
