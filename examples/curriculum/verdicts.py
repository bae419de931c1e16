"""How often the verdicts on prompts are right, on synthetic prompts whose truth is known."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

import rlvr_fast as rf
from rlvr_fast.gap import gap_from_gradients
from rlvr_fast.spectrum import difficulty_spectrum
from rlvr_fast.spectrum.evidence import EDGE, VERDICTS

WIDTH, GAP = 8, 2.5  # coordinates of a gradient, each with noise of variance 1; the learnable prompts' gap


class Case(NamedTuple):
    """Rollouts per prompt and step, steps, success rate of all prompts."""

    group_size: int
    steps: int
    success: float


CASES = (Case(8, 1, 0.15), Case(8, 1, 0.5), Case(16, 1, 0.15), Case(16, 1, 0.5), Case(64, 1, 0.15), Case(8, 8, 0.15))


def measure(case: Case, *, n_batches: int = 25, n_prompts: int = 20, seed: int = 0
            ) -> tuple[tuple[Counter, Counter], tuple[Counter, Counter]]:
    """Verdicts on prompts, and on the bins of them: (without a gap, with one), as many of each in every batch."""
    generator = torch.Generator().manual_seed(seed)
    prompts, bins = (Counter(), Counter()), (Counter(), Counter())
    for batch in range(n_batches):
        gaps = [_gap(case, n_prompts, generator) for _ in range(case.steps)]
        level = {prompt: int(prompt >= n_prompts) for prompt in range(2 * n_prompts)}
        spectrum = difficulty_spectrum(gaps, level, n_permutations=999, seed=batch)
        for which in range(2):
            prompts[which].update(spectrum.prompts.verdict[which * n_prompts:][:n_prompts])
            bins[which][spectrum.bins.verdict[which]] += 1
    return prompts, bins


def _gap(case: Case, n_prompts: int, generator: torch.Generator) -> rf.Gap:
    """The first half of the prompts has no gap; correctness is a coin in both."""
    correct = torch.rand(2 * n_prompts, case.group_size, generator=generator) < case.success
    vectors = torch.randn(2 * n_prompts, case.group_size, WIDTH, generator=generator)
    vectors[n_prompts:, :, 0] += GAP * correct[n_prompts:]
    index = torch.arange(2 * n_prompts).repeat_interleave(case.group_size)
    responses = rf.Responses(correct.flatten(), index, tuple(range(2 * n_prompts)))
    return gap_from_gradients(rf.ResponseGradients(responses, vectors.flatten(0, 1)), level="hidden", length_norm=True)


def table() -> list[str]:
    """Markdown: for every case the verdicts on prompts in percent, without a gap / with one, and on bins of 20."""
    lines = ["| rollouts | J | " + " | ".join(VERDICTS) + " | bin of 20: edge |", "|---" * (3 + len(VERDICTS)) + "|"]
    for case in CASES:
        prompts, bins = measure(case)
        shares = [_shares(prompts, word) for word in VERDICTS]
        rollouts = f"{case.steps} × {case.group_size}" if case.steps > 1 else str(case.group_size)
        lines.append(f"| {rollouts} | {case.success:g} | {' | '.join(shares)} | {_shares(bins, EDGE)} |")
    return lines


def _shares(counts: tuple[Counter, Counter], word: str) -> str:
    return " / ".join(f"{100 * one[word] / one.total():.1f}" for one in counts)
