"""Per-response weight gradients and their inner products, formed while the ordinary weight gradient is.

For a linear layer with inputs a_t and back-propagated b_t, response i has G_i = Σ_{t∈i} b_t a_tᵀ [derived]. A block
of output rows is taken at a time: inner products add over blocks, so a block is all that is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK_BYTES = 4 << 20  # per-response gradients held at a time on a CPU: near its caches
DEVICE_BLOCK_BYTES = 1 << 30  # and on an accelerator: few, large products
Pieces = list[list[tuple[torch.Tensor, torch.Tensor]]]  # per response the (b, a) of each use of the layer


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
    d_out, d_in = shape
    grams, dots = [], []
    for responses in groups:
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
        grams.append(gram)
        dots.append(dot)
    return grams, dots if direction is not None else []


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """total (+)= left @ right, accumulated and kept in the dtype of ``total``; ``first`` overwrites it."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    else:
        product = torch.mm(left, right, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
