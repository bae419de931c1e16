"""``linear_logprob``: the head pass as a differentiable torch operator, a drop-in for a loop's log-prob computation.

Registered with ``torch.library``, so ``torch.compile`` sees one opaque node with known shapes and a known backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.backends import TokenPass
from rlvr_fast.head import Head, check_shapes_of_tokens, check_tokens, check_values
from rlvr_fast.token_stats import run_head_pass
from rlvr_fast.vocabulary_parallel import VocabularyShard, agreement, check_shard, restored


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, *,
                   bias: torch.Tensor | None = None, temperature: float = 1.0, softcap: float | None = None,
                   vocabulary: VocabularyShard | None = None, backend: str = "auto"
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of sampled tokens, differentiable in hidden, weight and bias; never an [N, V] buffer.

    Args:
        hidden: [..., D] final hidden states at the positions that predict ``tokens``; float32, bfloat16 or float16.
        weight: [V, D] lm_head weight, same dtype. bias: [V] or None.
        tokens: [...] integer ids in [0, V). Labels of -100 have no log-prob: select the response tokens first
            (``Rollouts.pack`` does).
        temperature, softcap, backend: as in ``token_stats``.
        vocabulary: this rank's shard of the vocabulary where ``weight`` and ``bias`` are its rows only. Both directions
            are collective, as in a column-parallel layer: the backward sums the gradient of ``hidden`` over the ranks
            (before it is rounded to the dtype of ``hidden``) and gives each rank that of its own rows. Upstream
            gradients, and whether ``hidden`` needs one, must be the same on every rank.

    Returns:
        logp, entropy: [...] float32. The backward recomputes the logits: three products in all, gradients accumulated
        in float32 and returned in the inputs' dtypes.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    shard, group = (None, None) if vocabulary is None else check_shard(vocabulary).operator_arguments
    try:
        flat = hidden.flatten(0, -2) if isinstance(hidden, torch.Tensor) and hidden.ndim > 2 else hidden
        head = Head.checked(flat, weight, bias, temperature, softcap, vocabulary)
        check_shapes_of_tokens(tokens, hidden.shape[:-1], hidden.device)
        check.choice("backend", backend, backends.CHOICES)
    except (TypeError, ValueError) as error:
        if vocabulary is not None:  # the others are on their way to the agreement inside the operator
            vocabulary.refuse(error)
        raise
    results = _forward(flat, weight, tokens.reshape(-1), bias, head.temperature, head.softcap, backend, shard, group)
    return results[0].reshape(tokens.shape), results[2].reshape(tokens.shape)


@torch.library.custom_op("rlvr_fast::linear_logprob", mutates_args=())
def _forward(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None,
             temperature: float, softcap: float | None, backend: str, shard: list[int] | None = None,
             group: str | None = None) -> list[torch.Tensor]:
    """The six columns of TokenPass, each [N]."""
    head = Head(weight, bias, temperature, softcap, restored(shard, group))
    with agreement(head.shard) as same:
        check_values(hidden)
        tokens = check_tokens(tokens, hidden.shape[0], head.whole_vocabulary_size, hidden.device)
        backends.resolve(backend, hidden.device)
        same("linear_logprob", hidden, tokens, head)
    return [column.clone() for column in run_head_pass(hidden, tokens, head, backend)]


@_forward.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None, temperature: float,
      softcap: float | None, backend: str, shard: list[int] | None = None, group: str | None = None
      ) -> list[torch.Tensor]:
    return [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in TokenPass._fields]


@torch.library.custom_op("rlvr_fast::linear_logprob_backward", mutates_args=())
def _backward(grad_logp: torch.Tensor, grad_entropy: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
              tokens: torch.Tensor, bias: torch.Tensor | None, token_pass: list[torch.Tensor], temperature: float,
              softcap: float | None, backend: str, needs: list[bool], shard: list[int] | None = None,
              group: str | None = None) -> list[torch.Tensor]:
    """Gradients for hidden, weight and bias; an empty tensor where none is needed."""
    run = backends.select("linear_logprob_backward", backend, hidden.device)
    head = Head(weight, bias, temperature, softcap, restored(shard, group))
    tokens = head.local_ids(tokens.long())
    gradients = list(run(grad_logp, grad_entropy, hidden, tokens, head, TokenPass(*token_pass), tuple(needs)))
    if needs[0]:
        gradients[0] = head.total(gradients[0])
    return [hidden.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (hidden, weight, bias), strict=True)]


@_backward.register_fake
def _(grad_logp: torch.Tensor, grad_entropy: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
      tokens: torch.Tensor, bias: torch.Tensor | None, token_pass: list[torch.Tensor], temperature: float,
      softcap: float | None, backend: str, needs: list[bool], shard: list[int] | None = None, group: str | None = None
      ) -> list[torch.Tensor]:
    shapes = (hidden, weight, weight if bias is None else bias)
    return [torch.empty_like(like, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
            for like, needed in zip(shapes, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    hidden, weight, tokens, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, tokens, bias, *output)
    for column in output[1::2]:  # only logp and entropy (columns 0 and 2) carry gradients
        ctx.mark_non_differentiable(column)
    ctx.mark_non_differentiable(output[4])


def _autograd(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, tokens, bias, *token_pass = ctx.saved_tensors
    temperature, softcap, backend, shard, group = ctx.options
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    zero = torch.zeros_like(token_pass[0])
    grad_logp, grad_entropy = (zero if gradient is None else gradient.contiguous() for gradient in gradients[:3:2])
    result = _backward(grad_logp, grad_entropy, hidden, weight, tokens, bias, token_pass, temperature, softcap,
                       backend, needs, shard, group)
    grad_hidden, grad_weight, grad_bias = (g if needed else None for g, needed in zip(result, needs, strict=True))
    rest = len(ctx.needs_input_grad) - 4  # the dispatcher leaves out arguments that are at their defaults
    return grad_hidden, grad_weight, None, grad_bias, *[None] * rest


_forward.register_autograd(_autograd, setup_context=_setup_context)
