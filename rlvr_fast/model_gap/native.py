"""The C++ kernels of csrc/cpu for what layers see in the backward; callers have torch forms of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

try:
    from rlvr_fast import _native
except ImportError:
    _native = None  # type: ignore[assignment]  # a module or None

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def _fast() -> bool:
    """With 128-bit vectors torch's own products are faster (measured on x86)."""
    return _native is not None and _native.instruction_set() != "baseline"


def serves(*tensors: torch.Tensor) -> bool:
    """Whether these are tensors that the kernels take, on a machine where they are the faster ones."""
    return _fast() and all(x.device.type == "cpu" and x.dtype in _CODES for x in tensors)


def segmented_gram(responses: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], shape: tuple[int, int],
                   direction: torch.Tensor | None = None, gradient: torch.Tensor | None = None, *,
                   instruction_set: str = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """⟨G_i, G_j⟩ [n, n] and ⟨direction, G_i⟩ [n] float64, G_i = Σ b.T @ a over the pieces (b [T, d_out], a [T, d_in]).

    ``gradient`` [d_out, d_in] float32, contiguous: Σ_i G_i is added to it. See csrc/cpu/segmented_kernel.h.
    """
    n, dtypes = len(responses), {x.dtype for pieces in responses for pair in pieces for x in pair}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    held, pieces = [], []  # what had to be copied lives until the call is over
    for response, own in enumerate(responses):
        for pair in own:
            b, a = (_rows(x.to(dtype)) for x in pair)
            held.append((b, a))
            pieces.append((b.data_ptr(), a.data_ptr(), len(b), b.stride(0), a.stride(0), response))
    if direction is not None:
        direction = direction.to(torch.float32).contiguous()
    gram = torch.empty(n, n, dtype=torch.float64)
    dots = None if direction is None else torch.empty(n, dtype=torch.float64)
    _native.segmented(dtype=_CODES[dtype], pieces=pieces, n_responses=n, d_out=shape[0], d_in=shape[1],
                      direction=_address(direction), gradient=_address(gradient), gram=_address(gram),
                      dots=_address(dots), n_threads=torch.get_num_threads(), instruction_set=instruction_set)
    return gram, dots


def fold_rows(x: torch.Tensor, k: int, first: int, salt: int, *, instruction_set: str = "auto") -> torch.Tensor:
    """x [M, d], features ``first`` and on, folded into [M, k] float32 as ``sketch.hashed`` says."""
    x = _rows(x)
    folded = torch.empty(len(x), k)
    _native.fold_rows(dtype=_CODES[x.dtype], x=x.data_ptr(), n_rows=len(x), width=x.shape[1], stride=x.stride(0),
                      first=first, k=k, salt=salt, folded=folded.data_ptr(), n_threads=torch.get_num_threads(),
                      instruction_set=instruction_set)
    return folded


def outer_entries(b: torch.Tensor, a: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, seen: torch.Tensor,
                  size: torch.Tensor) -> None:
    """Add Σ_t b[t, rows] a[t, columns] to ``seen`` [n] float64 and the terms' magnitudes to ``size``."""
    b, a = _rows(b), _rows(a)
    _native.outer_entries(b_dtype=_CODES[b.dtype], b=b.data_ptr(), b_stride=b.stride(0), a_dtype=_CODES[a.dtype],
                          a=a.data_ptr(), a_stride=a.stride(0), n_rows=len(b), rows=rows.data_ptr(),
                          columns=columns.data_ptr(), n_entries=len(rows), seen=seen.data_ptr(), size=size.data_ptr())


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [M, d] with neighbouring columns next to each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
