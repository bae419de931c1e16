"""A GRPO loop on packed sequences whose loss knows no prompts, as those of prime-rl, open-instruct and slime.

    python examples/packed_loop.py        # seconds on a CPU; the same toy as examples/plain_loop.py

A pack is one row [1, N] of prompts and responses, one behind the other, with positions that begin at 0 in each and
advantages per token. The monitor is told how many responses a group has and what made the advantages: from these alone
it recovers each response's class and its group's success rate. Gaps need prompt ids; with ids and rewards at hand use
``rf.Rollouts.from_packed`` and go on as in plain_loop.py.
"""

from __future__ import annotations

import torch
from plain_loop import GROUP, LARGEST, LONGEST, Policy

import rlvr_fast as rf
from rlvr_fast.integrations import packed

PACK = 40  # sequences in a micro-batch


def pack(targets: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor
         ) -> dict[str, torch.Tensor]:
    """[1, N] each: of every sequence its prompt, one token, and its response."""
    prompt = torch.zeros(len(targets), 1, dtype=torch.bool)
    own = torch.cat([~prompt, mask], 1)
    columns = {"mask": torch.cat([prompt, mask], 1), "advantages": advantages[:, None].expand(-1, 1 + LONGEST),
               "position_ids": torch.arange(1 + LONGEST).expand(len(targets), -1)}
    return {name: values[own][None] for name, values in columns.items()}


def main(*, learning_rate: float = 0.02, steps: int = 30, seed: int = 0) -> list[dict[str, float]]:
    """Train; returns the metrics of every step."""
    torch.manual_seed(seed)
    policy, history = Policy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    monitor = rf.GapMonitor(group_size=GROUP, estimator="dr_grpo", budget=None)
    targets = torch.arange(1, LARGEST + 1).repeat_interleave(GROUP)
    for step in range(steps):
        tokens, mask, rewards = policy.sample(targets)
        mean = rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
        advantages, n_tokens = rewards - mean, mask.sum()  # r − mean, and a token mean over the whole batch
        optimizer.zero_grad()
        for rows in torch.randperm(len(targets)).split(PACK):  # packs know nothing of groups
            micro_batch = pack(targets[rows], tokens[rows], mask[rows], advantages[rows])
            logits = policy.lm_head(policy(targets[rows], tokens[rows]))[mask[rows]]
            logp = torch.zeros_like(micro_batch["advantages"])
            logp[micro_batch["mask"]] = logits.log_softmax(-1).gather(1, tokens[rows][mask[rows]][:, None]).squeeze(1)
            (-(micro_batch["advantages"] * logp)[micro_batch["mask"]].sum() / n_tokens).backward()
            packed.update(monitor, **micro_batch, logp=logp)
        optimizer.step()
        history.append(monitor.compute() | {"success": float(rewards.mean())})
        monitor.reset()
        found = history[-1]
        print(f"step {step:2d}  success {found['success']:6.1%}  mixed groups {found['rlvr/group/frac_mixed']:4.0%}  "
              f"their success {found.get('rlvr/group/p_mixed', 0.0):6.1%}  "
              f"log-prob gap {found.get('rlvr/logp/gap', 0.0):+.3f}")
    return history


if __name__ == "__main__":
    main()
