"""How well the success rates of prompts and of bins are known: intervals, and rollouts that count as independent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wilson(n_correct: Tensor, n: Tensor, z: float) -> tuple[Tensor, Tensor]:
    """Wilson interval of a success rate; (0, 1) without rollouts. ``n`` need not be whole."""
    spread = torch.sqrt(n_correct * (1 - n_correct / n.clamp(min=1e-300)) + z * z / 4) * z
    low, high = ((n_correct + z * z / 2 + sign * spread) / (n + z * z) for sign in (-1, 1))
    # the ends are exact, whatever rounding says
    return torch.where(n_correct == 0, 0.0, low), torch.where(n_correct == n, 1.0, high)


def binned(bin_of: Tensor, n_bins: int) -> Callable[[Tensor], Tensor]:
    """Sums of [M] values over the members of each bin: [B]."""
    return lambda values: values.new_zeros(n_bins).index_add(0, bin_of, values)


def effective_rollouts(n_correct: Tensor, n: Tensor, bin_of: Tensor, n_bins: int) -> Tensor:
    """[B] rollouts over the design effect: variance of the pooled rate between prompts over the binomial one, >= 1.

    [Kish 1965.] A bin of one prompt speaks of that prompt: design effect 1.

    Args:
        n_correct, n, bin_of: [P] per prompt.
    """
    total = binned(bin_of, n_bins)
    total_n, clusters = total(n), total(torch.ones_like(n))
    rate = total(n_correct) / total_n
    between = total((n_correct - rate[bin_of] * n).square()) * clusters / (clusters - 1).clamp(min=1)
    effect = between / (rate * (1 - rate) * total_n)
    return total_n / torch.where(clusters > 1, effect, 1.0).nan_to_num(1.0).clamp(min=1.0)
