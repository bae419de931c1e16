"""Random inputs with the shape and the statistics of a training step's, for measuring speed."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an int if it is a whole number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {check.describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


@dataclass(frozen=True, eq=False, repr=False)
class SyntheticBatch:
    """Hidden states [N, D], an lm_head [V, D] and the rollouts they belong to."""

    hidden: torch.Tensor
    weight: torch.Tensor
    rollouts: Rollouts

    @classmethod
    def draw(cls, *, vocabulary_size: int, hidden_size: int, n_tokens: int, n_responses: int, group_size: int,
             dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0,
             weight: torch.Tensor | None = None) -> SyntheticBatch:
        """A batch with sampled tokens as a trained policy has them: probabilities from 0.1 to 0.998.

        Responses are between half and three halves of their mean length, and every prompt of two responses or more has
        some of either class. The same seed gives the same batch on the same kind of device.

        Args:
            n_responses: a multiple of ``group_size``, the responses of one prompt.
            weight: [V, D] of ``dtype`` on ``device`` instead of a random one.

        Raises:
            ValueError, TypeError: a size that is not a whole number of 1 or more, or responses that do not divide.
        """
        sizes = {"vocabulary_size": vocabulary_size, "hidden_size": hidden_size, "n_tokens": n_tokens,
                 "n_responses": n_responses, "group_size": group_size}
        for name, size in sizes.items():
            whole(name, size)
        if n_responses % group_size:
            raise ValueError(f"n_responses must be a multiple of group_size = {group_size}, got {n_responses}")
        generator = torch.Generator(device).manual_seed(seed)

        def uniform(*size: int) -> torch.Tensor:
            return torch.rand(size, generator=generator, device=device)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        if weight is None:
            weight = (normal(vocabulary_size, hidden_size) / math.sqrt(hidden_size)).to(dtype)
        tokens = (uniform(n_tokens) * vocabulary_size).long().clamp_max(vocabulary_size - 1)
        margin = math.log(vocabulary_size) - 2 + 8 * uniform(n_tokens)
        rows = weight[tokens].float()
        rows *= (margin / rows.square().sum(1).clamp_min(1e-6))[:, None]
        hidden = rows.add_(normal(n_tokens, hidden_size)).to(dtype)

        ends = (0.5 + uniform(n_responses)).cumsum(0)
        bounds = (ends * (n_tokens / ends[-1])).round().long().clamp_max(n_tokens)
        bounds[-1] = n_tokens
        cu_seqlens = torch.cat([bounds.new_zeros(1), bounds])
        response = torch.arange(n_responses, device=device)
        prompt, place = response // group_size, response % group_size
        rewards = (place < 1 + prompt % max(group_size - 1, 1)).float()
        return cls(hidden, weight, Rollouts.from_packed(tokens, cu_seqlens, rewards, group_size=group_size))

    def __repr__(self) -> str:
        return f"SyntheticBatch(hidden={list(self.hidden.shape)}, weight={list(self.weight.shape)}, {self.rollouts})"
