"""Log-probs of grouped rollouts with every prompt computed once, which halves the work where prompts are long."""

from __future__ import annotations

import torch

import rlvr_fast as rf
from rlvr_fast.demo.model import Policy, repeat_cache
from rlvr_fast.demo.sampling import Samples


def completion_logp(policy: Policy, samples: Samples) -> torch.Tensor:
    """[N] log-probs of the sampled tokens, as ``rlvr_fast.demo.sampling.completion_logp`` but for rounding."""
    group_size = len(samples.sequences) // samples.rollouts.n_prompts
    prompts, completions = samples.sequences.tensor_split([samples.prompt_length], 1)
    of_prompts, cache = policy.with_cache(prompts[::group_size], None)
    first = of_prompts[:, -1:].repeat_interleave(group_size, 0)
    rest, _ = policy.with_cache(completions[:, :-1], repeat_cache(cache, group_size))
    hidden = samples.rollouts.pack(torch.cat([first, rest], 1))
    return rf.linear_logprob(hidden, policy.lm_head.weight, samples.rollouts.tokens)[0]
