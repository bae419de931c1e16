"""The training step that everybody is measured against: forward and backward of a policy-gradient loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

import rlvr_fast as rf

from .language_model import LanguageModel, Shape


def response_logp(model, ids: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """Log-probs of the response tokens of [B, T] (or of one [T]) -> [B, T − prompt_tokens]."""
    logits = model(ids)[..., prompt_tokens - 1:-1, :]
    return F.log_softmax(logits, -1).gather(-1, ids[..., prompt_tokens:, None]).squeeze(-1)


@dataclass(eq=False)
class Step:
    """A model with one batch; ``coefficients`` [R] are the c_i of the loss −Σ_i c_i log π(o_i)."""

    shape: Shape
    model: LanguageModel
    ids: torch.Tensor
    rollouts: rf.Rollouts
    coefficients: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0) -> Step:
        """Random sequences; half of each prompt's responses are correct."""
        generator = torch.Generator().manual_seed(seed)
        n = shape.n_prompts * shape.group_size
        prompts = torch.randint(shape.vocabulary, (shape.n_prompts, shape.prompt_tokens), generator=generator)
        responses = torch.randint(shape.vocabulary, (n, shape.response_tokens), generator=generator)
        rewards = (torch.arange(n) % 2).float()
        rollouts = rf.Rollouts.from_padded(responses, None, rewards, group_size=shape.group_size)
        ids = torch.cat([prompts.repeat_interleave(shape.group_size, 0), responses], 1)
        return cls(shape, LanguageModel(shape, seed).train(), ids, rollouts, (2 * rewards - 1) / n)

    def backward(self) -> None:
        """The plain step."""
        logp = response_logp(self.model, self.ids, self.shape.prompt_tokens)
        (-(self.coefficients[:, None] * logp).sum()).backward()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
