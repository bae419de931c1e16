"""Weight gradient of a linear layer and the inner products of its per-response parts, in one sweep over the tokens.

Response i has G_i = Σ_{t∈i} b_t a_tᵀ. One program owns a tile of the weight and takes a prompt's responses one after
the other: tokens through the matrix unit into one accumulator, which goes to the program's own stash when the response
ends. At the end of the prompt the stash, [n, tile], is read back once, in chunks: its column sums are added to the
weight gradient, and the chunk times its own transpose to the prompt's Gram matrix. So no more than one prompt's tiles
are held per program in flight, whatever R, d_out and d_in are. Nothing is added atomically: a program adds its tiles in
a fixed order, in float64, and the caller adds the programs, so one device repeats the result bit for bit.

16-bit operands: the stash is float32, so the weight gradient keeps the accumulator's digits. For the Gram matrix a
chunk is split into two bf16 terms, x = h + l up to 2^-18 |x|; h·hᵀ + h·lᵀ + l·hᵀ leaves out l·lᵀ, at most 2^-18 of
‖G_i‖ ‖G_j‖. float32 operands are multiplied as they are, without the matrix unit on NVIDIA: the slow path.

Count per entry of the weight and prompt of n responses of T tokens: 2nT FLOPs of product; 4n bytes of stash written and
4n read, from HBM but for the smallest n (2 programs on each of 132 multiprocessors hold 17n MB, the L2 cache 50); 8
bytes of gradient; 4m² FLOPs for the Gram matrix, m = n padded to 16, 32 or 64. On an H200 (790 TFLOP/s, 4.3 TB/s) the
stash takes as long as the product at T = 735. A 7B model's MLP (18944 x 3584), 8 prompts of 8 responses, in ms:

    T      floor: product   floor: stash   prediction   with all G_i in float32   with pairs of tokens
    512    5.6              8.1            11           5.9 + 12                  5.9 + 3.8 at the library's rate
    2048   22.5             8.1            34           24 + 12                   24 + 61
    4096   45               8.1            65           47 + 12                   47 + 245

Prediction, not measured on a GPU: the product at 0.75 of the library's rate, which is what 128 x 128 tiles reach, and
1.9 ms of Gram matrices (at 300 TFLOP/s) against the stash: the larger of the two plus a quarter of the smaller, as two
programs share a multiprocessor and the one multiplies while the other reads back.

Weighed and rejected:
- All n tiles in registers: 8 of 64 x 64 fill half of them, and their operands, at 32 FLOP a byte, ask 25 TB/s of L2.
- All n tiles in shared memory: Triton gives no program such memory. In CUDA C++ 8 of 128 x 64 would fit, in bf16.
- A stash in bf16, the total in registers: half the traffic, but 2^-9 in every entry of a G_i, and the total takes the
  registers of the second program, without which nothing runs under a read-back.
- 128 x 256, one program per multiprocessor: a better product, but the same.
- One loop over the token blocks of all responses, so that copies run on across their ends: the accumulator would be
  stored under a condition inside the pipelined loop. The other program hides the refill.
- Pairs of tokens, M²(d_out + d_in) FLOPs for M = nT and no stash: at the library's rate ahead for T < 600 at n = 8;
  the caller chooses. Only while a prompt has few tokens.
- tf32x3 for the Gram matrix: 6 times the work of the two bf16 products. One bf16 product: 2^-9.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.config import architecture
from rlvr_fast.kernels.logit_tile import column_slices

MAX_RESPONSES = 64  # of a prompt: two [64, 64] accumulators and a chunk fit the registers
# padded responses -> entries of each response's stash in a chunk, and chunks under way: the most that do not spill.
CHUNKS = {16: (128, 5), 32: (32, 5), 64: (32, 3)}
FLOAT32_CHUNK = (16, 3)  # a thread without the matrix unit holds its rows of a chunk whole


@dataclass(frozen=True)
class GradientTile:
    """One program's share of the weight, ``rows`` x ``columns``, from ``tokens`` tokens a step.

    ``group`` row tiles are walked before the next column tile, so that what runs at one time shares its operands in the
    L2 cache. The accumulator is stashed in ``slices`` column slices: whole, it and its addresses spill. ``programs``
    fit a multiprocessor. ``input_precision`` as in ``HeadTile``.
    """

    rows: int
    columns: int
    tokens: int
    group: int
    slices: int
    programs: int
    num_warps: int
    num_stages: int
    input_precision: str = "ieee"

    @property
    def stash_bytes(self) -> int:
        """Of one response."""
        return 4 * self.rows * self.columns


# (architecture, bytes per element of the operands)
TILES = {
    # 128 of 255 registers a thread are the accumulator, 96 of 113 KiB the three stages of a program.
    ("sm90", 2): GradientTile(128, 128, 64, 16, 8, 2, 4, 3),
    ("sm100", 2): GradientTile(128, 128, 64, 16, 8, 2, 4, 3),
    ("sm80", 2): GradientTile(128, 128, 32, 16, 4, 1, 8, 3),
    ("gfx942", 2): GradientTile(128, 128, 32, 16, 4, 1, 4, 2),
    # The accurate, slow path: no matrix unit on NVIDIA.
    ("sm90", 4): GradientTile(64, 64, 16, 16, 1, 2, 4, 3),
    ("sm100", 4): GradientTile(64, 64, 16, 16, 1, 2, 4, 3),
    ("sm80", 4): GradientTile(64, 64, 16, 16, 1, 2, 4, 3),
    ("gfx942", 4): GradientTile(64, 64, 32, 16, 1, 2, 4, 2),
    # Small, so that small tests cross tile borders.
    ("interpreter", 2): GradientTile(16, 32, 16, 2, 1, 3, 4, 1),
    ("interpreter", 4): GradientTile(16, 32, 16, 2, 1, 3, 4, 1),
}


@triton.jit
def response_gradient(b, a, begin, end, first_row, first_column, d_out, d_in, b_stride, a_stride,
                      INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """Σ b_t a_tᵀ over tokens begin .. end for one tile, float32; 0 outside of the weight."""
    tokens = tl.arange(0, TOKENS)
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    # One 64-bit offset per block of tokens (N·d may pass 2^31), 32-bit ones inside it.
    b += begin.to(tl.int64) * b_stride
    a += begin.to(tl.int64) * a_stride
    b_places = rows[:, None] + tokens[None, :] * b_stride
    a_places = tokens[:, None] * a_stride + columns[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    length = (end - begin).to(tl.int32)
    for start in range(0, length, TOKENS):
        # Both factors: what follows may be another response's infinity.
        inside = tokens < length - start
        b_block = tl.load(b + b_places, mask=(rows < d_out)[:, None] & inside[None, :], other=0.0)
        a_block = tl.load(a + a_places, mask=inside[:, None] & (columns < d_in)[None, :], other=0.0)
        accumulator = tl.dot(b_block, a_block, accumulator, input_precision=INPUT_PRECISION)
        b += TOKENS * b_stride
        a += TOKENS * a_stride
    return accumulator


@triton.jit
def stash_products(stash, n, direction, gradient, grams, dots, first_row, first_column, d_out, d_in, direction_stride,
                   SPLIT: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   RESPONSES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr):
    """From the tiles of a prompt's n responses: their sum, their Gram matrix, their products with the direction."""
    responses = tl.arange(0, RESPONSES)
    here = responses < n
    gram = tl.zeros((RESPONSES, RESPONSES), dtype=tl.float32)
    cross = tl.zeros((RESPONSES, RESPONSES), dtype=tl.float32)
    along = tl.zeros((RESPONSES,), dtype=tl.float32)
    for start in tl.range(0, ROWS * COLUMNS, CHUNK, num_stages=STAGES):
        places = start + tl.arange(0, CHUNK)
        entries = tl.load(stash + responses[:, None] * (ROWS * COLUMNS) + places[None, :], mask=here[:, None],
                          other=0.0)
        row = first_row + places // COLUMNS
        column = first_column + places % COLUMNS
        inside = (row < d_out) & (column < d_in)
        if gradient is not None:
            totals = gradient + row.to(tl.int64) * d_in + column
            tl.store(totals, tl.load(totals, mask=inside, other=0.0) + tl.sum(entries, axis=0), mask=inside)
        if direction is not None:
            towards = tl.load(direction + row.to(tl.int64) * direction_stride + column, mask=inside, other=0.0)
            along += tl.sum(entries * towards.to(tl.float32)[None, :], axis=1)
        if SPLIT:
            high = entries.to(tl.bfloat16)
            low = (entries - high.to(tl.float32)).to(tl.bfloat16).to(FACTOR)
            high = high.to(FACTOR)
            gram = tl.dot(high, tl.trans(high), gram, input_precision="ieee")
            cross = tl.dot(high, tl.trans(low), cross, input_precision="ieee")
        else:
            gram = tl.dot(entries, tl.trans(entries), gram, input_precision="ieee")
    if SPLIT:
        gram += cross + tl.trans(cross)
    others = tl.arange(0, 16)
    pieces = column_slices(gram, RESPONSES, RESPONSES, RESPONSES // 16)
    for i in tl.static_range(RESPONSES // 16):
        pairs = grams + responses[:, None] * RESPONSES + (16 * i + others)[None, :]
        both = here[:, None] & (16 * i + others < n)[None, :]
        tl.store(pairs, tl.load(pairs, mask=both, other=0.0) + pieces[i].to(tl.float64), mask=both)
    if direction is not None:
        tl.store(dots + responses, tl.load(dots + responses, mask=here, other=0.0) + along.to(tl.float64), mask=here)


@triton.jit
def segmented_gradient_kernel(b, a, starts, stops, cu_prompts, direction, stash, gradient, grams, dots, n_responses,
                              n_prompts, n_max, n_splits, d_out, d_in, b_stride, a_stride, direction_stride,
                              SPLIT: tl.constexpr, FACTOR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
                              ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
                              SLICES: tl.constexpr, RESPONSES: tl.constexpr, CHUNK: tl.constexpr,
                              STAGES: tl.constexpr):
    program = tl.program_id(0)
    stash += program.to(tl.int64) * n_max * (ROWS * COLUMNS)
    grams += program.to(tl.int64) * n_responses * RESPONSES
    if direction is not None:
        dots += program.to(tl.int64) * n_responses
    row_tiles = tl.cdiv(d_out, ROWS)
    column_tiles = tl.cdiv(d_in, COLUMNS)
    n_tiles = row_tiles * column_tiles
    WIDTH: tl.constexpr = COLUMNS // SLICES
    slice_places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, WIDTH)[None, :]

    for item in range(program, n_tiles * n_splits, tl.num_programs(0)):
        split = item // n_tiles
        tile = item % n_tiles
        first_row_tile = tile // (GROUP * column_tiles) * GROUP
        height = tl.minimum(row_tiles - first_row_tile, GROUP)
        within = tile % (GROUP * column_tiles)
        first_row = (first_row_tile + within % height) * ROWS
        first_column = within // height * COLUMNS
        for prompt in range(split, n_prompts, n_splits):
            first = tl.load(cu_prompts + prompt).to(tl.int32)
            last = tl.load(cu_prompts + prompt + 1).to(tl.int32)
            for response in range(first, last):
                own = response_gradient(b, a, tl.load(starts + response), tl.load(stops + response), first_row,
                                        first_column, d_out, d_in, b_stride, a_stride, INPUT_PRECISION, ROWS, COLUMNS,
                                        TOKENS)
                pieces = column_slices(own, ROWS, COLUMNS, SLICES)
                for i in tl.static_range(SLICES):
                    tl.store(stash + (response - first) * (ROWS * COLUMNS) + i * WIDTH + slice_places, pieces[i])
            # The stash is read by other threads than wrote it, and is not to be overwritten before.
            tl.debug_barrier()
            share = gradient
            if gradient is not None:
                share = gradient + split.to(tl.int64) * d_out * d_in
            own_dots = dots
            if direction is not None:
                own_dots = dots + first
            stash_products(stash, last - first, direction, share, grams + first.to(tl.int64) * RESPONSES, own_dots,
                           first_row, first_column, d_out, d_in, direction_stride, SPLIT, FACTOR, ROWS, COLUMNS,
                           RESPONSES, CHUNK, STAGES)
            tl.debug_barrier()


def segmented_gradient(b: torch.Tensor, a: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor,
                       cu_prompts: torch.Tensor, tile: GradientTile, n_splits: int, direction: torch.Tensor | None,
                       stash: torch.Tensor, gradient: torch.Tensor | None, grams: torch.Tensor,
                       dots: torch.Tensor | None, split: bool) -> None:
    """Add to ``gradient``, ``grams`` and ``dots``, by as many programs as ``stash`` has room for.

    Args:
        b, a: [N, d_out] and [N, d_in] of one dtype; any row stride, elements of a row adjacent.
        starts, stops: [R] integer, the rows of each response.
        cu_prompts: [P+1] integer, P >= 1, the responses of each prompt.
        n_splits: prompts p, p + n_splits, ... add to the plane p of ``gradient``.
        direction: [d_out, d_in] float, any row stride, elements of a row adjacent; or None.
        stash: [programs >= 1, n, rows * columns] float32, scratch; n <= MAX_RESPONSES, of the largest prompt.
        gradient: [n_splits, d_out, d_in] float32, adjacent; or None.
        grams: [programs, R, padded_responses(n)] float64, adjacent.
        dots: [programs, R] float64, adjacent; None without a direction.
        split: Gram matrices from two bf16 terms instead of float32 products.
    """
    n_programs, n_max, _ = stash.shape
    segmented_gradient_kernel[(n_programs,)](
        b, a, starts, stops, cu_prompts, direction, stash, gradient, grams, dots, len(starts), len(cu_prompts) - 1,
        n_max, n_splits, b.shape[1], a.shape[1], b.stride(0), a.stride(0),
        0 if direction is None else direction.stride(0), **_tile_options(tile),
        **_chunk_options(padded_responses(n_max), split, b.device.type == "cpu"), num_warps=tile.num_warps,
        num_stages=tile.num_stages)


def padded_responses(n: int) -> int:
    """Rows and columns that a Gram matrix of n responses takes on the matrix unit."""
    return max(16, triton.next_power_of_2(n))


def gradient_tile(device: torch.device, dtype: torch.dtype) -> GradientTile:
    """The tile for operands of ``dtype`` on ``device``; a CPU device means the Triton interpreter."""
    return TILES[architecture(device), dtype.itemsize]


def _tile_options(tile: GradientTile) -> dict[str, int | str]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "TOKENS": tile.tokens, "GROUP": tile.group,
            "SLICES": tile.slices, "INPUT_PRECISION": tile.input_precision}


