"""The C++ backend for CPU tensors: the head pass of csrc/cpu and its backward. What is not there, torch does."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from rlvr_fast.backends import torch_backend
from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.head import Head

try:
    from rlvr_fast import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]  # a module or None
    IMPORT_ERROR = str(error)

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # for hidden, weight, bias

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
    """The fused pass, then ``hidden_gradient``."""
    token_pass = head_pass(hidden, tokens, head)
    token_pass = token_pass if merge is None else merge(token_pass)[0]
    return token_pass, hidden_gradient(hidden, tokens, head, token_pass)


def head_pass_with_gram(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        groups: list[list[tuple[int, int]]], merge: Merge | None = None
                        ) -> tuple[TokenPass, list[torch.Tensor]]:
    """The fused pass, then torch's Gram matrices."""
    return torch_backend.head_pass_with_gram(hidden, tokens, head, coefficients, groups, merge, head_pass)


def hidden_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass) -> torch.Tensor:
    """∂logp/∂hidden per token: [N, D] float32, in two products."""
    ones, zeros = torch.ones(len(tokens)), torch.zeros(len(tokens))
    gradient, _, _ = _run_backward(ones, zeros, hidden, tokens, head, token_pass, (True, False, False))
    assert gradient is not None
    return gradient


def linear_logprob_backward(grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, hidden: torch.Tensor,
                            tokens: torch.Tensor, head: Head, token_pass: TokenPass, needs: tuple[bool, bool, bool]
                            ) -> Gradients:
    """Gradients of Σ grad_logp·logp + grad_entropy·H for (hidden, weight, bias), in float32.

    N·V·D multiply-adds for the logits and as many for each of hidden and weight that needs a gradient, where N are the
    tokens whose upstream gradient is not zero: responses without advantage cost nothing. Beside the results 6 KB·D a
    thread at most. No bit depends on the number of threads.
    """
    grad_logp, grad_entropy = (torch.zeros(len(tokens)) if upstream is None else upstream.detach().to(torch.float32)
                               for upstream in (grad_logp, grad_entropy))
    active = (grad_logp != 0) | (grad_entropy != 0)
    if active.all():
        return _run_backward(grad_logp, grad_entropy, hidden, tokens, head, token_pass, needs)
    index = active.nonzero()[:, 0]
    active_pass = TokenPass(*(column[index] for column in token_pass))
    grad_active, grad_weight, grad_bias = _run_backward(grad_logp[index], grad_entropy[index], hidden[index],
                                                        tokens[index], head, active_pass, needs)
    grad_hidden = None if grad_active is None else torch.zeros(hidden.shape).index_copy_(0, index, grad_active)
    return grad_hidden, grad_weight, grad_bias


def _run_backward(grad_logp: torch.Tensor, grad_entropy: torch.Tensor, hidden: torch.Tensor, tokens: torch.Tensor,
                  head: Head, token_pass: TokenPass, needs: tuple[bool, bool, bool], instruction_set: str = "auto"
                  ) -> Gradients:
    operands = _Operands.of(hidden, tokens, head)
    lse, entropy, off_mass, grad_logp, grad_entropy = (column.contiguous() for column in (
        token_pass.lse, token_pass.entropy, token_pass.off_mass, grad_logp, grad_entropy))
    inputs = (hidden, head.weight, head.bias)
    grad_hidden, grad_weight, grad_bias = (torch.empty(x.shape) if x is not None and needed else None
                                           for x, needed in zip(inputs, needs, strict=True))
    _native.head_gradient(
        operands.inputs(head), lse=_address(lse), entropy=_address(entropy), off_mass=_address(off_mass),
        grad_logp=_address(grad_logp), grad_entropy=_address(grad_entropy), grad_hidden=_address(grad_hidden),
        grad_weight=_address(grad_weight), grad_bias=_address(grad_bias), instruction_set=instruction_set)
    return grad_hidden, grad_weight, grad_bias


class _Operands(NamedTuple):
    """What a call's addresses point to, in the layout that the kernels read; to be kept until they are done."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor, tokens: torch.Tensor, head: Head) -> _Operands:
        bias = None if head.bias is None else head.bias.detach().to(torch.float32).contiguous()
        return cls(hidden.detach().contiguous(), head.weight.detach().contiguous(), bias, tokens.contiguous())

    def inputs(self, head: Head) -> _native.HeadInputs:
        return _native.HeadInputs(
            dtype=_DTYPE_CODES[self.hidden.dtype], hidden=_address(self.hidden), weight=_address(self.weight),
            bias=_address(self.bias), tokens=_address(self.tokens), n_tokens=self.hidden.shape[0],
            vocabulary=head.vocabulary_size, width=head.hidden_size, temperature=head.temperature,
            softcap=head.softcap or 0.0, n_threads=torch.get_num_threads())


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor | None,
         cu_seqlens: torch.Tensor | None, sums: torch.Tensor | None, instruction_set: str = "auto",
         merge: Merge | None = None) -> TokenPass:
    operands = _Operands.of(hidden, tokens, head)
    results = torch.empty(6, hidden.shape[0])

    def merge_chunk(merge: Merge, first: int, count: int) -> None:
        chunk = results[:, first:first + count]
        chunk.copy_(torch.stack(merge(TokenPass(*chunk.unbind(0)))[0]))

    _native.head_pass(
        operands.inputs(head), results=_address(results), sums=_address(sums), coefficients=_address(coefficients),
        cu_seqlens=_address(cu_seqlens), n_responses=0 if sums is None else sums.shape[0],
        merge=None if merge is None else partial(merge_chunk, merge), instruction_set=instruction_set)
    return TokenPass(*results.unbind(0))
