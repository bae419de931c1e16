"""Per response, the weighted column sums of ∂ logp/∂ raw: sums[r, v] = Σ_{t∈r} c_t (1[v = y_t] - p_tv) f_tv.

One program owns a block of vocabulary columns and walks the chunk's responses in order, adding each one's tokens to its
row of ``sums``. No other program writes there, so there are no atomics and the result repeats bit for bit; a response
that spans chunks is continued by the next launch. The numerators of ``head_stats`` are relative to an integer offset
of their slice, so one factor per row, with a power of two in it, makes them derivatives: no exponential per entry. The
sampled token's entry is c_t times its own derivative, never one minus a sum. Sums are fp32; a numerator was rounded
once, to the operands' dtype, which is what a matrix product of the derivatives would have done to it.

Work: 2·N·V FLOPs, bound by reading the numerators: 2·N·V bytes for 16-bit operands, 0.6 ms at N = 8192, V = 151936 and
4.3 TB/s; the slices' maxima add 1/32 of that, ``sums`` costs 8·R·V bytes more (0.15 ms at R = 512). Prediction: 1.3
times that: 2374 programs of 8 KiB in flight each, about 8 per multiprocessor, keep the memory busy; the rows' factors
come from the cache. Not yet measured on a GPU.

Weighed and rejected: one program per (response, column block), because the launch cannot know which responses a chunk
holds without asking the device, and R times too many programs would start to exit at once; a matrix product with the
[R, N] segment matrix, because it would round the coefficients too and pad every response to 64 rows.
"""

import itertools

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.config import HEAD_TILE_CANDIDATES, HEAD_TILES

BLOCK_ELEMENTS = 4096  # 8 KiB of 16-bit numerators in flight per program, 32 accumulators a thread
NUM_WARPS = 4


@triton.jit
def column_sums_kernel(numerators, slice_maximum, reference, factor, at_target, tokens, cu_seqlens, responses, sums,
                       first_token, n_rows, n_columns, numerator_stride, BLOCK_ROWS: tl.constexpr,
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
            numerator = tl.load(places, mask=inside[:, None] & inside_columns[None, :], other=0.0).to(tl.float32)
            token = tl.load(tokens + rows, mask=inside, other=-1).to(tl.int32)
            # ceil(-inf) is -inf, and such a slice's numerators are 0.
            offset = tl.ceil(tl.load(slice_maximum + rows, mask=inside, other=float("-inf")))
            scale = tl.exp2(offset - tl.load(reference + rows, mask=inside, other=0.0))
            scale *= tl.load(factor + rows, mask=inside, other=0.0)
            target = tl.load(at_target + rows, mask=inside, other=0.0)
            accumulator += tl.where(token[:, None] == columns[None, :], target[:, None], -scale[:, None] * numerator)
        places = sums + response * n_columns + columns  # response is 64-bit, as its bounds are
        before = tl.load(places, mask=inside_columns, other=0.0)
        tl.store(places, before + tl.sum(accumulator, axis=0), mask=inside_columns)


def column_sums(numerators: torch.Tensor, slice_maximum: torch.Tensor, width: int, reference: torch.Tensor,
                factor: torch.Tensor, at_target: torch.Tensor, tokens: torch.Tensor, cu_seqlens: torch.Tensor,
                responses: torch.Tensor, first_token: int, sums: torch.Tensor) -> None:
    """Add one chunk of C tokens, beginning at token ``first_token`` of the batch, to ``sums`` [R, V] float32.

    Args:
        numerators: [C, V] float of ``head_stats``, any row stride.
        slice_maximum: [slices, C] float32, the first plane of its partials; ``width`` columns make a slice.
        reference: [C] float32, integers (``combine_stats``).
        factor: [C] float32, c_t times what makes a numerator relative to the reference a derivative.
        at_target: [C] float32, c_t ∂ logp/∂ raw_y.
        tokens: [C] int64, adjacent.
        cu_seqlens: [R+1] int64, of the whole batch.
        responses: [2] integer, on the device: first response with a token in the chunk, and one past the last.
    """
    n_rows, n_columns = numerators.shape
    column_sums_kernel[(triton.cdiv(n_columns, width),)](
        numerators, slice_maximum, reference, factor, at_target, tokens, cu_seqlens, responses, sums, first_token,
        n_rows, n_columns, numerators.stride(0), BLOCK_ROWS=BLOCK_ELEMENTS // width, BLOCK_COLUMNS=width,
        num_warps=NUM_WARPS)


def slice_widths() -> list[int]:
    """Every slice width of the configuration."""
    tiles = [tile for (architecture, _), tile in HEAD_TILES.items() if architecture != "interpreter"]
    tiles += itertools.chain.from_iterable(HEAD_TILE_CANDIDATES.values())
    return sorted({shape.slice_columns for tile in tiles for shape in (tile, tile.with_softcap())})


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    signature = {name: "*fp32" for name in ("slice_maximum", "reference", "factor", "at_target", "sums")}
    signature |= {name: "*i64" for name in ("tokens", "cu_seqlens", "responses")}
    signature |= {name: "i32" for name in ("first_token", "n_rows", "n_columns", "numerator_stride")}
    return [
        {"name": f"column_sums {dtype} {width}", "fn": column_sums_kernel,
         "signature": signature | {"numerators": f"*{dtype}"},
         "constexprs": {"BLOCK_ROWS": BLOCK_ELEMENTS // width, "BLOCK_COLUMNS": width}, "num_warps": NUM_WARPS,
         "num_stages": 1, "hot": True, "expects_matrix": False, "divisible_by_16": ("n_columns", "numerator_stride")}
        for dtype in ("bf16", "fp16", "fp32") for width in slice_widths()
    ]
