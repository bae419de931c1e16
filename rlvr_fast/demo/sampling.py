"""Rollouts of the policy, and the log-probs it gives to tokens that are already there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import rlvr_fast as rf
from rlvr_fast.demo import task as addition
from rlvr_fast.demo.model import Policy, repeat_cache
from rlvr_fast.demo.task import Task


@dataclass(frozen=True)
class Samples:
    """Sampled sequences [B, T], prompt and completion, with what they earned."""

    sequences: torch.Tensor
    rollouts: rf.Rollouts
    prompt_length: int


@torch.no_grad()
def sample(policy: Policy, problems: torch.Tensor, group_size: int, generator: torch.Generator,
           task: Task = addition) -> Samples:
    """``group_size`` responses to every problem at temperature 1, each verified."""
    prompts = task.prompt_tokens(problems)
    sequences = prompts.repeat_interleave(group_size, 0)
    hidden, cache = policy.with_cache(prompts, None)
    hidden = hidden[:, -1].repeat_interleave(group_size, 0)
    cache = repeat_cache(cache, group_size)
    ended = torch.zeros(len(sequences), 1, dtype=torch.bool)
    mask = []
    for position in range(task.MAX_ANSWER_LENGTH):
        if position:
            hidden, cache = policy.with_cache(sequences[:, -1:], cache)
            hidden = hidden[:, -1]
        chosen = torch.multinomial(policy.lm_head(hidden).softmax(-1), 1, generator=generator)
        chosen = chosen.masked_fill(ended, task.END)
        mask.append(~ended)
        ended = ended | (chosen == task.END)
        sequences = torch.cat([sequences, chosen], 1)
    completions = sequences[:, task.PROMPT_LENGTH:]
    rewards = task.verify(completions, problems.repeat_interleave(group_size, 0))
    rollouts = rf.Rollouts.from_padded(completions, torch.cat(mask, 1), rewards, group_size=group_size)
    return Samples(sequences, rollouts, task.PROMPT_LENGTH)


def completion_hidden(policy: Policy, samples: Samples) -> torch.Tensor:
    """[N, D] hidden states that predict the sampled tokens, in rollout order."""
    return samples.rollouts.pack(policy(samples.sequences[:, :-1])[:, samples.prompt_length - 1:])


def completion_logp(policy: Policy, samples: Samples) -> torch.Tensor:
    """[N] log-probs of the sampled tokens under the policy as it is now."""
    return rf.linear_logprob(completion_hidden(policy, samples), policy.lm_head.weight, samples.rollouts.tokens)[0]


@torch.no_grad()
def exact_success(policy: Policy, problems: torch.Tensor, task: Task = addition) -> float:
    """Success rate without sampling: every problem has one right answer, so its probability is the success rate."""
    answers, mask = task.answer_tokens(problems)
    hidden = policy(torch.cat([task.prompt_tokens(problems), answers[:, :-1]], 1))[:, task.PROMPT_LENGTH - 1:]
    logp = policy.lm_head(hidden).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    return torch.where(mask, logp, 0.0).sum(1).exp().mean().item()
