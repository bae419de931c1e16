"""Per-response sums of log-ratios: what a change of the parameters did to the log-probability of every response.

One program walks one response. The differences nearly cancel and a response may have 10^5 tokens, so differences and
sums are float64: two additions per 6 to 24 bytes read, which a data-centre GPU hides behind its memory. The order of
additions is fixed, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 1024
NUM_WARPS = 4


@triton.jit
def log_ratio_kernel(before, after, reverse, cu_seqlens, sums, HAS_REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    response = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + response)
    end = tl.load(cu_seqlens + response + 1)
    lanes = tl.arange(0, BLOCK)
    forward_sum = tl.zeros([BLOCK], tl.float64)
    reverse_sum = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        token = first + lanes
        inside = token < end
        base = tl.load(before + token, mask=inside, other=0.0).to(tl.float64)
        forward_sum += tl.load(after + token, mask=inside, other=0.0).to(tl.float64) - base
        if HAS_REVERSE:
            reverse_sum += tl.load(reverse + token, mask=inside, other=0.0).to(tl.float64) - base
    row = sums + response * 2
    tl.store(row, tl.sum(forward_sum, axis=0))
    if HAS_REVERSE:
        tl.store(row + 1, tl.sum(reverse_sum, axis=0))


def log_ratio_sums(before: torch.Tensor, after: torch.Tensor, reverse: torch.Tensor | None,
                   cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[R, 2] float64: per response the sum over its tokens of (after - before) and of (reverse - before).

    Args:
        before, after: [N] contiguous log-probs, float64, float32, bfloat16 or float16, not necessarily alike.
        reverse: the same, or None: the second column is then 0.
        cu_seqlens: [R+1] contiguous int64; an empty response sums to 0.
    """
    n_responses = cu_seqlens.numel() - 1
    sums = torch.zeros(n_responses, 2, dtype=torch.float64, device=before.device)
    if n_responses:
        log_ratio_kernel[(n_responses,)](before, after, before if reverse is None else reverse, cu_seqlens, sums,
                                         HAS_REVERSE=reverse is not None, BLOCK=BLOCK_TOKENS, num_warps=NUM_WARPS)
    return sums


def aot_specializations() -> list[dict]:
    """Every variant worth compiling ahead of time: with and without the reversed step, in each usual dtype."""
    variants = []
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        for has_reverse in (True, False):
            variants.append({
                "name": f"log_ratio_{dtype}_{'both_ways' if has_reverse else 'one_way'}",
                "fn": log_ratio_kernel,
                "signature": {"before": f"*{dtype}", "after": f"*{dtype}", "reverse": f"*{dtype}",
                              "cu_seqlens": "*i64", "sums": "*fp64",
                              "HAS_REVERSE": "constexpr", "BLOCK": "constexpr"},
                "constexprs": {"HAS_REVERSE": has_reverse, "BLOCK": BLOCK_TOKENS},
                "num_warps": NUM_WARPS,
                "num_stages": 3,
                "hot": dtype == "fp32" and has_reverse,
                "expects_matrix": False,
            })
    return variants
