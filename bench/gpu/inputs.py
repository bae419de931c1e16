"""What every provider is given: heads of known models with random or rollout-like logits, made on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlvr_fast import Rollouts
from rlvr_fast.bench.workload import GROUP_SIZE, N_INPUT_SETS, RESPONSES, Shape, Workload

# name -> (D, V)
HEADS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "tiny": (16, 40),  # for the dry run: few enough logits for Triton's interpreter
}
LOGITS = ("peaked", "random")


def head_weight(head: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[V, D], so that logits of normal hidden states have standard deviation 1."""
    width, vocabulary = HEADS[head]
    generator = torch.Generator(device).manual_seed(1)
    return (torch.randn(vocabulary, width, generator=generator, device=device) / math.sqrt(width)).to(dtype)


def draw(weight: torch.Tensor, n_tokens: int, logits: str, index: int) -> Workload:
    """Input set ``index``, on the weight's device and in its dtype; the sets of a shape share the weight.

    "random": normal logits, p_y about 1/V. "peaked": the hidden state leans towards its token's row, so that p_y runs
    from 0.1 to 0.998 as in rollouts.
    """
    vocabulary, width = weight.shape
    shape, device = Shape.parse(f"{n_tokens},{vocabulary},{width}"), weight.device
    generator = torch.Generator(device).manual_seed(100 + index)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(n_tokens, width)
    tokens = torch.randint(vocabulary, (RESPONSES, shape.length), generator=generator, device=device)
    if logits == "peaked":
        margin = math.log(vocabulary) - 2 + 8 * torch.rand(n_tokens, generator=generator, device=device)
        hidden += margin[:, None] * weight[tokens.flatten()].float()
    rollouts = _rollouts(tokens)
    return Workload(shape, hidden.to(weight.dtype), weight, rollouts, normal(n_tokens),
                    *_logps(n_tokens, generator, device))


def _rollouts(tokens: torch.Tensor) -> Rollouts:
    """Groups of GROUP_SIZE with three to five correct responses each."""
    response = torch.arange(len(tokens), device=tokens.device)
    rewards = (response % GROUP_SIZE < 3 + response // GROUP_SIZE % 3).float()
    return Rollouts.from_padded(tokens, None, rewards, group_size=GROUP_SIZE)


def _logps(n_tokens: int, generator: torch.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Before an update, after it and after its reverse: [N] float32 each."""
    before = -2 * torch.rand(n_tokens, generator=generator, device=device) - 0.5
    first, second = torch.randn(2, n_tokens, generator=generator, device=device)
    return before, before + 0.05 * first + 0.01 * second, before - 0.05 * first + 0.01 * second


@dataclass(frozen=True, eq=False)
class GivenLogits:
    """[N, V] logits that the caller holds, and the sampled tokens [N]."""

    logits: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, workload: Workload) -> GivenLogits:
        return cls(workload.hidden @ workload.weight.T, workload.tokens)


@dataclass(frozen=True, eq=False)
class Steps:
    """A large batch of log-probs around one update; no vocabulary. All responses have one length."""

    rollouts: Rollouts
    logp_before: torch.Tensor
    logp_after: torch.Tensor
    logp_reverse: torch.Tensor

    @classmethod
    def draw(cls, n_responses: int, length: int, index: int, device: torch.device) -> Steps:
        generator = torch.Generator(device).manual_seed(200 + index)
        tokens = torch.zeros(n_responses, length, dtype=torch.int64, device=device)  # never read by these functions
        return cls(_rollouts(tokens), *_logps(n_responses * length, generator, device))


__all__ = ["GROUP_SIZE", "HEADS", "LOGITS", "N_INPUT_SETS", "RESPONSES", "GivenLogits", "Shape", "Steps", "Workload",
           "draw", "head_weight"]
