"""Everything the head pass reports, from logits that are already in memory; optionally their derivatives too.

One program owns one row and sweeps it once. Every lane keeps statistics of its own (largest logit, Σe, Σe·x, Σe²), so
the sweep has no barrier: the lanes meet once, at the end of the row. A lane takes as many adjacent columns at a time as
one 16-byte load brings and rescales once per load, which makes 1 + 1/4 (fp32) or 1 + 1/8 exponentials per entry. The
sampled token is held out and put back by ``token_results``. With ``block``, a second sweep writes
∂ logp/∂ raw = f_v (1[v=y] off_mass - 1[v≠y] p_v) / temperature; ``block`` may be the logits themselves: each entry is
read and replaced by the same thread.

Traffic: one read of the logits, 4·C·V bytes as fp32; with ``block`` one write, and a second read that begins where the
first ended, since the L2 cache holds the end. Floor at C = 8192, V = 151936 and 4.3 TB/s: 1.16 ms as fp32, 0.58 ms as
bf16; with an fp32 block in place 2.3 ms, or 3.5 ms if the second read is from memory. Predictions: fp32 1.15 times the
floor; bf16 1.3 times, since its 12 to 14 instructions per entry take 0.6 ms to issue; with the fp32 block 3.7 ms: four
rows in flight per multiprocessor are 320 MB, so the 50 MB of L2 serve a seventh of the second read. Not yet measured on
a GPU.

Weighed and rejected: one running maximum per program instead of per lane, because it costs a barrier per tile; a
fixed anchor instead of a maximum, because logits of 1e4 overflow it; several programs per row and a combine step,
because a chunk has more rows than the chip has multiprocessors.
"""

import torch
import triton
import triton.language as tl

from rlvr_fast.kernels.logit_tile import LOG2_E, soft_cap
from rlvr_fast.kernels.token_results import token_results

N_RESULTS = 6
LANES = 1024  # four loads of 16 bytes in flight for each of 256 threads
SOFTCAP_LANES = 512  # its derivatives need the registers
NUM_WARPS = 8


@triton.jit
def _load_logits(logits, columns, target, n_columns, logit_scale, softcap):
    """(z in base 2 with the target and what lies past the row at -inf, dz/draw up to its scale)."""
    raw = tl.load(logits + columns, mask=columns < n_columns, other=float("-inf")).to(tl.float32)
    if softcap is None:
        z = raw * logit_scale
        slope = tl.full(raw.shape, 1.0, dtype=tl.float32)
    else:
        capped, slope = soft_cap(raw, softcap)
        z = capped * logit_scale
    return tl.where(columns == target, float("-inf"), z), slope


