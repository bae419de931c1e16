"""The numerators of ``head_stats`` turned, in place, into a block of ∂ logp/∂ raw up to one factor per row.

Per row and slice one power of two brings the numerators from the slice's offset to the row's common reference, which
rounds nothing (what falls below the dtype's smallest number apart), and the sampled token's entry is put in. The block
is the left operand of the second product of a hidden gradient, block @ W, and both operands of the token pairs behind a
head-weight Gram matrix; the row factors are applied to these products, in fp32.

Traffic: 2·N·V bytes read and 2·N·V written for 16-bit operands: 1.2 ms at N = 8192, V = 152064 and 4.3 TB/s, a
twentieth of the two products at D = 3584. Prediction: 1.2 times that: every program moves 64 rows of 128 bytes each
way, its neighbours the adjoining slices. Not yet measured on a GPU.

Weighed and rejected: scaling the left operand in the registers of a second product of our own. It saves this sweep
(5 % of the two products), and costs the operand's way through registers (16 packed multiplications and 8 shared-memory
loads a thread and step of 64, hidden behind 1024 cycles of matrix unit, but the unit then waits for the registers) and
the distance between a Triton product and the library's, 10-20 % of the second product: a loss of one to two
milliseconds for a gain of one. A chunk small enough for the L2 cache (128 rows of 152064 fill it) would read the
weight 64 times. Left for a measurement to justify: choosing each row's reference before the first product, from its
sampled token's logit. bf16 and fp32 span 2^±126, so nearly every slice could use it as it is and only outliers would
need this sweep.
"""

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.column_sums import slice_widths

BLOCK_ELEMENTS = 4096
NUM_WARPS = 4


@triton.jit
def score_block_kernel(block, slice_maximum, reference, tokens, at_target, n_rows, n_columns, block_stride,
                       BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    n_slices = tl.cdiv(n_columns, WIDTH)
    index = tl.program_id(0) % n_slices
    rows = tl.program_id(0) // n_slices * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = index * WIDTH + tl.arange(0, WIDTH)
    inside_rows = rows < n_rows
    inside = inside_rows[:, None] & (columns < n_columns)[None, :]
    places = block + rows.to(tl.int64)[:, None] * block_stride + columns[None, :]
    numerator = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    maximum = tl.load(slice_maximum + index.to(tl.int64) * n_rows + rows, mask=inside_rows, other=float("-inf"))
    # ceil(-inf) is -inf, and such a slice's numerators are 0.
    scale = tl.exp2(tl.ceil(maximum) - tl.load(reference + rows, mask=inside_rows, other=0.0))
    entry = -scale[:, None] * numerator
    if at_target is not None:
        token = tl.load(tokens + rows, mask=inside_rows, other=-1).to(tl.int32)
        target = tl.load(at_target + rows, mask=inside_rows, other=0.0)
        entry = tl.where(token[:, None] == columns[None, :], target[:, None], entry)
    tl.store(places, entry.to(block.dtype.element_ty), mask=inside)


def score_block(block: torch.Tensor, slice_maximum: torch.Tensor, width: int, reference: torch.Tensor,
                tokens: torch.Tensor, at_target: torch.Tensor | None) -> None:
    """Replace numerators n of a slice with maximum m by -n·2^(ceil(m) - reference), the target's by ``at_target``.

    Args:
        block: [C, V] float of ``head_stats``, any row stride.
        slice_maximum: [slices, C] float32, the first plane of its partials; ``width`` columns make a slice.
        reference: [C] float32, integers, at least every slice's ceil(m).
        tokens: [C] int64, adjacent; an id outside [0, V) has no entry.
        at_target: [C] float32, or None to leave the sampled token at 0.
    """
    n_rows, n_columns = block.shape
    rows = BLOCK_ELEMENTS // width
    score_block_kernel[(triton.cdiv(n_columns, width) * triton.cdiv(n_rows, rows),)](
        block, slice_maximum, reference, tokens, at_target, n_rows, n_columns, block.stride(0), BLOCK_ROWS=rows,
        WIDTH=width, num_warps=NUM_WARPS)


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    signature = {name: "*fp32" for name in ("slice_maximum", "reference", "at_target")} | {"tokens": "*i64"}
    signature |= {name: "i32" for name in ("n_rows", "n_columns", "block_stride")}
    return [
        {"name": f"score_block {dtype} {width}", "fn": score_block_kernel,
         "signature": signature | {"block": f"*{dtype}"},
         "constexprs": {"BLOCK_ROWS": BLOCK_ELEMENTS // width, "WIDTH": width}, "num_warps": NUM_WARPS,
         "num_stages": 1, "hot": True, "expects_matrix": False, "divisible_by_16": ("n_columns", "block_stride")}
        for dtype in ("bf16", "fp16", "fp32") for width in slice_widths()
    ]
