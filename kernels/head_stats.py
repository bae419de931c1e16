"""Statistics of softmax(hidden @ weight.T) per token and vocabulary slice, without the [N, V] logits.

One program computes a tile of logits on the matrix unit and leaves, per row and column slice of it, the maximum m, Σe,
Σe², Σe·x and, with a soft cap, Σ(e·f)², where x = z - m (base 2), e = 2^x and f is the soft cap's derivative. The
sampled token is held out of all of them and its raw logit written apart, so that nothing is lost when it takes nearly
all of the mass. ``combine_stats`` merges the slices.

On request the softmax numerators 2^(z - ceil(m) + 15)·f are stored too, in the operands' dtype, for ``column_sums``
and ``score_block``. Their offset is an integer, so that bringing slices to a common one multiplies by powers of two
and rounds nothing a second time; their largest lies in (2^14, 2^15], which leaves fp16 39 binary digits below it: what
vanishes there is 2^-40 of the largest entry each, 2e-7 of it over 150,000 entries. The statistics keep m itself: about
an integer above it the entropy of a nearly certain token would be a difference of two numbers near 1.

Work: 2·N·V·D FLOPs. Traffic besides the operands: 16 bytes per row and slice of 64 columns (20 with a soft cap), which
is N·V/4 bytes, and 2·N·V bytes for 16-bit numerators. Floor on an H200 (790 TFLOP/s, bf16), N = 8192: 2.8 ms at
V = 151936, D = 896; 11.3 ms at V = 152064, D = 3584; statistics 0.07 ms, numerators 0.6 ms, both written while other
programs multiply. Prediction: 1.2-1.4 times the floor, because the epilogue (about a dozen instructions per entry, 4 %
of the product at D = 3584, 17 % at D = 896) does not overlap the product of its own program and one program fills a
multiprocessor; 2-3 % more with numerators. Not yet measured on a GPU.

Weighed and rejected: one set of statistics per tile, merged in registers (a quarter of the statistics' traffic, but
the compiler then interleaves the slices and spills 100-500 bytes a thread); a running maximum over many tiles in one
program (the same, for longer); accumulating across programs with atomics (not repeatable); the target inside and
subtracted later (1 - p has no digits); fp32 numerators (a fifth of the product's time in traffic).
"""

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.aot import head_specializations
from rlvr_fast.kernels.config import HeadTile
from rlvr_fast.kernels.logit_tile import (
    LOG2_E,
    NUMERATOR_BITS,
    column_slices,
    operands,
    raw_logits,
    soft_cap,
    tile_options,
    tile_position,
)


