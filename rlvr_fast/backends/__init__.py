"""Which implementation serves a call. Operations are module-level functions; a backend has those it implements.

    head_pass(hidden, tokens, head) -> TokenPass
    head_pass_with_sums(hidden, tokens, head, coefficients, cu_seqlens) -> (TokenPass, sums [R, V])
    hidden_gradient(hidden, tokens, head, token_pass) -> [N, D]
    linear_logprob_backward(grad_logp, grad_entropy, hidden, tokens, head, token_pass, needs) -> gradients
    head_gram(hidden, tokens, head, token_pass, coefficients, groups) -> one Gram matrix per prompt

The torch backend implements all of them on any device and is the fallback for what a faster one leaves out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

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


def select(operation: str, backend: str, device: torch.device) -> Callable:
    """The function that serves ``operation`` on ``device``; torch's where the backend leaves it out."""
    name = resolve(backend, device)
    return getattr(_module(name), operation, None) or getattr(_module("torch"), operation)
