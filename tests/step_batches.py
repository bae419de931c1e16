"""Batches and comparisons shared by the tests of measure_step."""

from __future__ import annotations

import math

import torch

from rlvr_fast import Rollouts
from rlvr_fast.step.measure import measure_step

NAN = math.nan
OFFSET = -100.0  # any log-prob to start from: only differences count


def one_token_rollouts(correct, prompt_ids):
    """Responses of one token, whose log-ratio is then the response's."""
    n = len(correct)
    return Rollouts.from_packed(torch.ones(n, dtype=torch.int64), torch.arange(n + 1), correct.float(), prompt_ids)


def measure_log_ratios(forward, rollouts, backward=None, **options):
    """measure_step from given per-response log-ratios, one token each."""
    start = torch.full_like(forward, OFFSET)
    return measure_step(start, start + forward, rollouts, logp_reverse=None if backward is None else start + backward,
                        **options)


def ragged_batch(seed):
    """Interleaved prompts of 1 to 9 responses of 0 to 12 tokens; some prompts with one class, some single responses."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 1, 2, 2, 3, 4, 5, 6, 8, 9]
    prompt_ids = torch.tensor([p for p, size in enumerate(sizes) for _ in range(size)])
    prompt_ids = prompt_ids[torch.randperm(len(prompt_ids), generator=generator)]
    correct = torch.rand(len(prompt_ids), generator=generator) < 0.5
    correct[prompt_ids == 7] = True
    correct[prompt_ids == 5] = False
    lengths = torch.randint(0, 13, (len(prompt_ids),), generator=generator)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n = int(cu_seqlens[-1])
    rollouts = Rollouts.from_packed(torch.ones(n, dtype=torch.int64), cu_seqlens, correct.float(), prompt_ids)
    before = -3 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    noise = 0.3 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    return rollouts, before, before + noise[0].clamp(max=0.9), before + noise[1].clamp(max=0.9)


def expect(actual, expected, tolerance=1e-11):
    """Float64 sums in another order: agreement to 1e-11 leaves room for the cancellation in variances."""
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance,
                               atol=tolerance, equal_nan=True)
