"""The model: a frozen one-step map behind one layer of attention, of which only Q is trained.

**Prompt.** L distinct actions g_1 … g_L of a group G of order d, drawn without replacement, each under its own
identifier c_1 … c_L, distinct, out of N; and a start state y_0 in G. Actions are applied from the left; the right final
state is g_L ⋯ g_1·y_0. L is the horizon and the difficulty.

**Policy.** The response is the chain of states y_1 … y_L, one token per step. The query of step k is c_k, the key of
action j is c_j (one-hot, no values but the actions), so the attention is a_kj = softmax_j Q[c_k, c_j] with the trained
Q [N, N], zero at the start: attention 1/L everywhere. The frozen map reads the attention's mixture of actions and the
current state and gives the state h·y the logit C_B·ln d·(attention on h):

    π(h·y | step k, y) = exp(B·a_k(h)) / Z_k,   B = C_B·ln d,   a_k(h) = a_kj if h = g_j, 0 for the d − L other actions.

With all attention on the right action it takes the right step with probability d^C_B / (d^C_B + d − 1): exact up to
d^(1 − C_B), which is also what is left to gain. Because G acts freely, the chance of h does not depend on y: a response
is a random walk on G with independent steps. Success rates are therefore exact convolutions, and sampling needs no loop
over states.

Reward 1 if the final state is right, however it was reached. Per response the score is length-normalised,
(1/L) Σ_k ∇_Q log π(y_k | y_{k−1}).

Choices. The paper's equations were at hand only through an independent implementation of them [paper B, 2nd]. There a
fixed hidden permutation says which identifier a step's query carries; here it is the identity, which only renames the
rows of Q. The reported experiment has a trained map and so no C_B; here it is the map of the theory with C_B = 4 unless
said, and varied. N = 48, room for the longest mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import IGNORED_LABEL, Rollouts
from rlvr_fast.simulate.relay.group import Group

Tensor = torch.Tensor


class Prompts(NamedTuple):
    """R prompts of one length.

    order: [R, d] every action once; the first L are the prompt's, in the order in which they are to be applied.
    identifiers: [R, L]. start: [R] states.
    """

    order: Tensor
    identifiers: Tensor
    start: Tensor

    @property
    def length(self) -> int:
        return self.identifiers.shape[1]

    @property
    def actions(self) -> Tensor:
        return self.order[:, :self.length]


class Step(NamedTuple):
    """The policy of R prompts. attention, logp, probability: [R, L, L], of step k to action j, and of taking it.
    logp_other: [R, L] log-prob of taking one certain action that is not in the prompt. pairs: [R, L, L] int64, where
    Q[c_k, c_j] lies in the flattened Q."""

    pairs: Tensor
    attention: Tensor
    logp: Tensor
    probability: Tensor
    logp_other: Tensor


@dataclass(frozen=True, eq=False)
class StateTracking:
    """See the head of the file. Every q is [N, N]; float32 for speed, float64 for exact figures.

    Attributes:
        group: of order d. n_identifiers: N. c_b: C_B, at least 0.
    """

    group: Group
    n_identifiers: int = 48
    c_b: float = 4.0

    def __post_init__(self) -> None:
        if not isinstance(self.group, Group):
            raise TypeError(f"group must be a Group, got {check.describe(self.group)}")
        if self.n_identifiers < 2:
            raise ValueError(f"n_identifiers must be at least 2, got {self.n_identifiers}")
        if check.real("c_b", self.c_b) < 0:
            raise ValueError(f"c_b must be at least 0, got {self.c_b}")

    @property
    def sharpness(self) -> float:
        return self.c_b * math.log(self.group.order)

    def check_length(self, length: int) -> int:
        """A horizon: distinct actions and identifiers must suffice."""
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int, got {check.describe(length)}")
        largest = min(self.group.order, self.n_identifiers)
        if not 1 <= length <= largest:
            raise ValueError(f"length must be 1 to {largest} (distinct actions and identifiers), got {length}")
        return length

    def initial(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.n_identifiers, self.n_identifiers, dtype=dtype)

    def prompts(self, length: int, n_prompts: int, generator: torch.Generator) -> Prompts:
        self.check_length(length)
        order, identifiers = (torch.rand(n_prompts, size, generator=generator).argsort(1)
                              for size in (self.group.order, self.n_identifiers))
        start = torch.randint(self.group.order, (n_prompts,), generator=generator)
        return Prompts(order, identifiers[:, :length], start)

    # -- the policy ---------------------------------------------------------------------------------------------------

    def step(self, q: Tensor, prompts: Prompts) -> Step:
        """Differentiable in q."""
        pairs = prompts.identifiers[:, :, None] * self.n_identifiers + prompts.identifiers[:, None, :]
        attention = q.flatten()[pairs].softmax(-1)
        logits = self.sharpness * attention
        top = logits.detach().amax(-1, keepdim=True)
        weight = (logits - top).exp()
        total = weight.sum(-1, keepdim=True) + (self.group.order - prompts.length) * (-top).exp()
        logp_other = -top - total.log()
        return Step(pairs, attention, logits + logp_other, weight / total, logp_other[..., 0])

    def entropy(self, step: Step) -> Tensor:
        """[R, L]: of the policy at every step."""
        n_other = self.group.order - step.logp.shape[-1]
        return -(step.probability * step.logp).sum(-1) - n_other * step.logp_other.exp() * step.logp_other

    def kernels(self, q: Tensor, prompts: Prompts) -> Tensor:
        """[R, L, d]: probability of every action at every step."""
        step = self.step(q, prompts)
        places = prompts.actions[:, None, :].expand_as(step.logp)
        other = step.logp_other[..., None].expand(-1, -1, self.group.order)
        return other.scatter(-1, places, step.logp).exp()

    def success(self, q: Tensor, prompts: Prompts) -> Tensor:
        """[R]: exact probability of a correct response, all paths summed. Differentiable in q."""
        shift = self.group.walk(self.kernels(q, prompts))
        wanted = self.group.path(torch.full_like(prompts.start, self.group.identity), prompts.actions)[:, -1]
        return shift.gather(1, wanted[:, None])[:, 0]

    # -- responses ----------------------------------------------------------------------------------------------------

    def draw(self, step: Step, generator: torch.Generator) -> Tensor:
        """[R, L]: one response per prompt, as the place of the taken action in ``Prompts.order``."""
        shape, length = step.logp.shape[:2], step.logp.shape[-1]
        level = torch.rand(shape, generator=generator, dtype=step.logp.dtype)
        place = (level[..., None] > step.probability.cumsum(-1)).sum(-1)  # L: none of the prompt's
        if length == self.group.order:
            return place.clamp(max=length - 1)
        return torch.where(place < length, place, torch.randint(length, self.group.order, shape, generator=generator))

    def greedy(self, step: Step) -> Tensor:
        """[R, L]: the most attended action at every step; the first of equals."""
        return step.attention.argmax(-1)

    def states(self, prompts: Prompts, places: Tensor) -> tuple[Tensor, Tensor]:
        """[R, L] states of the response, and [R] bool whether the last one is right."""
        states = self.group.path(prompts.start, prompts.order.gather(1, places))
        return states, states[:, -1] == self.group.path(prompts.start, prompts.actions)[:, -1]

    def token_by_logit(self, step: Step, places: Tensor) -> Tensor:
        """[R, L, L]: ∂ log π(y_k | y_{k−1}) by the logits of the prompt's actions."""
        taken = places[..., None] == torch.arange(step.probability.shape[-1])
        return taken.to(step.probability.dtype) - step.probability

    def entropy_by_logit(self, step: Step) -> Tensor:
        """[R, L, L]: the step's entropy by the logits of the prompt's actions."""
        return -step.probability * (step.logp + self.entropy(step)[..., None])

    def through_attention(self, step: Step, by_logit: Tensor) -> Tensor:
        """[R, L, L]: from derivatives by the logits to derivatives by Q[c_k, c_j]."""
        weighted = step.attention * by_logit
        return self.sharpness * (weighted - step.attention * weighted.sum(-1, keepdim=True))

    def response_scores(self, step: Step, token_scores: Tensor) -> Tensor:
        """[R, N²]: length-normalised score of each response, from derivatives by Q[c_k, c_j]."""
        scores = token_scores.new_zeros(len(token_scores), self.n_identifiers ** 2)
        return scores.scatter_(1, step.pairs.flatten(1), token_scores.flatten(1) / token_scores.shape[1])

    def total(self, step: Step, token_scores: Tensor) -> Tensor:
        """[N, N]: the same derivatives of all responses added, as they are."""
        total = token_scores.new_zeros(self.n_identifiers ** 2)
        total.index_add_(0, step.pairs.flatten(), token_scores.flatten())
        return total.view(self.n_identifiers, self.n_identifiers)


def rollouts(parts: list[tuple[int, Tensor, Tensor]]) -> Rollouts:
    """One batch of several levels: (L, [R, L] states, [R] bool) each. Its prompt ids are the levels.

    A level takes the part of a prompt: its responses are drawn from one distribution, over prompts and chains, whose
    success rate and gap are the level's.
    """
    longest = max(length for length, _, _ in parts)
    tokens = torch.cat([torch.nn.functional.pad(states, (0, longest - length), value=IGNORED_LABEL)
                        for length, states, _ in parts])
    reward = torch.cat([correct for _, _, correct in parts]).float()
    return Rollouts.from_padded(tokens, None, reward,
                                prompt_ids=[length for length, states, _ in parts for _ in range(len(states))])
