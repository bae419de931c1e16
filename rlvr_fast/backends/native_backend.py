"""The C++ backend for CPU tensors: the fused head pass of csrc/cpu. What it does not implement, torch does."""

from __future__ import annotations

import torch

from rlvr_fast.backends import torch_backend
from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.head import Head

try:
    from rlvr_fast import _native
except ImportError as error:
    _native = None
    IMPORT_ERROR = str(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``; None if it can."""
    if device.type != "cpu":
        return f"the native backend runs on the CPU, the tensors are on {device}"
    if _native is None:
        return f"the native extension is not built ({IMPORT_ERROR}); install with a C++17 compiler present"
    return None


def head_pass(hidden: torch.Tensor, tokens: torch.Tensor, head: Head) -> TokenPass:
    """Statistics of every token, N·V·D multiply-adds, no [N, V] buffer."""
    return _run(hidden, tokens, head, None, None, None)


def head_pass_with_sums(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        cu_seqlens: torch.Tensor, merge: Merge | None = None) -> tuple[TokenPass, torch.Tensor]:
    """The same, and per response Σ_t c_t ∂logp_t/∂raw: [R, V]. One product; a [V, 128] buffer of logits.

    ``merge`` is called for chunks of at most 128 tokens, cut by D alone.
    """
    sums = torch.empty(cu_seqlens.numel() - 1, head.vocabulary_size)
    coefficients = coefficients.to(torch.float32).contiguous()
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    return _run(hidden, tokens, head, coefficients, cu_seqlens, sums, merge=merge), sums


def head_pass_with_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, merge: Merge | None = None
                            ) -> tuple[TokenPass, torch.Tensor]:
    """The fused pass, then torch's gradient."""
    return torch_backend.head_pass_with_gradient(hidden, tokens, head, merge, head_pass)


def head_pass_with_gram(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        groups: list[list[tuple[int, int]]], merge: Merge | None = None
                        ) -> tuple[TokenPass, list[torch.Tensor]]:
    """The fused pass, then torch's Gram matrices."""
    return torch_backend.head_pass_with_gram(hidden, tokens, head, coefficients, groups, merge, head_pass)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(hidden, tokens, head, coefficients, cu_seqlens, sums, instruction_set="auto", merge=None) -> TokenPass:
    hidden, weight = hidden.detach().contiguous(), head.weight.detach().contiguous()
    bias = None if head.bias is None else head.bias.detach().to(torch.float32).contiguous()
    results = torch.empty(6, hidden.shape[0])

    def merge_chunk(first, count):
        chunk = results[:, first:first + count]
        chunk.copy_(torch.stack(merge(TokenPass(*chunk.unbind(0)))[0]))

    _native.head_pass(
        dtype=_DTYPE_CODES[hidden.dtype], hidden=_address(hidden), weight=_address(weight), bias=_address(bias),
        tokens=_address(tokens), n_tokens=hidden.shape[0], vocabulary=head.vocabulary_size, width=head.hidden_size,
        temperature=head.temperature, softcap=head.softcap or 0.0, results=_address(results), sums=_address(sums),
        coefficients=_address(coefficients), cu_seqlens=_address(cu_seqlens),
        n_responses=0 if sums is None else sums.shape[0], merge=None if merge is None else merge_chunk,
        n_threads=torch.get_num_threads(), instruction_set=instruction_set)
    return TokenPass(*results.unbind(0))