@triton.jit
def slice_stats(raw, slice_index, bias, tokens, partials, target_raw, numerators, first_row, n_rows, n_columns,
                plane_stride, numerator_stride, logit_scale, softcap, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Statistics of [BLOCK_ROWS, WIDTH] raw logits, the slice_index-th slice of the vocabulary."""
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = slice_index * WIDTH + tl.arange(0, WIDTH)
    inside_rows = rows < n_rows
    inside_columns = columns < n_columns
    if bias is not None:
        raw += tl.load(bias + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    target = tl.load(tokens + rows, mask=inside_rows, other=-1).to(tl.int32)
    is_target = target[:, None] == columns[None, :]
    target_is_here = (target >= slice_index * WIDTH) & (target < (slice_index + 1) * WIDTH)
    tl.store(target_raw + rows, tl.sum(tl.where(is_target, raw, 0.0), axis=1), mask=target_is_here)

    if softcap is None:
        z = raw * logit_scale
    else:
        capped, slope = soft_cap(raw, softcap)
        z = capped * logit_scale
    z = tl.where(is_target | ~inside_columns[None, :], float("-inf"), z)
    maximum = tl.max(z, axis=1)
    x = z - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]
    e = tl.exp2(x)
    places = partials + slice_index.to(tl.int64) * n_rows + rows
    tl.store(places, maximum, mask=inside_rows)
    tl.store(places + plane_stride, tl.sum(e, axis=1), mask=inside_rows)
    tl.store(places + 2 * plane_stride, tl.sum(e * e, axis=1), mask=inside_rows)
    # 2^-200 is 0 in fp32, so the bound changes nothing except 0 · (-inf).
    tl.store(places + 3 * plane_stride, tl.sum(e * tl.maximum(x, -200.0), axis=1), mask=inside_rows)
    if softcap is not None:
        e *= slope
        tl.store(places + 4 * plane_stride, tl.sum(e * e, axis=1), mask=inside_rows)
    if numerators is not None:
        anchor = tl.where(maximum == float("-inf"), 0.0, maximum)
        e *= tl.exp2(anchor - tl.ceil(anchor) + NUMERATOR_BITS)[:, None]
        places = numerators + rows.to(tl.int64)[:, None] * numerator_stride + columns[None, :]
        inside = inside_rows[:, None] & inside_columns[None, :]
        tl.store(places, e.to(numerators.dtype.element_ty), mask=inside)


@triton.jit
def head_stats_kernel(hidden, weight, bias, tokens, partials, target_raw, numerators, n_rows, n_columns, depth,
                      hidden_stride, weight_stride, plane_stride, numerator_stride, logit_scale, softcap,
                      LOADS: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                      BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
                      SLICES: tl.constexpr):
    row_tile, column_tile = tile_position(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row = row_tile * BLOCK_ROWS
    raw = raw_logits(hidden, weight, first_row, column_tile * BLOCK_COLUMNS, n_rows, n_columns, depth, hidden_stride,
                     weight_stride, LOADS, INPUT_PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH)
    WIDTH: tl.constexpr = BLOCK_COLUMNS // SLICES
    pieces = column_slices(raw, BLOCK_ROWS, BLOCK_COLUMNS, SLICES)
    for i in tl.static_range(SLICES):
        slice_stats(pieces[i], column_tile * SLICES + i, bias, tokens, partials, target_raw, numerators, first_row,
                    n_rows, n_columns, plane_stride, numerator_stride, logit_scale, softcap, BLOCK_ROWS, WIDTH)


def n_slices(n_columns: int, tile: HeadTile) -> int:
    """Slices that a vocabulary of ``n_columns`` has partial statistics for."""
    return triton.cdiv(n_columns, tile.columns) * tile.slices


def head_stats(hidden: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
               temperature: float, softcap: float | None, tile: HeadTile, partials: torch.Tensor,
               target_raw: torch.Tensor, numerators: torch.Tensor | None = None) -> None:
    """Fill ``partials``, ``target_raw`` and ``numerators`` for all rows and the vocabulary entries of ``weight``.

    Args:
        hidden: [N, D], N >= 1; any row stride, elements of a row adjacent.
        tokens: [N] int64, adjacent. An id outside [0, V) is held out of nothing.
        weight: [V, D] in hidden's dtype; any row stride, elements of a row adjacent.
        bias: [V] adjacent, or None.
        partials: [4, or 5 with a soft cap, ``n_slices(V, tile)``, N] float32, each plane adjacent: m, Σe, Σe², Σe·x
            and maybe Σ(e·f)².
        target_raw: [N] float32, receives the sampled token's raw logit where its id is in [0, V).
        numerators: [N, V] float or None, any row stride; 0 at the sampled token.
    """
    n_rows, depth = hidden.shape
    n_columns = weight.shape[0]
    row_tiles, column_tiles = triton.cdiv(n_rows, tile.rows), triton.cdiv(n_columns, tile.columns)
    hidden_operand, weight_operand, loads = operands(hidden, weight, tile)
    head_stats_kernel[(row_tiles * column_tiles,)](
        hidden_operand, weight_operand, bias, tokens, partials, target_raw, numerators, n_rows, n_columns, depth,
        hidden.stride(0), weight.stride(0), partials.stride(0), 0 if numerators is None else numerators.stride(0),
        LOG2_E / temperature, softcap, LOADS=loads, **tile_options(tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages)


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    return head_specializations(
        "head_stats", head_stats_kernel,
        pointers={"tokens": "*i64", "partials": "*fp32", "target_raw": "*fp32", "numerators": None},
        integers=("plane_stride", "numerator_stride"),
        variants=(("", {"numerators": None}), (" numerators", {})))
