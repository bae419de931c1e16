"""Per-response weight gradients and their inner products, formed while the ordinary weight gradient is.

For a linear layer with inputs a_t and back-propagated b_t, response i has G_i = Σ_{t∈i} b_t a_tᵀ [derived]. A block
of output rows is taken at a time: inner products add over blocks, so a block is all that is ever stored.

Cost of a layer beyond the weight gradient that a step forms anyway, 2 M d_out d_in FLOP (M tokens): n + 1 over 2 T of
it for the inner products (n responses of T tokens: 3.5 % at 8 × 128, about 1.2 % of a step), plus what products of
depth T lose against one of depth M. Bytes: the factors once more, nothing of size n d_out d_in. Two ways:

- on a CPU with AVX2 or AVX-512 one native sweep (csrc/cpu/segmented_kernel.h): register tiles of one response after
  the other, inner products and sum over responses out of L1 and L2;
- elsewhere, and for float64, torch's products block by block. Measured on one core of an EPYC (Zen 5, float32, MKL):
  segmented 1.22 times a plain step, because products of depth 128 and the Gram of the blocks run below MKL's 88
  GFLOP/s of one long product, and the Gram reads every block from L2 or beyond.

Native, same core, 8 × 128 tokens, Gram and sum included, GFLOP/s of the weight gradient at (d_out, d_in) = (384, 384),
(1024, 384), (384, 1024), (8192, 384): AVX-512 137, 160, 137, 147; AVX2 72, 84, 73, 89; MKL's plain product 90, 88, 87,
80; 128-bit vectors 33 (not used). The inner loop alone reaches 225; packing takes 7 % of the sweep, 12 % where rows are
32 KB apart (20 % without the prefetch). MKL runs at half of what this processor does with AVX-512, as if it took its
AVX2 kernels on AMD: there segmented beats the plain step's own weight gradient. Where torch's product has AVX-512 at
full rate expect the share above and the loss of depth instead. Rejected: torch blocks of 64 output rows, to keep their
Gram in L2 (66 to 76 GFLOP/s, not 78 to 87 as of whole pieces).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlvr_fast.model_gap import native

BLOCK_BYTES = 4 << 20  # per-response gradients held at a time on a CPU: near its caches
DEVICE_BLOCK_BYTES = 1 << 30  # and on an accelerator: few, large products
Pieces = list[list[tuple[torch.Tensor, torch.Tensor]]]  # per response the (b, a) of each use of the layer


def device_products(b: torch.Tensor, a: torch.Tensor, n_responses: int) -> Callable[..., Any] | None:
    """``triton_segmented.prompt_products`` where the Triton kernel serves these operands, else None."""
    if not b.is_cuda:
        return None
    try:
        from rlvr_fast.backends import triton_segmented
    except ImportError:  # no triton
        return None
    return triton_segmented.prompt_products if triton_segmented.supported(b, a, n_responses) else None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def segmented_gram(groups: Sequence[Pieces], shape: tuple[int, int], direction: torch.Tensor | None = None,
                   gradient: torch.Tensor | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inner products of the responses' gradients of one weight, prompt by prompt.

    Args:
        groups: per prompt and response the pieces b [T, d_out], a [T, d_in] whose products b.T @ a add up to G_i.
        shape: (d_out, d_in).
        direction: [d_out, d_in], inner products with it are wanted too.
        gradient: [d_out, d_in] in the accumulation dtype; Σ_i G_i is added to it.

    Returns:
        per prompt ⟨G_i, G_j⟩ [n, n] float64, and ⟨direction, G_i⟩ [n] float64 (empty list without a direction).
    """
    grams: list[torch.Tensor] = []
    dots: list[torch.Tensor] = []
    for responses in groups:
        some = responses[0][0][0]
        if native.serves(some):
            gram, dot = native.segmented_gram(responses, shape, direction, gradient)
        else:
            gram, dot = _in_blocks(responses, shape, direction, gradient)
        grams.append(gram)
        if dot is not None:
            dots.append(dot)
    return grams, dots


def _in_blocks(responses: Pieces, shape: tuple[int, int], direction: torch.Tensor | None,
               gradient: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One prompt's products a block of output rows at a time, all torch's."""
    d_out, d_in = shape
    n = len(responses)
    some = responses[0][0][0]
    dtype = accumulation_dtype(some.dtype)
    if not some.is_cuda:  # there the products take half-precision factors as they are
        responses = [[(b.to(dtype), a.to(dtype)) for b, a in pieces] for pieces in responses]
    budget = BLOCK_BYTES if some.device.type == "cpu" else DEVICE_BLOCK_BYTES
    rows = max(1, min(d_out, budget // (n * d_in * dtype.itemsize)))
    gram = torch.zeros(n, n, dtype=torch.float64, device=some.device)
    dot = torch.zeros(n, dtype=torch.float64, device=some.device)
    store = torch.empty(n, rows, d_in, dtype=dtype, device=some.device)
    for start in range(0, d_out, rows):
        block = store[:, :min(rows, d_out - start)]
        stop = start + block.shape[1]
        for own, pieces in zip(block, responses, strict=True):
            for use, (b, a) in enumerate(pieces):
                _add_product(own, b[:, start:stop].T, a, first=use == 0)
        flat = block.reshape(n, -1)
        gram += (flat @ flat.T).double()
        if direction is not None:
            dot += (flat @ direction[start:stop].reshape(-1).to(dtype)).double()
        if gradient is not None:
            gradient[start:stop] += block.sum(0)
    return gram, None if direction is None else dot


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """total (+)= left @ right, accumulated and kept in the dtype of ``total``; ``first`` overwrites it."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    else:
        product = torch.mm(left, right, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
