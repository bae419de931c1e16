"""Batches that advantages and loss weights must get right, and the specification's answers for them."""

import torch

from rlvr_fast import Rollouts
from rlvr_fast.advantages import DEFAULT_EPS, ESTIMATORS, WITH_MAX_LENGTH
from rlvr_fast.reference_advantages import REFERENCE_ADVANTAGES, REFERENCE_LOSS_WEIGHTS

MAX_LENGTH = 40


def make_rollouts(rewards, prompt_ids, lengths):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    prompt_ids = torch.as_tensor(prompt_ids).long()
    return Rollouts.from_packed(torch.arange(int(cu_seqlens[-1])), cu_seqlens, rewards, prompt_ids, threshold=0.5)


def ragged(seed, *, n_responses=70, n_prompts=9, longest=35, binary=True):
    """Prompts interleaved in random order, group sizes unequal, lengths from 0 on."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(n_prompts, (n_responses,), generator=generator)
    lengths = torch.randint(longest + 1, (n_responses,), generator=generator)
    rewards = torch.randn(n_responses, generator=generator)
    return make_rollouts((rewards > 0.3).float() if binary else rewards, prompts, lengths)


def contiguous_groups():
    rewards = [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    return make_rollouts(rewards, torch.arange(16) // 4, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])


BATCHES = {
    "ragged binary": ragged(0),
    "ragged real": ragged(1, binary=False),
    "contiguous": contiguous_groups(),
    "no responses": make_rollouts([], [], []),
    "one response": make_rollouts([1.0], [7], [3]),
    "one empty response": make_rollouts([1.0], [7], [0]),
    "one-response groups": make_rollouts([1, 0, 0.25, -3], [3, 1, 2, 0], [1, 2, 0, 4]),
    "equal rewards that binary fractions cannot hold": make_rollouts([0.1] * 7, [0, 0, 0, 1, 1, 1, 1], [3] * 7),
    "equal rewards but for an empty response": make_rollouts([0.7, 0.7, 0.7, 0.1], [0] * 4, [3, 5, 7, 0]),
    "equal rewards but for a far empty response": make_rollouts([0.7, 0.7, 0.7, -1e10], [0] * 4, [1, 1, 5, 0]),
    "equal centred rewards on all tokens": make_rollouts([1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 2, 0, 0]),
    "no short response": make_rollouts([1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1], [25, 26, 28, 31, 34, 30]),
    "all empty": make_rollouts([1, 0, 1, 0], [0, 0, 1, 1], [0] * 4),
    "a prompt without tokens": make_rollouts([1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 2, 3]),
    "one token": make_rollouts([1, 0, 1], [0, 0, 1], [0, 1, 0]),
    "large offset": make_rollouts([1e6, 1e6 + 1, 1e6, 1e6 + 1, 1e6], [0] * 5, [2, 3, 4, 5, 6]),
    "differences of one rounding step": make_rollouts([1, 1 + 2**-23, 1, 1 + 2**-22], [0] * 4, [2, 3, 4, 5]),
    "mixed magnitudes": make_rollouts([1e6, 1e-6, 1.0, -1e3, 0.0, 2e-6], [0, 0, 0, 0, 1, 1], [1, 20, 3, 4, 5, 6]),
    "one against the rest": make_rollouts([1.0] + [0.0] * 63, [0] * 64, [30] + [1] * 63),
    "ties at the top": make_rollouts([2, 2, 1, 0, 3, 3, 3, 5, 4, 4], [0] * 4 + [1] * 3 + [2] * 3, [4] * 10),
    "negative rewards": make_rollouts([-1, -2, -1, 1, -1, 0, 0], [0, 0, 0, 1, 1, 2, 2], [2, 3, 1, 5, 6, 7, 8]),
}


def reference_advantages(rollouts, estimator, **options):
    return REFERENCE_ADVANTAGES[estimator](rollouts.rewards, rollouts.prompt_index, rollouts.lengths, **options)


def reference_weights(rollouts, given, aggregation, **options):
    options = {"max_length": MAX_LENGTH, **options} if aggregation in WITH_MAX_LENGTH else options
    return REFERENCE_LOSS_WEIGHTS[aggregation](given, rollouts.prompt_index, rollouts.lengths, **options)


def option_cases():
    """Every estimator with its defaults, and with every option away from them."""
    cases = [(estimator, {}) for estimator in ESTIMATORS]
    cases += [(estimator, {"eps": 0.0}) for estimator, eps in DEFAULT_EPS.items() if eps is not None]
    cases += [(estimator, {"eps": 0.3}) for estimator, eps in DEFAULT_EPS.items() if eps is not None]
    return [*cases, ("gpg", {"f_norm": 2.5}), ("pass_at_k", {"normalize_by_std": False}), ("vl_norm", {"alpha": 0.75}),
            ("vl_norm", {"alpha": 0.0}), ("vl_norm", {"alpha": 30.0})]


def assert_close(actual, expected, relative=2e-7, name=""):
    """Finite, and within ``relative`` of the largest entry. The default: two float32 roundings."""
    assert actual.dtype == torch.float32
    assert actual.isfinite().all(), name
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * scale,
                               msg=lambda message: f"{name}: {message}")