@triton.jit
def row_stats_kernel(logits, tokens, results, block, n_columns, logits_stride, block_stride, result_stride,
                     logit_scale, inverse_temperature, softcap, LANES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target = tl.load(tokens + row).to(tl.int32)
    here = target >= 0
    target_raw = tl.load(logits + target, mask=here, other=float("-inf")).to(tl.float32)
    places = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    maximum = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((LANES,), dtype=tl.float32)
    square = tl.zeros((LANES,), dtype=tl.float32)
    first = tl.zeros((LANES,), dtype=tl.float32)
    slope_square = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, n_columns, LANES * WIDTH):
        z, slope = _load_logits(logits, start + places, target, n_columns, logit_scale, softcap)
        new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shift = maximum - anchor
        scale = tl.exp2(shift)
        x = z - anchor[:, None]
        e = tl.exp2(x)
        # 2^-200 is 0 in fp32, so the bounds change nothing except 0 · (-inf).
        first = scale * (first + tl.maximum(shift, -200.0) * mass) + tl.sum(e * tl.maximum(x, -200.0), axis=1)
        mass = scale * mass + tl.sum(e, axis=1)
        square = scale * scale * square + tl.sum(e * e, axis=1)
        if softcap is not None:
            e *= slope
            slope_square = scale * scale * slope_square + tl.sum(e * e, axis=1)
        maximum = new_maximum

    top = tl.max(maximum, axis=0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    shift = maximum - anchor
    scale = tl.exp2(shift)
    total_first = tl.sum(scale * (first + tl.maximum(shift, -200.0) * mass), axis=0)
    total_mass = tl.sum(scale * mass, axis=0)
    total_square = tl.sum(scale * scale * square, axis=0)
    if softcap is None:
        target_z = target_raw * logit_scale
        target_slope = 1.0
        total_slope_square = total_square
    else:
        capped, target_slope = soft_cap(target_raw, softcap)
        target_z = capped * logit_scale
        total_slope_square = tl.sum(scale * scale * slope_square, axis=0)

    logp, lse, entropy, sum_p_sq, score_sq, off_mass, target_draw, others = token_results(
        target_z, top, total_mass, total_square, total_first, total_slope_square, target_slope, here,
        inverse_temperature)
    results += row
    tl.store(results, logp)
    tl.store(results + result_stride, lse)
    tl.store(results + 2 * result_stride, entropy)
    tl.store(results + 3 * result_stride, sum_p_sq)
    tl.store(results + 4 * result_stride, score_sq)
    tl.store(results + 5 * result_stride, off_mass)

    if block is not None:
        block += row * block_stride
        last = (tl.cdiv(n_columns, LANES * WIDTH) - 1) * (LANES * WIDTH)
        for behind in range(0, n_columns, LANES * WIDTH):
            columns = last - behind + places
            z, slope = _load_logits(logits, columns, target, n_columns, logit_scale, softcap)
            entry = tl.where(columns == target, target_draw, -others * tl.exp2(z - anchor) * slope)
            tl.store(block + columns, entry.to(block.dtype.element_ty), mask=columns < n_columns)


def row_stats(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float | None,
              block: torch.Tensor | None, results: torch.Tensor, lanes: int | None = None) -> None:
    """Fill ``results`` [6, C] float32, in the order of TokenPass, and ``block`` [C, V] with ∂ logp/∂ raw if given.

    Args:
        logits: [C, V] float32, bfloat16 or float16; any row stride, elements of a row adjacent. V < 2^30.
        tokens: [C] int64, adjacent, in [0, V); -1 where the token is in another shard of the vocabulary.
        block: [C, V] of any of these dtypes, any row stride, elements of a row adjacent; ``logits`` itself or memory
            of its own.
        lanes: instead of the module's, a power of two.
    """
    n_rows, n_columns = logits.shape
    if n_rows == 0:
        return
    if lanes is None:
        lanes = LANES if softcap is None else SOFTCAP_LANES
    row_stats_kernel[(n_rows,)](
        logits, tokens, results, block, n_columns, logits.stride(0), 0 if block is None else block.stride(0),
        results.stride(0), LOG2_E / temperature, 1.0 / temperature, softcap, LANES=lanes,
        WIDTH=16 // logits.element_size(), num_warps=NUM_WARPS)


def aot_specializations() -> list[dict]:
    """What the ahead-of-time compile gate compiles."""
    integers = ("n_columns", "logits_stride", "block_stride", "result_stride")
    base = {"tokens": "*i64", "results": "*fp32", "logit_scale": "fp32", "inverse_temperature": "fp32"}
    entries = []
    for dtype, block, softcap in (("fp32", None, None), ("fp32", None, "fp32"), ("fp32", "fp32", None),
                                  ("fp32", "bf16", "fp32"), ("bf16", None, None), ("bf16", "bf16", None),
                                  ("bf16", "bf16", "fp32"), ("fp16", "fp16", None)):
        kinds = base | dict.fromkeys(integers, "i32") | {
            "logits": f"*{dtype}", "block": block and f"*{block}", "softcap": softcap}
        entries.append({
            "name": f"row_stats {dtype}{' to ' + block if block else ''}{' softcap' if softcap else ''}",
            "fn": row_stats_kernel, "signature": {key: kind for key, kind in kinds.items() if kind},
            "constexprs": {"LANES": SOFTCAP_LANES if softcap else LANES, "WIDTH": 4 if dtype == "fp32" else 8}
            | {key: None for key, kind in kinds.items() if not kind},
            "num_warps": NUM_WARPS, "num_stages": 1, "hot": True, "expects_matrix": False,
            "divisible_by_16": ("n_columns", "logits_stride", "block_stride")})
    return entries
