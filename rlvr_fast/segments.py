"""Sums over segments that are bitwise repeatable on every device (no float atomics)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Segments:
    """Which segment each row belongs to, sorted once for any number of sums.

    Attributes:
        order: [R] int64, the rows by segment, in their own order within each.
        counts: [n_segments] int64 rows of each segment.
    """

    order: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, segment: torch.Tensor, n_segments: int) -> Segments:
        """From the segment of each row: [R] int64 in [0, n_segments)."""
        counts = torch.zeros(n_segments, dtype=torch.int64, device=segment.device)
        counts.index_add_(0, segment, torch.ones_like(segment))  # integers: any order gives the same sum
        return cls(torch.argsort(segment, stable=True), counts)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Σ of the rows of ``values`` [R, ...] in each segment: [n_segments, ...]."""
        if self.order.numel() == 0:
            return values.new_zeros(len(self.counts), *values.shape[1:])
        return torch.segment_reduce(values[self.order], "sum", lengths=self.counts, axis=0, initial=0, unsafe=True)


def segment_sum(values: torch.Tensor, segment: torch.Tensor, n_segments: int) -> torch.Tensor:
    """One sum; ``Segments`` serves several over the same rows."""
    return Segments.of(segment, n_segments).sum(values)
