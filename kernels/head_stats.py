"""Statistics of softmax(hidden @ weight.T) per token and vocabulary slice, without the [N, V] logits.

One program computes a tile of logits on the matrix unit and leaves, per row and column slice of it, the maximum m, Σe,
Σe², Σe·x and, with a soft cap, Σ(e·f)², where x = z - m (base 2), e = 2^x and f is the soft cap's derivative. The
sampled token is held out of all of them and its raw logit written apart, so that nothing is lost when it takes nearly
all of the mass. ``combine_stats`` merges the slices. On request e·f is stored too, for ``column_sums``.

Work: 2·N·V·D FLOPs. Traffic besides the operands: 16 bytes per row and slice of 64 columns (20 with a soft cap), which
is N·V/4 bytes, and 4·N·V bytes if e·f is stored. Floor on an H200 (790 TFLOP/s, bf16), N = 8192: 2.8 ms at V = 151936,
D = 896; 11.3 ms at V = 152064, D = 3584; statistics 0.07 ms, storing e·f 1.2 ms. Prediction: 1.2-1.4 times the floor,
because the epilogue (about a dozen instructions per entry, 4 % of the product at D = 3584, 17 % at D = 896) does not
overlap the product of its own program and one program fills a multiprocessor. Not yet measured on a GPU.

Weighed and rejected: one set of statistics per tile, merged in registers (a quarter of the statistics' traffic, but
the compiler then interleaves the slices and spills 100-500 bytes a thread); a running maximum over many tiles in one
program (the same, for longer); accumulating across programs with atomics (not repeatable); the target inside and
subtracted later (1 - p has no digits).
"""

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.aot import head_specializations
from rlvr_fast.kernels.config import HeadTile
from rlvr_fast.kernels.logit_tile import (
    LOG2_E,
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
        places = numerators + rows.to(tl.int64)[:, None] * numerator_stride + columns[None, :]
        tl.store(places, e, mask=inside_rows[:, None] & inside_columns[None, :])


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


def head_stats(hidden: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
               temperature: float, softcap: float | None, tile: HeadTile, target_raw: torch.Tensor,
               numerators: torch.Tensor | None = None) -> torch.Tensor:
    """Partial statistics of the rows: [4 or 5, vocabulary slices, N] float32: m, Σe, Σe², Σe·x and maybe Σ(e·f)².

    Args:
        hidden: [N, D], N >= 1; any row stride, elements of a row adjacent.
        tokens: [N] int64, adjacent.
        weight: [V, D] in hidden's dtype; any row stride, elements of a row adjacent.
        bias: [V] adjacent, or None.
        target_raw: [N] float32, receives the sampled token's raw logit.
        numerators: [N, V] float32 or None, any row stride, receives e·f of each slice, 0 at the sampled token.
    """
    n_rows, depth = hidden.shape
    n_columns = weight.shape[0]
    row_tiles, column_tiles = triton.cdiv(n_rows, tile.rows), triton.cdiv(n_columns, tile.columns)
    partials = torch.empty(4 if softcap is None else 5, column_tiles * tile.slices, n_rows, dtype=torch.float32,
                           device=hidden.device)
    hidden_operand, weight_operand, loads = operands(hidden, weight, tile)
    head_stats_kernel[(row_tiles * column_tiles,)](
        hidden_operand, weight_operand, bias, tokens, partials, target_raw, numerators, n_rows, n_columns, depth,
        hidden.stride(0), weight.stride(0), partials.stride(0), 0 if numerators is None else numerators.stride(0),
        LOG2_E / temperature, softcap, LOADS=loads, **tile_options(tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages)
    return partials


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    return head_specializations(
        "head_stats", head_stats_kernel,
        pointers={"tokens": "*i64", "partials": "*fp32", "target_raw": "*fp32"},
        integers=("plane_stride", "numerator_stride"),
        variants=(("", {"numerators": None}), (" sums", {"numerators": "*fp32"})))
