"""The row pass: everything the head pass reports, from logits that are in memory, and which kernel does it.

    logits_pass(logits, tokens, temperature, softcap=None, block=None, backend="auto") -> TokenPass

Three implementations: "torch" runs anywhere; "triton" on a GPU (or interpreted); "cuda" where the extension
``rlvr_fast._cuda_rows`` was built, which reads the logits once even when it also writes derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlvr_fast import _validate as check
from rlvr_fast.backends import cuda_rows, torch_backend, triton_backend
from rlvr_fast.backends.base import TokenPass

NAMES = ("torch", "triton", "cuda")
CHOICES = ("auto", *NAMES)

# (architecture as in ``kernels.config``, dtype of the logits, whether derivatives are written, vocabulary sizes) for
# which the CUDA kernel was measured faster than the Triton one. Nothing is measured yet: Triton serves every GPU.
CUDA_IS_FASTER: tuple[tuple[str, torch.dtype, bool, range], ...] = ()


def logits_pass(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float | None = None,
                block: torch.Tensor | None = None, backend: str = "auto") -> TokenPass:
    """Statistics of every row of logits and, with ``block``, ∂logp/∂raw logits of every entry.

    The derivatives are f_v (1[v=y]·off_mass - 1[v≠y] p_v) / temperature, f the derivative of the soft cap: no 1 - p.
    They are rounded to the block's dtype; float16 has none below 6e-8.

    Args:
        logits: [C, V] raw logits, float32, bfloat16 or float16, any strides (copied unless a row's elements are
            adjacent). Entries of minus infinity are outside the vocabulary.
        tokens: [C] int64, adjacent, in [0, V); -1 where the token is in another shard of the vocabulary.
        temperature: divides the logits.
        softcap: z = softcap·tanh(raw/softcap) before the temperature, or None.
        block: [C, V] float32, bfloat16 or float16 to be filled, or None; adjacent elements in a row. ``logits`` itself
            for writing in place, else memory apart from it.
        backend: "auto", "torch", "triton" or "cuda".

    Raises:
        ValueError, TypeError: a block that cannot be written, or a backend that cannot run here.
    """
    if block is not None:
        _check_block(block, logits)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    name = resolve(backend, logits, block is not None)
    with torch.no_grad():
        return _implementation(name)(logits, tokens, temperature, softcap, block)


def resolve(backend: str, logits: torch.Tensor, with_block: bool) -> str:
    """The implementation that serves these logits.

    Raises:
        ValueError, TypeError: an unknown backend, or one that cannot run here, with the reason.
    """
    check.choice("backend", backend, CHOICES)
    device = logits.device
    if backend != "auto":
        reason = unavailable(backend, device)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run: {reason}")
        return backend
    if device.type != "cuda":
        return "torch"
    if _cuda_is_faster(logits, with_block) and unavailable("cuda", device) is None:
        return "cuda"
    return "triton" if unavailable("triton", device) is None else "torch"


def _cuda_is_faster(logits: torch.Tensor, with_block: bool) -> bool:
    if not CUDA_IS_FASTER:
        return False
    from rlvr_fast.kernels.config import architecture

    here = architecture(logits.device), logits.dtype, with_block
    return any(entry[:3] == here and logits.shape[1] in entry[3] for entry in CUDA_IS_FASTER)


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the implementation ``name`` cannot serve tensors on ``device``; None if it can."""
    return {"torch": torch_backend, "triton": triton_backend, "cuda": cuda_rows}[name].unavailable(device)


def _implementation(name: str) -> Callable[..., TokenPass]:
    return {"torch": torch_backend.logits_pass, "triton": _triton_pass, "cuda": cuda_rows.logits_pass}[name]


def _triton_pass(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float | None,
                 block: torch.Tensor | None) -> TokenPass:
    from rlvr_fast.kernels.row_stats import N_RESULTS, row_stats

    results = torch.empty(N_RESULTS, len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        row_stats(logits, tokens, temperature, softcap, block, results)
    return TokenPass(*results)


def _check_block(block: torch.Tensor, logits: torch.Tensor) -> None:
    check.tensor("block", block, shape=tuple(logits.shape), dtypes=check.FLOAT_DTYPES, device=logits.device)
    n_rows, width = block.shape
    if (width > 1 and block.stride(1) != 1) or (n_rows > 1 and block.stride(0) < width):
        raise ValueError(f"block must have adjacent elements and rows apart, got strides {block.stride()}")
    same = block.dtype == logits.dtype and block.stride() == logits.stride() and block.data_ptr() == logits.data_ptr()
    if not same and _overlap(block, logits):
        raise ValueError("block must be the logits themselves or lie apart from them, "
                         f"got {check.describe(block)} that overlaps {check.describe(logits)}")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors meet; rows that interleave count."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    (first, end), (other_first, other_end) = (
        (x.data_ptr(), x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(),
                                                                                           strict=True))))
        for x in (a, b))
    return first < other_end and other_first < end
