"""The stages of gradient analysis in a training step, each as the call that a loop makes, with the work it requires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlvr_fast.advantages import advantages, loss_weights
from rlvr_fast.gap import gradient_gap
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.profile.shape import Shape
from rlvr_fast.step.measure import measure_step
from rlvr_fast.synthetic import SyntheticBatch
from rlvr_fast.token_stats import token_stats


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
    head = {"softcap": softcap, "backend": backend}

    def stats(inputs, hidden_grad=False):
        batch = inputs.batch
        return token_stats(batch.hidden, batch.weight, batch.rollouts.tokens, hidden_grad=hidden_grad, **head)

    def gap(inputs, level):
        batch = inputs.batch
        return gradient_gap(batch.hidden, batch.weight, batch.rollouts, level=level, **head)

    def training_logp(inputs):
        hidden, weight = (x.detach().requires_grad_() for x in (inputs.batch.hidden, inputs.batch.weight))
        logp, _ = linear_logprob(hidden, weight, inputs.batch.rollouts.tokens, **head)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    def weights(inputs):
        rollouts = inputs.batch.rollouts
        return loss_weights(rollouts, advantages(rollouts, "grpo", backend=backend), "grpo", backend=backend)

    def step(inputs):
        return measure_step(inputs.logp_before, inputs.logp_after, inputs.batch.rollouts,
                            logp_reverse=inputs.logp_reverse, in_sample=False, backend=backend)

    # level: products of N·V·D, and fp32 results per response
    of_level = {"logits": (1, lambda s: s.vocabulary_size), "hidden": (1, lambda s: s.hidden_size),
                "head": (2, lambda s: s.group_size)}
    stages = [Stage("token_stats", stats, lambda s: s.product_flops, lambda s, e: _operands(s, e) + 20 * s.n_tokens)]
    for level in levels:
        products, width = of_level[level]
        stages.append(Stage(
            f"gradient_gap {level}", lambda inputs, level=level: gap(inputs, level),
            lambda s, products=products: products * s.product_flops,
            lambda s, e, width=width: _operands(s, e) + 20 * s.n_tokens + 4 * s.n_responses * width(s)))
    return (
        *stages,
        Stage("token_stats hidden_grad", lambda inputs: stats(inputs, hidden_grad=True),
              lambda s: 2 * s.product_flops, lambda s, e: _operands(s, e) + (20 + 4 * s.hidden_size) * s.n_tokens),
        Stage("linear_logprob fwd+bwd", training_logp, lambda s: 3 * s.product_flops,
              lambda s, e: 2 * _operands(s, e) + 8 * s.n_tokens),
        Stage("advantages + weights", weights, lambda s: 0.0, lambda s, e: 4 * s.n_tokens + 24 * s.n_responses),
        Stage("measure_step", step, lambda s: 0.0, lambda s, e: 12 * s.n_tokens + 24 * s.n_responses),
    )


def _operands(shape: Shape, itemsize: int) -> float:
    """Hidden states and lm_head, read once."""
    return itemsize * shape.hidden_size * float(shape.n_tokens + shape.vocabulary_size)
