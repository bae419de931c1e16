"""Addition of two numbers below 100, with a verifiable answer: "47+85=" must be answered "132" and the end token."""

from __future__ import annotations

from typing import Protocol

import torch


class Task(Protocol):
    """What sampling and warm-up need of a task with one right answer per problem. This module is one."""

    PROMPT_LENGTH: int
    MAX_ANSWER_LENGTH: int
    END: int

    def prompt_tokens(self, problems: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B, PROMPT_LENGTH]."""

    def answer_tokens(self, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K] -> the right answers [B, MAX_ANSWER_LENGTH], END from their end on, and the mask of what counts."""

    def verify(self, completions: torch.Tensor, problems: torch.Tensor) -> torch.Tensor:
        """[B, MAX_ANSWER_LENGTH], [B, K] -> [B] 0/1 rewards."""


PLUS, EQUALS, END = 10, 11, 12
VOCABULARY_SIZE = 13
PROMPT_LENGTH = 6
MAX_ANSWER_LENGTH = 4  # three digits and the end token
OPERAND_LIMIT = 100


def split_problems(n_held_out: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """All [10000, 2] pairs of operands in random order, as (training problems, held-out problems)."""
    operands = torch.arange(OPERAND_LIMIT)
    problems = torch.cartesian_prod(operands, operands)
    problems = problems[torch.randperm(len(problems), generator=generator)]
    return problems[n_held_out:], problems[:n_held_out]


def draw(problems: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """[n, 2] distinct problems."""
    return problems[torch.randperm(len(problems), generator=generator)[:n]]


def prompt_tokens(problems: torch.Tensor) -> torch.Tensor:
    """[B, 2] -> [B, PROMPT_LENGTH]."""
    a, b = problems.unbind(1)
    plus, equals = torch.full_like(a, PLUS), torch.full_like(a, EQUALS)
    return torch.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], 1)


def answer_tokens(problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 2] -> the digits of the sum and the end token, [B, MAX_ANSWER_LENGTH], and the mask of what counts."""
    total = problems.sum(1)
    n_digits = 1 + (total >= 10).long() + (total >= 100).long()
    position = torch.arange(MAX_ANSWER_LENGTH)
    power = (n_digits[:, None] - 1 - position).clamp(min=0)
    is_digit = position < n_digits[:, None]
    tokens = torch.where(is_digit, total[:, None] // 10**power % 10, END)
    return tokens, position <= n_digits[:, None]


def verify(completions: torch.Tensor, problems: torch.Tensor) -> torch.Tensor:
    """[B, MAX_ANSWER_LENGTH] completions, END from their end on -> [B] reward: 1 where the answer is right, else 0."""
    return (completions == answer_tokens(problems)[0]).all(1).float()
