"""Per response, the weighted column sums of ∂ logp/∂ raw: sums[r, v] = Σ_{t∈r} c_t (1[v = y_t] - p_tv) f_tv.

One program owns a block of vocabulary columns and walks the chunk's responses in order, adding each one's tokens to its
row of ``sums``. No other program writes there, so there are no atomics and the result repeats bit for bit; a response
that spans chunks is continued by the next launch. The numerators of ``head_stats`` are relative to their slice's
maximum, so one factor per row, c_t · off_mass / (S·T) · 2^(m - M), makes them probabilities: no exponential per entry.
The sampled token's entry is c_t times its own derivative, never one minus a sum.

Work: 2·N·V FLOPs, bound by reading the numerators: 4·N·V bytes as fp32, 1.2 ms at N = 8192, V = 151936 and 4.3 TB/s;
``sums`` costs 8·R·V bytes more (0.15 ms at R = 512). Prediction: 1.2 times that: 2374 programs of 8 KiB in flight
each, 16 per multiprocessor, keep the memory busy; the rows' factors add a ninth, from the cache. Not yet measured on a
GPU.

Weighed and rejected: one program per (response, column block), because the launch cannot know which responses a chunk
holds without asking the device, and R times too many programs would start to exit at once; a matrix product with the
[R, N] segment matrix, because fp32 products leave the matrix unit and bf16 ones round the probabilities.
"""

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.config import HEAD_TILES

BLOCK_ELEMENTS = 2048  # 8 KiB in flight per program, 16 accumulators a thread


@triton.jit
def column_sums_kernel(numerators, slice_maximum, maximum, others, target_draw, tokens, coefficients, cu_seqlens,
                       responses, sums, first_token, n_rows, n_columns, numerator_stride, BLOCK_ROWS: tl.constexpr,
                       BLOCK_COLUMNS: tl.constexpr):
    index = tl.program_id(0)
    columns = index * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside_columns = columns < n_columns
    slice_maximum += index.to(tl.int64) * n_rows

    for response in range(tl.load(responses), tl.load(responses + 1)):
        begin = tl.maximum(tl.load(cu_seqlens + response) - first_token, 0).to(tl.int32)
        end = tl.minimum(tl.load(cu_seqlens + response + 1) - first_token, n_rows).to(tl.int32)
        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for start in range(begin, end, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            inside = rows < end
            places = numerators + rows.to(tl.int64)[:, None] * numerator_stride + columns[None, :]
            numerator = tl.load(places, mask=inside[:, None] & inside_columns[None, :], other=0.0)
            token = tl.load(tokens + rows, mask=inside, other=-1).to(tl.int32)
            coefficient = tl.load(coefficients + rows, mask=inside, other=0.0)
            highest = tl.load(slice_maximum + rows, mask=inside, other=float("-inf"))
            overall = tl.load(maximum + rows, mask=inside, other=0.0)
            scale = tl.exp2(highest - tl.where(overall == float("-inf"), 0.0, overall))
            factor = -coefficient * tl.load(others + rows, mask=inside, other=0.0) * scale
            at_target = coefficient * tl.load(target_draw + rows, mask=inside, other=0.0)
            entry = tl.where(token[:, None] == columns[None, :], at_target[:, None], factor[:, None] * numerator)
            accumulator += entry
        places = sums + response * n_columns + columns  # response is 64-bit, as its bounds are
        before = tl.load(places, mask=inside_columns, other=0.0)
        tl.store(places, before + tl.sum(accumulator, axis=0), mask=inside_columns)


def column_sums(numerators: torch.Tensor, slice_maximum: torch.Tensor, width: int, row_results: torch.Tensor,
                tokens: torch.Tensor, coefficients: torch.Tensor, cu_seqlens: torch.Tensor, responses: torch.Tensor,
                first_token: int, sums: torch.Tensor) -> None:
    """Add one chunk of C tokens, beginning at token ``first_token`` of the batch, to ``sums`` [R, V] float32.

    Args:
        numerators: [C, V] float32 of ``head_stats``, any row stride.
        slice_maximum: [slices, C] float32, the first plane of its partials; ``width`` columns make a slice.
        row_results: [3, C] float32, the last three rows of ``combine_stats``.
        tokens, coefficients: [C] int64 and float32, adjacent.
        cu_seqlens: [R+1] int64, of the whole batch.
        responses: [2] integer, on the device: first response with a token in the chunk, and one past the last.
    """
    n_rows, n_columns = numerators.shape
    maximum, others, target_draw = row_results.unbind(0)
    column_sums_kernel[(triton.cdiv(n_columns, width),)](
        numerators, slice_maximum, maximum, others, target_draw, tokens, coefficients, cu_seqlens, responses, sums,
        first_token, n_rows, n_columns, numerators.stride(0), BLOCK_ROWS=BLOCK_ELEMENTS // width,
        BLOCK_COLUMNS=width, num_warps=4)


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    signature = {name: "*fp32" for name in ("numerators", "slice_maximum", "maximum", "others", "target_draw",
                                            "coefficients", "sums")}
    signature |= {name: "*i64" for name in ("tokens", "cu_seqlens", "responses")}
    signature |= {name: "i32" for name in ("first_token", "n_rows", "n_columns", "numerator_stride")}
    tiles = [tile for (architecture, _), tile in HEAD_TILES.items() if architecture != "interpreter"]
    return [
        {"name": f"column_sums {width}", "fn": column_sums_kernel, "signature": signature,
         "constexprs": {"BLOCK_ROWS": BLOCK_ELEMENTS // width, "BLOCK_COLUMNS": width}, "num_warps": 4, "num_stages": 1,
         "hot": True, "expects_matrix": False, "divisible_by_16": ("n_columns", "numerator_stride")}
        for width in sorted({shape.slice_columns for tile in tiles for shape in (tile, tile.with_softcap())})
    ]
