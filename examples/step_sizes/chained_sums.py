"""Chained sums: "3852=" must be answered "163", the running totals modulo 10 from the second digit on, and "end".

Every token of the answer is one addition, however long the chain: the response length changes, the difficulty of a
token does not.
"""

from __future__ import annotations

import torch

from rlvr_fast.demo.task import END, EQUALS

N_DRAWN = 20_000


class ChainedSums:
    """Chains of ``n_totals`` additions, answered in ``n_totals + 1`` tokens; an ``rlvr_fast.demo.task.Task``."""

    END = END

    def __init__(self, n_totals: int):
        self.n_totals = n_totals
        self.PROMPT_LENGTH = n_totals + 2
        self.MAX_ANSWER_LENGTH = n_totals + 1

    @property
    def sequence_length(self) -> int:
        return self.PROMPT_LENGTH + self.MAX_ANSWER_LENGTH

    def split_problems(self, n_held_out: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct [N, n_totals + 1] chains of digits in random order, as (training problems, held-out problems)."""
        problems = torch.randint(10, (N_DRAWN, self.n_totals + 1), generator=generator).unique(dim=0)
        problems = problems[torch.randperm(len(problems), generator=generator)]
        return problems[n_held_out:], problems[:n_held_out]

    def prompt_tokens(self, problems: torch.Tensor) -> torch.Tensor:
        """[B, n_totals + 1] -> [B, PROMPT_LENGTH]."""
        return torch.cat([problems, torch.full_like(problems[:, :1], EQUALS)], 1)

    def answer_tokens(self, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, n_totals + 1] -> totals and end token [B, MAX_ANSWER_LENGTH], and the mask of what counts: all."""
        totals = problems.cumsum(1)[:, 1:] % 10
        tokens = torch.cat([totals, torch.full_like(totals[:, :1], END)], 1)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def verify(self, completions: torch.Tensor, problems: torch.Tensor) -> torch.Tensor:
        """[B, MAX_ANSWER_LENGTH] completions, END from their end on -> [B] reward: 1 where every token is right."""
        return (completions == self.answer_tokens(problems)[0]).all(1).float()
