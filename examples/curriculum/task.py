"""Addition of two numbers of 1 to 4 digits, least significant digit first: each level contains the one before it.

Operands and answers are written from the ones upwards and padded to a fixed width with the end token, so that "add the
next pair and carry" is the same step at every level: what is learned at one carries over to the next.
"""

from __future__ import annotations

import torch

PLUS, EQUALS, END = 10, 11, 12
VOCABULARY_SIZE = 13
LEVELS = (1, 2, 3, 4)  # digits of both operands
WIDTH = LEVELS[-1]
PROMPT_LENGTH = 2 * WIDTH + 2
MAX_ANSWER_LENGTH = WIDTH + 2  # one digit more than the operands, and the end token
N_HELD_OUT, N_TRAINING = 100, 1900
N_HELD_OUT_SHORT = 30  # of the 100 problems there are at level 1


def problems_of(level: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct problems [n, 2] with operands of ``level`` digits: (for training, held out)."""
    low, high = (0 if level == 1 else 10 ** (level - 1)), 10**level
    wanted, held_out = (100, N_HELD_OUT_SHORT) if level == 1 else (N_HELD_OUT + N_TRAINING, N_HELD_OUT)
    count = (high - low) ** 2
    numbers = torch.arange(count)
    if count > 4 * wanted:  # far from all of them: without a list of them
        numbers = torch.randint(count, (2 * wanted,), generator=generator).unique()
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:wanted]]
    problems = torch.stack([low + numbers // (high - low), low + numbers % (high - low)], 1)
    return problems[held_out:], problems[:held_out]


def digits(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """[B] -> [B, width]: digits from the ones upwards, END beyond the last one."""
    place = 10 ** torch.arange(width)
    beyond = (numbers[:, None] < place) & (torch.arange(width) > 0)
    return torch.where(beyond, END, numbers[:, None] // place % 10)


def prompt_tokens(problems: torch.Tensor) -> torch.Tensor:
    """[B, 2] -> [B, PROMPT_LENGTH]."""
    a, b = problems.unbind(1)
    plus, equals = (torch.full((len(problems), 1), token) for token in (PLUS, EQUALS))
    return torch.cat([digits(a, WIDTH), plus, digits(b, WIDTH), equals], 1)


def answer_tokens(problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 2] -> the sum and the end token, [B, MAX_ANSWER_LENGTH], and the mask of what counts."""
    tokens = digits(problems.sum(1), MAX_ANSWER_LENGTH)
    return tokens, torch.arange(MAX_ANSWER_LENGTH) <= (tokens != END).sum(1, keepdim=True)


def verify(completions: torch.Tensor, problems: torch.Tensor) -> torch.Tensor:
    """[B, MAX_ANSWER_LENGTH] completions, END from their end on -> [B] reward: 1 where the answer is right, else 0."""
    return (completions == answer_tokens(problems)[0]).all(1).float()