def _chunk_options(responses: int, split: bool, interpreted: bool = False) -> dict:
    entries, stages = CHUNKS[responses] if split else FLOAT32_CHUNK
    factor = tl.float32 if interpreted else tl.bfloat16  # the interpreter multiplies bf16's bit patterns
    return {"RESPONSES": responses, "CHUNK": entries, "STAGES": stages, "SPLIT": split, "FACTOR": factor}


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles: each size of a Gram matrix, with and without a direction."""
    integers = ("n_responses", "n_prompts", "n_max", "n_splits", "d_out", "d_in", "b_stride", "a_stride",
                "direction_stride")
    base = {"starts": "*i64", "stops": "*i64", "cu_prompts": "*i32", "stash": "*fp32", "gradient": "*fp32",
            "grams": "*fp64"} | dict.fromkeys(integers, "i32")
    entries = []
    for dtype, responses, direction in itertools.product(("bf16", "fp16", "fp32"), (16, 32, 64), (False, True)):
        if dtype != "bf16" and (direction or responses == 32):  # the same code but for the type of an instruction
            continue
        hot = dtype != "fp32"
        kinds = base | {"b": f"*{dtype}", "a": f"*{dtype}"}
        if direction:
            kinds |= {"direction": f"*{dtype}", "dots": "*fp64"}
        for (target, itemsize), tile in TILES.items():
            if target != "interpreter" and itemsize == (2 if hot else 4):
                entries.append({
                    "name": f"segmented_gradient {dtype} {responses}{' direction' if direction else ''}",
                    "fn": segmented_gradient_kernel, "signature": kinds,
                    "constexprs": _tile_options(tile) | _chunk_options(responses, hot)
                    | ({} if direction else {"direction": None, "dots": None}),
                    "num_warps": tile.num_warps, "num_stages": tile.num_stages, "hot": hot, "expects_matrix": hot,
                    "targets": (target,),
                    "divisible_by_16": ("d_out", "d_in", "b_stride", "a_stride", "direction_stride")})
    return entries
