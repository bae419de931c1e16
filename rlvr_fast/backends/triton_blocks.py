"""What the Triton operations are made of: chunks of tokens with their numerators, blocks of derivatives, products.

Every buffer is bounded by ``config.CHUNK_BYTES`` whatever N and V are, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.head import Head
from rlvr_fast.kernels.combine_stats import N_RESULTS, combine_stats
from rlvr_fast.kernels.config import HeadTile, chunk_size, chunks, head_tile
from rlvr_fast.kernels.head_gradient import head_gradient
from rlvr_fast.kernels.head_stats import head_stats, n_slices
from rlvr_fast.kernels.logit_tile import LOG2_E

# Tokens per block of derivatives where a block need not hold them all: more mean fewer passes over the gradients.
BLOCK_ROWS = 16384
# Derivatives are scaled by powers of two to at most this: fp16 ends below 2^16.
LARGEST = 2.0**15
# Output tile of the library's products on Hopper, and into how many parts a product's inner dimension is cut at most.
PRODUCT_TILE = (128, 256)
MOST_PARTS = 32


@dataclass(frozen=True)
class Operands:
    """hidden [N, D], weight [V, D] and bias [V] with adjacent elements in each row, and the tile that serves them.

    ``dtype`` is the caller's: what derivatives are rounded to. ``vocabulary_size`` is V, or that of the largest shard,
    so that every rank cuts its chunks alike.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    softcap: float | None
    dtype: torch.dtype
    tile: HeadTile
    vocabulary_size: int

    @classmethod
    def of(cls, hidden: torch.Tensor, head: Head, merge: Merge | None = None) -> Operands:
        dtype, weight = hidden.dtype, head.weight
        hidden, weight = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (hidden, weight))
        if hidden.device.type == "cpu" and dtype == torch.bfloat16:
            # Triton's interpreter multiplies the bit patterns of bf16 operands; fp32 holds them and their products
            # exactly.
            hidden, weight = hidden.float(), weight.float()
        largest = len(weight) if merge is None else merge.largest_shard
        tile = head_tile(hidden.device, hidden.dtype, head.softcap, (len(hidden), largest, hidden.shape[1]))
        return cls(hidden, weight, None if head.bias is None else head.bias.contiguous(), head.temperature,
                   head.softcap, dtype, tile, largest)

    def new_partials(self, n_rows: int) -> torch.Tensor:
        """Room for ``head_stats`` of that many rows."""
        return torch.empty(4 if self.softcap is None else 5, n_slices(len(self.weight), self.tile), n_rows,
                           dtype=torch.float32, device=self.hidden.device)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of partial statistics per token."""
        return 20 * n_slices(self.vocabulary_size, self.tile)

    def statistics(self, rows: slice, columns: slice, tokens: torch.Tensor, partials: torch.Tensor,
                   target_raw: torch.Tensor, numerators: torch.Tensor | None) -> None:
        """``head_stats`` of a rectangle; ``tokens`` [rows] count from the first column."""
        bias = None if self.bias is None else self.bias[columns]
        head_stats(self.hidden[rows], tokens, self.weight[columns], bias, self.temperature, self.softcap, self.tile,
                   partials, target_raw, numerators)

    def token_pass(self, rows: slice, tokens: torch.Tensor, results: torch.Tensor,
                   numerators: torch.Tensor | None = None) -> torch.Tensor:
        """Fill ``results`` [9, rows] (``combine_stats``) and ``numerators``; returns the slices' maxima."""
        n_rows = rows.stop - rows.start
        target_raw = torch.empty(n_rows, dtype=torch.float32, device=tokens.device)
        partials = self.new_partials(n_rows)
        self.statistics(rows, slice(0, len(self.weight)), tokens[rows], partials, target_raw, numerators)
        combine_stats(partials, tokens[rows], target_raw, self.temperature, self.softcap, results)
        return partials[0]


@dataclass(frozen=True)
class NumeratorChunk:
    """The numerators of some tokens, and what makes them derivatives of the whole vocabulary's softmax.

    p_v f_v / temperature = numerator · 2^(ceil(slice maximum) - reference) · factor for v ≠ y.

    Attributes:
        numerators: [C, V] in the operands' dtype. slice_maximum: [slices, C] float32.
        reference, factor: [C] float32. off_mass: [C] float32, of the whole vocabulary.
        target_slope: [C] float32, f_y / temperature; 0 where the sampled token is in another shard.
    """

    rows: slice
    numerators: torch.Tensor
    slice_maximum: torch.Tensor
    reference: torch.Tensor
    factor: torch.Tensor
    off_mass: torch.Tensor
    target_slope: torch.Tensor


