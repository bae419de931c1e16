"""Inner products of per-response weight gradients without the gradients: a tiled Gram over the tokens of a prompt.

⟨G_i, G_j⟩ = Σ_{t∈i, s∈j} ⟨b_t, b_s⟩⟨a_t, a_s⟩ [derived]; M² (d_in + d_out) multiply-adds for a prompt of M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlvr_fast.model_gap.segmented import Pieces, accumulation_dtype

TILE_BYTES = 8 << 20  # token-by-token products held at a time


def ghost_gram(groups: Sequence[Pieces], direction: torch.Tensor | None = None
               ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As ``segmented_gram``, from the tokens of each prompt."""
    grams, dots = [], []
    for responses in groups:
        n = len(responses)
        pairs = [pair for pieces in responses for pair in pieces]
        dtype = accumulation_dtype(pairs[0][0].dtype)
        b, a = (torch.cat([pair[side] for pair in pairs]).to(dtype) for side in range(2))
        member = torch.zeros(len(b), n, dtype=dtype, device=b.device)
        stop = 0
        for which, pieces in enumerate(responses):
            start, stop = stop, stop + sum(len(piece[0]) for piece in pieces)
            member[start:stop, which] = 1.0
        gram = torch.zeros(n, n, dtype=torch.float64, device=b.device)
        tile = max(1, TILE_BYTES // max(1, len(b) * dtype.itemsize))
        for start in range(0, len(b), tile):
            rows = slice(start, start + tile)
            products = (b[rows] @ b.T).mul_(a[rows] @ a.T)
            gram += (member[rows].T @ (products @ member)).double()
        grams.append(gram)
        if direction is not None:
            along = ((a @ direction.to(dtype).T) * b).sum(1)
            dots.append((member.T @ along).double())
    return grams, dots
