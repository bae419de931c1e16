"""A block of ∂ objective/∂ raw logits, recomputed from the hidden states: the left operand of the backward's products.

With log p = z - lse, the derivative of Σ_t (g_t logp_t + k_t H_t) by raw_v is, for v ≠ y,
    -p_v f_v (g + k H + k log p_v),        and at the sampled token v = y        f_y (g · off_mass - k p_y (logp + H)).
The caller folds g, k and H into three numbers per token (``slope``, ``entropy_slope``, ``target``), so one kernel
serves the backward pass of log-prob and entropy, the per-token hidden gradient and the Gram matrices; and the sampled
token's number is built from the off-target mass: it keeps its digits as p_y -> 1, where e_y - p from bf16 would be 0.

Work: 2·N·V·D FLOPs (the second product of a backward pass), 2·N·V bytes written for 16-bit operands. Floor on an H200
at N = 8192, V = 152064, D = 3584: 11.3 ms + 0.6 ms of stores. Prediction: 1.2-1.4 times; the products that consume the
block (hidden and weight gradient) are left to the library, which runs them at the matrix unit's rate. Not yet measured
on a GPU. Weighed and rejected: consuming the block on chip, which would need a [128, D] fp32 accumulator per program
(458 KB at D = 896) or one recomputation per slice of D; filtering entries below the operand's resolution, which is
faster on peaked rows but drops what a gap between two close class means may consist of.
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
def slice_gradient(raw, first_column, bias, tokens, lse, slope, entropy_slope, target, block, first_row, n_rows,
                   n_columns, first_token_id, block_stride, logit_scale, softcap, BLOCK_ROWS: tl.constexpr,
                   WIDTH: tl.constexpr):
    """The derivative for one [BLOCK_ROWS, WIDTH] slice of raw logits."""
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, WIDTH)
    inside_rows = rows < n_rows
    inside_columns = columns < n_columns
    if bias is not None:
        raw += tl.load(bias + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    token = (tl.load(tokens + rows, mask=inside_rows, other=-1) - first_token_id).to(tl.int32)
    row_lse = tl.load(lse + rows, mask=inside_rows, other=0.0)
    row_slope = tl.load(slope + rows, mask=inside_rows, other=0.0)
    row_target = tl.load(target + rows, mask=inside_rows, other=0.0)

    if softcap is None:
        log_p = raw * logit_scale - row_lse[:, None]
    else:
        capped, cap_slope = soft_cap(raw, softcap)
        log_p = capped * logit_scale - row_lse[:, None]
    p = tl.exp2(log_p)
    if entropy_slope is None:
        gradient = -p * row_slope[:, None]
    else:
        row_entropy_slope = tl.load(entropy_slope + rows, mask=inside_rows, other=0.0)
        # 2^-200 is 0 in fp32: the bound is against 0 · (-inf) at entries outside the vocabulary.
        gradient = -p * (row_slope[:, None] + row_entropy_slope[:, None] * tl.maximum(log_p, -200.0))
    gradient = tl.where(token[:, None] == columns[None, :], row_target[:, None], gradient)
    if softcap is not None:
        gradient *= cap_slope
    places = block + rows.to(tl.int64)[:, None] * block_stride + columns[None, :]
    tl.store(places, gradient.to(block.dtype.element_ty), mask=inside_rows[:, None] & inside_columns[None, :])


@triton.jit
def head_gradient_kernel(hidden, weight, bias, tokens, lse, slope, entropy_slope, target, block, n_rows, n_columns,
                         depth, hidden_stride, weight_stride, first_token_id, block_stride, logit_scale, softcap,
                         LOADS: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                         BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
                         SLICES: tl.constexpr):
    row_tile, column_tile = tile_position(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row = row_tile * BLOCK_ROWS
    first_column = column_tile * BLOCK_COLUMNS
    raw = raw_logits(hidden, weight, first_row, first_column, n_rows, n_columns, depth, hidden_stride, weight_stride,
                     LOADS, INPUT_PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH)
    WIDTH: tl.constexpr = BLOCK_COLUMNS // SLICES
    pieces = column_slices(raw, BLOCK_ROWS, BLOCK_COLUMNS, SLICES)
    for i in tl.static_range(SLICES):
        slice_gradient(pieces[i], first_column + i * WIDTH, bias, tokens, lse, slope, entropy_slope, target, block,
                       first_row, n_rows, n_columns, first_token_id, block_stride, logit_scale, softcap, BLOCK_ROWS,
                       WIDTH)


def head_gradient(hidden: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                  temperature: float, softcap: float | None, tile: HeadTile, lse: torch.Tensor, slope: torch.Tensor,
                  entropy_slope: torch.Tensor | None, target: torch.Tensor, first_token_id: int,
                  block: torch.Tensor) -> None:
    """Fill ``block`` [N, W] (the operands' dtype) for vocabulary entries first_token_id .. first_token_id + W.

    Args:
        hidden, tokens, temperature, softcap: as for ``head_stats``.
        weight, bias: [W, D] and [W], that slice of the head.
        lse: [N] float32, log2 of the sum of exponentials, i.e. lse / ln 2.
        slope: [N] float32, the value at v ≠ y is -p_v (slope + entropy_slope · log2 p_v) times the soft cap's slope.
        entropy_slope: [N] float32, or None for 0.
        target: [N] float32, the value at v = y before the soft cap's slope.
    """
    n_rows, depth = hidden.shape
    n_columns = weight.shape[0]
    programs = triton.cdiv(n_rows, tile.rows) * triton.cdiv(n_columns, tile.columns)
    hidden_operand, weight_operand, loads = operands(hidden, weight, tile)
    head_gradient_kernel[(programs,)](
        hidden_operand, weight_operand, bias, tokens, lse, slope, entropy_slope, target, block, n_rows, n_columns,
        depth, hidden.stride(0), weight.stride(0), first_token_id, block.stride(0), LOG2_E / temperature, softcap,
        LOADS=loads, **tile_options(tile), num_warps=tile.num_warps,
        num_stages=tile.num_stages)


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    return head_specializations(
        "head_gradient", head_gradient_kernel,
        pointers={"tokens": "*i64", "lse": "*fp32", "slope": "*fp32", "target": "*fp32", "block": None},
        integers=("first_token_id", "block_stride"),
        variants=(("", {"entropy_slope": None}), (" entropy", {"entropy_slope": "*fp32"})))
