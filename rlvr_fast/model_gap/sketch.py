"""Two-sided CountSketch of per-response gradients: linear in the tokens, so prompts may be split in any way.

A weight [d_out, d_in] is folded into [k_out, k_in] by Ĝ = R_oᵀ G R_i, where R has one entry ±1 per row at a hashed
column: E⟨Ĝ_i, Ĝ_j⟩ = ⟨G_i, G_j⟩. The relative variance of ‖Ĝ‖² [derived] is at most 2 (1/k_o + 1/k_i + 1/(k_o k_i)) /
r₄ + 2/(k_o k_i) with r₄ = ‖G‖_F⁴ / ‖G Gᵀ‖_F² (1 for a single token, at most the rank), and near it in wide layers
without a dominant row or column. Signs and columns are a stateless hash of (seed, parameter, side, feature id): any
shard, tile or rank draws the same ones.
"""

from __future__ import annotations

import zlib

import torch

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit unsigned number."""
    return value - (1 << 64) if value >> 63 else value


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijective mix of int64 bits (the finaliser of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_shift(x, shift)) * _signed(factor)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: torch.Tensor, shift: int) -> torch.Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def hashed(ids: torch.Tensor, k: int, seed: int, name: str, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Column in [0, k) int64 and sign ±1 float32 of each feature id [d]."""
    salt = (seed * 0x9E3779B97F4A7C15 + zlib.crc32(f"{name}/{side}".encode()) * 0xD1B54A32D192ED03) & _MASK
    bits = _mixed(_mixed(ids.long() + _signed(salt)) + 1)
    return (bits & 0x7FFFFFFF) % k, 1.0 - 2.0 * (_logical_shift(bits, 40) & 1).float()


class Fold:
    """The map R [d, k] of one side of one parameter; the identity where d ≤ k, which loses nothing."""

    def __init__(self, d: int, k: int, *, seed: int, name: str, side: str, device: torch.device) -> None:
        self.k = min(d, k)
        if d <= k:
            columns, signs = torch.arange(d, device=device), torch.ones(d, device=device)
        else:
            columns, signs = hashed(torch.arange(d, device=device), k, seed, name, side)
        self.matrix = torch.zeros(d, self.k, device=device)
        self.matrix.scatter_(1, columns[:, None], signs[:, None])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d] -> [..., k]: float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype) @ self.matrix.to(dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The image of the unit vectors of ``ids`` [M] -> [M, k]."""
        return self.matrix[ids].to(torch.promote_types(dtype, torch.float32))
