"""One-digit sums behind a few-shot prefix: the prompts, and the verifier that makes the reward."""

from __future__ import annotations

import random
from dataclasses import dataclass

PREFIX = "2 + 3 = 5\n14 + 5 = 19\n7 + 4 = 11\n9 + 8 = 17\n"
SHOWN = {(2, 3), (7, 4), (9, 8)}  # one-digit sums that the prefix gives away


@dataclass(frozen=True)
class Sum:
    """The prompt ``a + b =``. All prompts have the same number of tokens: the tokenizer splits digits one by one."""

    a: int
    b: int

    @property
    def question(self) -> str:
        return f"{self.a} + {self.b} ="

    @property
    def answer(self) -> str:
        """The one completion that earns the reward. It has one tokenization, so its probability is the success rate."""
        return f" {self.a + self.b}\n"

    def reward(self, completion: str) -> float:
        """1 for the right number and the end of its line, else 0."""
        return float(completion == self.answer)


def split(n_heldout: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """(training sums, held-out sums), shuffled and disjoint."""
    sums = [Sum(a, b) for a in range(10) for b in range(10) if (a, b) not in SHOWN]
    random.Random(seed).shuffle(sums)
    return sums[n_heldout:], sums[:n_heldout]
