"""A language model of a few thousand weights and a task with a verifier, for the documentation's examples.

Tokens 16 to 31 are prompts, tokens 0 to 15 their answers: a response to prompt 16 + k is right if it holds token k.
"""

from __future__ import annotations

import torch

N_PROMPTS, LENGTH, VOCABULARY = 16, 8, 32


class Policy(torch.nn.Module):
    """Each position sees its own token and the mean of all before it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.mix = torch.nn.Linear(2 * width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, VOCABULARY, bias=False)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] token ids -> [B, T, D] final hidden states."""
        own = self.embedding(ids)
        count = torch.arange(1, ids.shape[1] + 1)[:, None]
        context = own.cumsum(1) / count
        mixed = torch.nn.functional.gelu(self.mix(torch.cat([own, context], -1)))
        return self.norm(own + mixed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.states(ids))


@torch.no_grad()
def sample(policy: Policy, group_size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses to every prompt: ids [B, 1 + T] of both, rewards [B] of 0 and 1."""
    prompts = torch.arange(VOCABULARY - N_PROMPTS, VOCABULARY)
    ids = prompts.repeat_interleave(group_size)[:, None]
    for _ in range(LENGTH):
        ids = torch.cat([ids, policy(ids)[:, -1].softmax(-1).multinomial(1)], 1)
    wanted = ids[:, :1] - (VOCABULARY - N_PROMPTS)
    return ids, (ids[:, 1:] == wanted).any(1).float()


def logp(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] log-probs of the response tokens."""
    return policy(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
