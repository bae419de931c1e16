"""Which implementation serves a call. Operations are module-level functions; a backend has those it implements.

    head_pass(hidden, tokens, head) -> TokenPass
    head_pass_with_sums(hidden, tokens, head, coefficients, cu_seqlens, merge=None) -> (TokenPass, sums [R, V])
    head_pass_with_gradient(hidden, tokens, head, merge=None) -> (TokenPass, gradient [N, D])
    head_pass_with_gram(hidden, tokens, head, coefficients, groups, merge=None) -> (TokenPass, Gram matrix per prompt)
    through_head(sums, weight) -> sums @ weight [R, D], in float32
    hidden_gradient(hidden, tokens, head, token_pass) -> [N, D]
    linear_logprob_backward(grad_logp, grad_entropy, hidden, tokens, head, token_pass, needs) -> gradients
    head_gram(hidden, tokens, head, token_pass, coefficients, groups) -> one Gram matrix per prompt

The torch backend implements all of them on any device and is the fallback for what a faster one leaves out. The last
three take a pass that was made before and compute the logits again; the ``head_pass_with_`` operations need not.

Shards. ``head`` may hold some rows of the vocabulary; ``tokens`` are ids within these rows, -1 where the sampled token
is in another shard. ``head_pass`` then describes the softmax over these rows alone: where the id is -1, logp is -inf,
off_mass 1 and score_sq Σ_v (f_v p_v)², nothing being held out. What is given the TokenPass of the *whole* vocabulary
returns this shard's share of the whole's gradients or Gram matrices, and so do the operations with ``merge``: the
caller adds up the shares (for sums and weight gradients, whose rows are the shard's own, it has nothing to add).
``merge(pass of a chunk over this shard) -> (pass over the whole vocabulary, [C] float32 probability of this shard)`` is
called for consecutive chunks of tokens (for Gram matrices: for blocks of prompts) before anything is normalised, and
the pass that comes back is the whole vocabulary's. It is a collective: backends cut their chunks by N, D, dtype and
``merge.largest_shard`` alone, so that every rank calls it equally often, for the same tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.backends.base import TokenPass

NAMES = ("torch", "native", "triton")
CHOICES = ("auto", *NAMES)

__all__ = ["CHOICES", "NAMES", "TokenPass", "available", "resolve", "select"]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"rlvr_fast.backends.{name}_backend")


def available(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For every backend None, or the reason why it cannot serve tensors on ``device``."""
    return {name: _module(name).unavailable(torch.device(device)) for name in NAMES}


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that serves tensors on ``device``.

    ``"auto"`` takes the fastest that can run: triton on a GPU, native on a CPU, else torch.

    Raises:
        ValueError, TypeError: an unknown backend, or one that cannot run here, with the reason.
    """
    check.choice("backend", backend, CHOICES)
    if backend == "auto":
        preferred = {"cuda": "triton", "cpu": "native"}.get(device.type, "torch")
        return preferred if _module(preferred).unavailable(device) is None else "torch"
    reason = _module(backend).unavailable(device)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend


def select(operation: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function that serves ``operation`` on ``device``; torch's where the backend leaves it out."""
    name = resolve(backend, device)
    return getattr(_module(name), operation, None) or getattr(_module("torch"), operation)