def numerator_chunks(operands: Operands, tokens: torch.Tensor, rows_per_chunk: int, results: torch.Tensor,
                     merge: Merge | None) -> Iterator[NumeratorChunk]:
    """Chunks of tokens in one reused buffer; fills ``results`` [6, N], the fields of TokenPass, merged if asked."""
    n_tokens, vocabulary = len(operands.hidden), len(operands.weight)
    buffer = aligned_rows(min(rows_per_chunk, n_tokens), vocabulary, operands.dtype, tokens.device)
    for start, end in chunks(n_tokens, rows_per_chunk):
        rows, numerators = slice(start, end), buffer[: end - start, :vocabulary]
        own = torch.empty(N_RESULTS, end - start, dtype=torch.float32, device=tokens.device)
        slice_maximum = operands.token_pass(rows, tokens, own, numerators)
        merged, factor = merged_pass(own, merge)
        results[:, rows] = merged
        yield NumeratorChunk(rows, numerators, slice_maximum, own[6], factor, merged[5], own[8])


def merged_pass(own: torch.Tensor, merge: Merge | None) -> tuple[torch.Tensor, torch.Tensor]:
    """([6, C] TokenPass of the whole vocabulary, [C] factor) from this shard's ``combine_stats`` results."""
    if merge is None:
        return own[:6], own[7]
    token_pass, share = merge(TokenPass(*own[:6].unbind(0)))
    return torch.stack(list(token_pass)), own[7] * share


def gradient_blocks(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, lse: torch.Tensor, slope: torch.Tensor,
                    entropy_slope: torch.Tensor | None, target: torch.Tensor, *, all_rows: bool = False,
                    max_width: int | None = None) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(tokens, vocabulary entries, ``head_gradient`` of them), in one reused buffer of at most CHUNK_BYTES."""
    n_tokens = len(hidden)
    if n_tokens == 0:
        return
    operands = Operands.of(hidden, head)
    weight, bias, tile = operands.weight, operands.bias, operands.tile
    height = n_tokens if all_rows else min(n_tokens, BLOCK_ROWS)
    width = chunk_size(len(weight), height * operands.dtype.itemsize, tile.columns)
    width = min(width, len(weight), max_width or width)
    buffer = aligned_rows(height, width, operands.dtype, hidden.device)
    lse = lse * LOG2_E
    for top, bottom in chunks(n_tokens, height):
        rows = slice(top, bottom)
        for start, end in chunks(len(weight), width):
            columns = slice(start, end)
            block = buffer[: bottom - top, : end - start]
            head_gradient(operands.hidden[rows], tokens[rows], weight[columns], None if bias is None else bias[columns],
                          head.temperature, head.softcap, tile, lse[rows], slope[rows],
                          None if entropy_slope is None else entropy_slope[rows], target[rows], start, block)
            yield rows, columns, block


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, or one per batch entry, with fp32 accumulation and an fp32 result."""
    if a.is_cuda and a.dtype != torch.float32:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def long_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``product`` of matrices whose result has too few tiles for the chip: its long inner dimension is cut into parts.

    A product of 8 x 14 tiles keeps 112 of 132 multiprocessors at work, seven of a seventh of the length keep all. Parts
    of one shape on one chip are always the same, so the result repeats bit for bit.
    """
    parts = _parts(ceil(len(a) / PRODUCT_TILE[0]) * ceil(b.shape[1] / PRODUCT_TILE[1]), processors(a.device))
    width = a.shape[1] // (16 * parts) * 16  # 16: so that every part is aligned
    if parts == 1 or width == 0:
        return product(a, b)
    whole = parts * width
    result = product(a[:, :whole].unflatten(1, (parts, width)).transpose(0, 1),
                     b[:whole].unflatten(0, (parts, width))).sum(0)
    return result if whole == a.shape[1] else result.add_(product(a[:, whole:], b[whole:]))


def split_terms(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms [3, R, K] of a 16-bit ``dtype``, scale [R]) with values = scale · Σ terms to fp32's own 24 bits.

    Each term holds what the ones before it left over; scales are powers of two that bring a row's largest entry to
    LARGEST, so that fp16 keeps what is 2^-39 of it.
    """
    largest = values.abs().amax(1).clamp_min(2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    rest = values / scale[:, None]
    terms = torch.empty(3, *values.shape, dtype=dtype, device=values.device)
    for term in terms:
        term.copy_(rest)
        rest = rest - term
    return terms, scale


def _parts(tiles: int, n_processors: int) -> int:
    """The fewest parts with which all but a tenth of the multiprocessors' time is used; at most MOST_PARTS."""
    def used(parts: int) -> float:
        waves = tiles * parts / n_processors
        return waves / ceil(waves)

    return next((parts for parts in range(1, MOST_PARTS) if used(parts) > 0.9), MOST_PARTS)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_two(bounds: torch.Tensor) -> torch.Tensor:
    """A power of two that brings the largest of ``bounds`` to at most LARGEST; stays on the device."""
    if len(bounds) == 0:
        return bounds.new_ones(())
    return torch.exp2(torch.floor(torch.log2(LARGEST / bounds.amax().clamp_min(2.0**-100))))


def aligned_rows(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n_rows, >= n_columns]: every row begins at a multiple of 16 elements, so that it moves in 16-byte pieces."""
    return torch.empty(n_rows, -(-n_columns // 16) * 16, dtype=dtype, device=device)
