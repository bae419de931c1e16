"""The policy on this task: supervised start, rollouts, exact success."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import rlvr_fast as rf
from curriculum import task
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.warmup import supervised_step

WARM_UP_RATE, WARM_UP_RAMP, WARM_UP_BATCH, WARM_UP_MOST = 3e-3, 50, 128, 1000
WARM_UP_MIXTURE = (4, 2, 1, 1)  # of the levels: so that the start shows all degrees of success


def new_policy() -> Policy:
    return Policy(task.VOCABULARY_SIZE, task.PROMPT_LENGTH + task.MAX_ANSWER_LENGTH, width=48)


def warm_up(policy: Policy, pools: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], target: float,
            generator: torch.Generator) -> int:
    """Supervised steps until the easiest level's success reaches ``target``; how many there were."""
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95))
    share = torch.tensor(WARM_UP_MIXTURE) / sum(WARM_UP_MIXTURE)
    for step in range(1, WARM_UP_MOST + 1):
        optimizer.param_groups[0]["lr"] = WARM_UP_RATE * min(1, step / WARM_UP_RAMP)
        counts = torch.multinomial(share, WARM_UP_BATCH, True, generator=generator).bincount(minlength=len(pools))
        batch = torch.cat([pool[torch.randint(len(pool), (int(n),), generator=generator)]
                           for pool, n in zip(pools, counts, strict=True)])
        supervised_step(policy, optimizer, batch, task)
        if step % 5 == 0 and exact_success(policy, held_out[0]) >= target:
            return step
    raise RuntimeError(f"warm-up: the easiest level stayed below {target} for {WARM_UP_MOST} steps")


@torch.no_grad()
def sample(policy: Policy, problems: torch.Tensor, ids: torch.Tensor, group_size: int, generator: torch.Generator
           ) -> tuple[torch.Tensor, rf.Rollouts]:
    """``group_size`` verified responses to every problem at temperature 1: (sequences, rollouts by prompt id)."""
    prompts = task.prompt_tokens(problems)
    decoder = Decoder(policy, prompts, group_size)
    ended = torch.zeros(len(prompts) * group_size, 1, dtype=torch.bool)
    chosen, mask = [], []
    for position in range(task.MAX_ANSWER_LENGTH):
        logits = decoder.logits if position == 0 else decoder.advance(chosen[-1])
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).masked_fill(ended, task.END)
        mask.append(~ended)
        ended = ended | (drawn == task.END)
        chosen.append(drawn)
    completions = torch.cat(chosen, 1)
    rewards = task.verify(completions, problems.repeat_interleave(group_size, 0))
    rollouts = rf.Rollouts.from_padded(completions, torch.cat(mask, 1), rewards,
                                       prompt_ids=ids.repeat_interleave(group_size))
    return torch.cat([prompts.repeat_interleave(group_size, 0), completions], 1), rollouts


class Decoder:
    """The policy one token at a time, with the keys and values of what came before kept."""

    def __init__(self, policy: Policy, prompts: torch.Tensor, group_size: int) -> None:
        self.policy, self.length = policy, 0
        self.cache = [None] * len(policy.blocks)
        self.logits = self.advance(prompts).repeat_interleave(group_size, 0)
        self.cache = [pair.repeat_interleave(group_size, 1) for pair in self.cache]

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] tokens that come next -> [B, V] logits after the last one."""
        policy, stop = self.policy, self.length + tokens.shape[1]
        x = policy.token_embedding(tokens) + policy.position_embedding.weight[self.length:stop]
        for number, block in enumerate(policy.blocks):
            q, k, v = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.n_heads, -1)).permute(2, 0, 3, 1, 4)
            pair = torch.stack([k, v])
            if self.length:
                pair = torch.cat([self.cache[number], pair], 3)
            self.cache[number] = pair
            attended = F.scaled_dot_product_attention(q, pair[0], pair[1], is_causal=self.length == 0)
            x = x + block.out(attended.transpose(1, 2).flatten(2))
            x = x + block.down(F.gelu(block.up(block.mlp_norm(x))))
        self.length = stop
        return policy.lm_head(policy.final_norm(x[:, -1]))


class NextToken(nn.Module):
    """The policy with its lm_head inside the forward: token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.lm_head = policy, policy.lm_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.policy(tokens))


@torch.no_grad()
def exact_success(policy: Policy, problems: torch.Tensor) -> float:
    """Success rate without sampling: every problem has one right answer, so its probability is the success rate."""
    answers, mask = task.answer_tokens(problems)
    hidden = policy(torch.cat([task.prompt_tokens(problems), answers[:, :-1]], 1))[:, task.PROMPT_LENGTH - 1:]
    logp = policy.lm_head(hidden).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    return torch.where(mask, logp, 0.0).sum(1).exp().mean().item()
