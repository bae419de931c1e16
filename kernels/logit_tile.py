"""Device functions shared by the kernels that compute a tile of logits: where it lies, its product, its soft cap.

Logits are kept in base 2 (``z2 = z * log2(e)``): the hardware's exponential is 2^x, so folding the factor into the
temperature saves a multiplication per entry.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rlvr_fast.kernels.config import HeadTile

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
NUMERATOR_BITS = tl.constexpr(15)  # stored softmax numerators are at most 2^15: fp16 ends below 2^16


def operands(hidden: torch.Tensor, weight: torch.Tensor, tile: HeadTile) -> tuple:
    """(hidden, weight, LOADS) for ``raw_logits``: tensor descriptors where the tile and the alignment allow."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]
                  for x in (hidden, weight))
    if tile.descriptors and aligned:
        hidden, weight = (TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [size, tile.depth])
                          for x, size in ((hidden, tile.rows), (weight, tile.columns)))
        return hidden, weight, "descriptor"
    return hidden, weight, "even" if hidden.shape[1] % tile.depth == 0 else "masked"


def tile_options(tile: HeadTile) -> dict[str, int | str]:
    """Compile-time arguments that every kernel over tiles of logits takes from the configuration."""
    return {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth, "GROUP": tile.group,
            "SLICES": tile.slices, "INPUT_PRECISION": tile.input_precision}


@triton.jit
def tile_position(n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles are walked before the next column tile."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(n_rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(n_columns, BLOCK_COLUMNS)
    first_row_tile = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_row_tile, GROUP)
    within = program % (GROUP * column_tiles)
    return first_row_tile + within % height, within // height


@triton.jit
def raw_logits(hidden, weight, first_row, first_column, n_rows, n_columns, depth, hidden_stride, weight_stride,
               LOADS: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
               BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """hidden @ weight.T for one tile, fp32. What lies past the last row or column is arbitrary: callers mask.

    LOADS: "descriptor" if hidden and weight are tensor descriptors of [BLOCK_ROWS or BLOCK_COLUMNS, BLOCK_DEPTH]
    blocks; else they are pointers, and "even" says that depth is a multiple of BLOCK_DEPTH, "masked" that it is not.
    """
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    if LOADS == "descriptor":
        for start in range(0, depth, BLOCK_DEPTH):
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start])
            accumulator = tl.dot(a, b.T, accumulator, input_precision=INPUT_PRECISION)
    else:
        # Past the end the last row or column is read again. One 64-bit offset per tile (N·D and V·D may pass 2^31),
        # 32-bit ones inside it.
        rows = tl.minimum(tl.arange(0, BLOCK_ROWS), n_rows - 1 - first_row)
        columns = tl.minimum(tl.arange(0, BLOCK_COLUMNS), n_columns - 1 - first_column)
        steps = tl.arange(0, BLOCK_DEPTH)
        hidden_tile = hidden + first_row.to(tl.int64) * hidden_stride
        weight_tile = weight + first_column.to(tl.int64) * weight_stride
        hidden_pointers = hidden_tile + (rows[:, None] * hidden_stride + steps[None, :])
        weight_pointers = weight_tile + (columns[None, :] * weight_stride + steps[:, None])
        for start in range(0, depth, BLOCK_DEPTH):
            if LOADS == "even":
                a = tl.load(hidden_pointers)
                b = tl.load(weight_pointers)
            else:
                inside = steps < depth - start
                a = tl.load(hidden_pointers, mask=inside[None, :], other=0.0)
                b = tl.load(weight_pointers, mask=inside[:, None], other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)
            hidden_pointers += BLOCK_DEPTH
            weight_pointers += BLOCK_DEPTH
    return accumulator


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(left, right) half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def column_slices(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """The tile's columns in SLICES (1, 2, 4 or 8) equal slices, left to right.

    Epilogues work slice by slice: on the whole accumulator at once they need more registers than there are. Every
    matrix-unit layout keeps the top column bits in a thread's registers or in tensor memory, so this moves no data.
    """
    slices = (tile,)
    if SLICES >= 2:
        slices = halves(tile, ROWS, COLUMNS)
    if SLICES >= 4:
        slices = halves(slices[0], ROWS, COLUMNS // 2) + halves(slices[1], ROWS, COLUMNS // 2)
    if SLICES >= 8:
        slices = (halves(slices[0], ROWS, COLUMNS // 4) + halves(slices[1], ROWS, COLUMNS // 4)
                  + halves(slices[2], ROWS, COLUMNS // 4) + halves(slices[3], ROWS, COLUMNS // 4))
    return slices


@triton.jit
def soft_cap(raw, cap):
    """(cap · tanh(raw / cap), its derivative 1 - tanh²). An entry at -inf is out of the vocabulary and stays there.

    With u = e^(-2|raw / cap|), tanh is (1 - u) / (1 + u) up to its sign, and the derivative is 4u / (1 + u)², which
    keeps its digits where 1 - tanh² loses them. Near 0, where 1 - u loses them, tanh is its series.
    """
    u = tl.exp2(tl.abs(raw) * (-2.8853900817779268 / cap))
    ratio = 1.0 / (1.0 + u)
    share = raw * (1.0 / cap)
    square = share * share
    series = -0.333333333 + square * (0.133333333 + square * (-0.0539682540 + square * 0.0218694885))
    far = (cap - cap * u) * ratio
    capped = tl.where(square < 0.09, raw + raw * square * series, tl.where(raw < 0, -far, far))
    return tl.where(raw == float("-inf"), raw, capped), 4.0 * u * ratio * ratio
