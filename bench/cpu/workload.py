"""What every provider is given: a head, rollouts and log-probs of a shape, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlvr_fast import Rollouts

N_INPUT_SETS = 3
RESPONSES, GROUP_SIZE = 64, 8


@dataclass(frozen=True)
class Shape:
    """N tokens (64 responses of N/64 tokens, 8 responses to a prompt), vocabulary V, hidden size D."""

    n_tokens: int
    vocabulary: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "N,V,D"."""
        try:
            n_tokens, vocabulary, width = (int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"shape must be N,V,D, three integers, got {text!r}") from None
        if n_tokens < RESPONSES or n_tokens % RESPONSES or vocabulary < 2 or width < 1:
            raise ValueError(f"shape must have N a multiple of {RESPONSES} (the responses), V >= 2 and D >= 1, "
                             f"got {text!r}")
        return cls(n_tokens, vocabulary, width)

    @property
    def length(self) -> int:
        """Tokens of one response."""
        return self.n_tokens // RESPONSES

    @property
    def product_flops(self) -> float:
        """One [N, D] x [D, V] product."""
        return 2.0 * self.n_tokens * self.vocabulary * self.width

    @property
    def full_bytes(self) -> int:
        """One float32 [N, V] buffer."""
        return 4 * self.n_tokens * self.vocabulary

    def __str__(self) -> str:
        return f"{self.n_tokens},{self.vocabulary},{self.width}"


@dataclass(frozen=True, eq=False)
class Workload:
    """One input set.

    Attributes:
        hidden: [N, D] float32. weight: [V, D] float32, so that random logits have standard deviation 1.
        rollouts: N tokens; every prompt has responses of both classes.
        coefficients: [N] float32, the factor of each token's log-prob in a loss.
        logp_before, logp_after, logp_reverse: [N] float32, around one update.
    """

    shape: Shape
    hidden: torch.Tensor
    weight: torch.Tensor
    rollouts: Rollouts
    coefficients: torch.Tensor
    logp_before: torch.Tensor
    logp_after: torch.Tensor
    logp_reverse: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        return self.rollouts.tokens

    @classmethod
    def draw(cls, shape: Shape, index: int) -> Workload:
        """Input set ``index``: 0 has random logits, 1 peaked ones (p_y from 0.1 to 0.998), 2 half of each."""
        generator = torch.Generator().manual_seed(index)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        weight = normal(shape.vocabulary, shape.width) / math.sqrt(shape.width)
        hidden = normal(shape.n_tokens, shape.width)
        tokens = torch.randint(shape.vocabulary, (RESPONSES, shape.length), generator=generator)
        share_peaked = (0.0, 1.0, 0.5)[index % N_INPUT_SETS]
        peaked = torch.rand(shape.n_tokens, generator=generator) < share_peaked
        margin = math.log(shape.vocabulary) - 2 + 8 * torch.rand(shape.n_tokens, generator=generator)
        hidden += (margin * peaked)[:, None] * weight[tokens.flatten()]

        response = torch.arange(RESPONSES)
        prompt = response // GROUP_SIZE
        rewards = (response % GROUP_SIZE < 3 + prompt % 3).float()
        rollouts = Rollouts.from_padded(tokens, None, rewards, group_size=GROUP_SIZE)
        before = -2 * torch.rand(shape.n_tokens, generator=generator) - 0.5
        first, second = 0.05 * normal(shape.n_tokens), 0.01 * normal(shape.n_tokens)
        return cls(shape, hidden, weight, rollouts, normal(shape.n_tokens), before, before + first + second,
                   before - first + second)
