"""The stages of gradient analysis in a training step, each as the call that a loop makes, with the work it requires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rlvr_fast.advantages import advantages, loss_weights
from rlvr_fast.gap import Gap, gradient_gap
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.profile.shape import Shape
from rlvr_fast.step.measure import StepMeasure, measure_step
from rlvr_fast.synthetic import SyntheticBatch
from rlvr_fast.token_stats import TokenStats, token_stats


@dataclass(frozen=True)
class Inputs:
    """A synthetic batch and log-probs of its tokens around one update."""

    batch: SyntheticBatch
    logp_before: torch.Tensor
    logp_after: torch.Tensor
    logp_reverse: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        batch = SyntheticBatch.draw(vocabulary_size=shape.vocabulary_size, hidden_size=shape.hidden_size,
                                    n_tokens=shape.n_tokens, n_responses=shape.n_responses,
                                    group_size=shape.group_size, dtype=dtype, device=device, seed=seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        before, first, second = (torch.rand(shape.n_tokens, generator=generator, device=device) for _ in range(3))
        before, first, second = -2 * before, 0.02 * (first - 0.5), 0.004 * (second - 0.5)
        return cls(batch, before, before + first + second, before - first + second)


@dataclass(frozen=True)
class Stage:
    """One call.

    Attributes:
        run: makes it, on given inputs.
        flops: operations that its result requires, of a shape; 0 where only bytes count.
        bytes: what must be read and written at least, of a shape and the operands' bytes per element.
    """

    name: str
    run: Callable[[Inputs], object]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape, int], float]


def all_stages(levels: tuple[str, ...], softcap: float | None, backend: str) -> tuple[Stage, ...]:
    """Every stage, with the gap at ``levels``."""
    def stats(inputs: Inputs, *, hidden_grad: bool = False) -> TokenStats:
        batch = inputs.batch
        return token_stats(batch.hidden, batch.weight, batch.rollouts.tokens, hidden_grad=hidden_grad, softcap=softcap,
                           backend=backend)

    def gap(level: str, inputs: Inputs) -> Gap:
        batch = inputs.batch
        return gradient_gap(batch.hidden, batch.weight, batch.rollouts, level=level, softcap=softcap, backend=backend)

    def training_logp(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        hidden, weight = (x.detach().requires_grad_() for x in (inputs.batch.hidden, inputs.batch.weight))
        logp, _ = linear_logprob(hidden, weight, inputs.batch.rollouts.tokens, softcap=softcap, backend=backend)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    def weights(inputs: Inputs) -> torch.Tensor:
        rollouts = inputs.batch.rollouts
        return loss_weights(rollouts, advantages(rollouts, "grpo", backend=backend), "grpo", backend=backend)

    def step(inputs: Inputs) -> StepMeasure:
        return measure_step(inputs.logp_before, inputs.logp_after, inputs.batch.rollouts,
                            logp_reverse=inputs.logp_reverse, in_sample=False, backend=backend)

    # level: products of N·V·D, and fp32 results per response
    of_level: dict[str, tuple[int, Callable[[Shape], int]]] = {
        "logits": (1, lambda s: s.vocabulary_size), "hidden": (1, lambda s: s.hidden_size),
        "head": (2, lambda s: s.group_size)}

    def gap_flops(level: str, shape: Shape) -> float:
        return of_level[level][0] * shape.product_flops

    def gap_bytes(level: str, shape: Shape, itemsize: int) -> float:
        return _operands(shape, itemsize) + 20 * shape.n_tokens + 4 * shape.n_responses * of_level[level][1](shape)

    stages = [Stage("token_stats", stats, lambda s: s.product_flops, lambda s, e: _operands(s, e) + 20 * s.n_tokens)]
    for level in levels:
        stages.append(Stage(f"gradient_gap {level}", partial(gap, level), partial(gap_flops, level),
                            partial(gap_bytes, level)))
    return (
        *stages,
        Stage("token_stats hidden_grad", partial(stats, hidden_grad=True),
              lambda s: 2 * s.product_flops, lambda s, e: _operands(s, e) + (20 + 4 * s.hidden_size) * s.n_tokens),
        Stage("linear_logprob fwd+bwd", training_logp, lambda s: 3 * s.product_flops,
              lambda s, e: 2 * _operands(s, e) + 8 * s.n_tokens),
        Stage("advantages + weights", weights, lambda s: 0.0, lambda s, e: 4 * s.n_tokens + 24 * s.n_responses),
        Stage("measure_step", step, lambda s: 0.0, lambda s, e: 12 * s.n_tokens + 24 * s.n_responses),
    )


def _operands(shape: Shape, itemsize: int) -> float:
    """Hidden states and lm_head, read once."""
    return itemsize * shape.hidden_size * float(shape.n_tokens + shape.vocabulary_size)
