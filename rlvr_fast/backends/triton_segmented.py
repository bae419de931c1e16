"""Per-response weight gradients of linear layers on a GPU: buffers around ``kernels.segmented_gradient``.

Memory beside the inputs: the stash, at most ``STASH_BYTES``; float32 planes of small weights, at most one tile per
program; [programs, R, 16 to 64] float64 of partial inner products. Nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton

from rlvr_fast.kernels import segmented_gradient as kernel

STASH_BYTES = 512 << 20  # fewer programs run where a prompt has so many responses that theirs would take more
INTERPRETED_PROGRAMS = 3
Spans = Sequence[tuple[int, int]]  # half-open row ranges, one per response


def supported(b: torch.Tensor, a: torch.Tensor, n_max: int) -> bool:
    """Whether ``segmented_gradient`` is the way for these operands.

    float32 is left to the library: without the matrix unit a product takes some 15 times as long, the traffic that the
    kernel saves is small beside it, and the library's product is the faster one.
    """
    return (b.device.type == "cuda" and b.dtype == a.dtype and b.dtype in (torch.bfloat16, torch.float16)
            and n_max <= kernel.MAX_RESPONSES and all(x.stride(1) == 1 or x.shape[1] == 1 for x in (b, a)))


@torch.no_grad()
def segmented_gradient(b: torch.Tensor, a: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor,
                       cu_prompts: torch.Tensor, *, n_max: int, direction: torch.Tensor | None = None,
                       gradient: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inner products of G_i = Σ_{starts[i] <= t < stops[i]} b_t a_tᵀ within each prompt, in one sweep over the tokens.

    Products of 16-bit operands accumulate in float32; Gram matrices carry an error of at most 2^-16 ‖G_i‖ ‖G_j‖ besides
    (see the kernel). Repeats bit for bit on one device.

    Args:
        b: [N, d_out], a: [N, d_in], bfloat16, float16 or float32; any row stride, elements of a row adjacent.
        starts, stops: [R] int32 or int64, rows of response i: disjoint, maybe empty, in any order. Rows of no response
            are in no result.
        cu_prompts: [P+1] int32 or int64, responses cu_prompts[p]:cu_prompts[p+1] are one prompt's.
        n_max: responses of the largest prompt, at most 64.
        direction: [d_out, d_in] of any float dtype.
        gradient: [d_out, d_in] float32, adjacent; Σ_i G_i is added to it.

    Returns:
        [R, n_max] float64, ⟨G_i, G_j⟩ with the j-th response of the same prompt, 0 beyond its last; and
        [R] float64, ⟨direction, G_i⟩, or None.
    """
    device, n_prompts = b.device, len(cu_prompts) - 1
    d_out, d_in = b.shape[1], a.shape[1]
    if direction is not None and direction.stride(1) != 1:
        direction = direction.contiguous()
    split, tile = b.element_size() == 2, kernel.gradient_tile(device, b.dtype)
    if device.type == "cpu" and b.dtype == torch.bfloat16:
        b, a = b.float(), a.float()  # the interpreter multiplies bf16's bit patterns; fp32 holds the products exactly
    n_tiles = triton.cdiv(d_out, tile.rows) * triton.cdiv(d_in, tile.columns)
    most = max(1, min(_programs(device, tile), STASH_BYTES // (max(n_max, 1) * tile.stash_bytes)))
    # A weight of fewer tiles than programs is given to several of them, prompt by prompt.
    n_splits = max(1, min(n_prompts, most // max(n_tiles, 1)))
    n_programs = min(most, n_tiles * n_splits)
    planes = None
    if gradient is not None:
        planes = gradient[None] if n_splits == 1 else gradient.new_zeros(n_splits, d_out, d_in)
    width = kernel.padded_responses(n_max)
    stash = torch.empty(n_programs, n_max, tile.rows * tile.columns, dtype=torch.float32, device=device)
    grams = torch.zeros(n_programs, len(starts), width, dtype=torch.float64, device=device)
    dots = None if direction is None else grams.new_zeros(n_programs, len(starts))
    if n_programs and n_prompts > 0:
        kernel.segmented_gradient(b, a, starts, stops, cu_prompts, tile, n_splits, direction, stash, planes, grams,
                                  dots, split)
    if n_splits > 1 and gradient is not None and planes is not None:
        gradient += planes.sum(0)
    return grams.sum(0)[:, :n_max], None if dots is None else dots.sum(0)


def prompt_products(uses: Sequence[tuple[torch.Tensor, torch.Tensor, Spans]], groups: Sequence[Sequence[int]], *,
                    direction: torch.Tensor | None = None, gradient: torch.Tensor | None = None
                    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``segmented_gradient`` for rows as a layer has them, prompt by prompt.

    Args:
        uses: per use of the weight b [N, d_out], a [N, d_in] and the rows of each response; rows of several uses are
            copied together.
        groups: per prompt the numbers of its responses.
        direction, gradient: as in ``segmented_gradient``.

    Returns:
        per prompt ⟨G_i, G_j⟩ [n, n] float64, and ⟨direction, G_i⟩ [n] float64 (empty list without a direction).
    """
    if len(uses) == 1:
        (b, a, spans), = uses
    else:
        pieces = [(b[slice(*spans[i])], a[slice(*spans[i])]) for group in groups for i in group for b, a, spans in uses]
        b, a = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        lengths = [sum(spans[i][1] - spans[i][0] for *_, spans in uses) for group in groups for i in group]
        spans = list(pairwise(accumulate(lengths, initial=0)))
        places = iter(range(len(spans)))
        groups = [[next(places) for _ in group] for group in groups]
    starts, stops, cu_prompts = _index(tuple(spans), tuple(map(tuple, groups)), b.device)
    gram, dot = segmented_gradient(b, a, starts, stops, cu_prompts, n_max=max(map(len, groups)), direction=direction,
                                   gradient=gradient)
    sizes = list(map(len, groups))
    grams = [own[:, :n] for own, n in zip(gram.split(sizes), sizes, strict=True)]
    return grams, [] if dot is None else list(dot.split(sizes))


@functools.lru_cache(maxsize=32)  # the layers of a forward share few layouts
def _index(spans: tuple[tuple[int, int], ...], groups: tuple[tuple[int, ...], ...], device: torch.device
           ) -> tuple[torch.Tensor, ...]:
    """starts, stops, cu_prompts on ``device``, without waiting for it."""
    own = [spans[i] for group in groups for i in group]
    borders = list(accumulate(map(len, groups), initial=0))
    flat = torch.tensor([start for start, _ in own] + [stop for _, stop in own] + borders, dtype=torch.int64)
    if device.type == "cuda":
        flat = flat.pin_memory()
    return flat.to(device, non_blocking=True).split([len(own), len(own), len(borders)])


@functools.cache
def _programs(device: torch.device, tile: kernel.GradientTile) -> int:
    """How many run at a time."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return tile.programs * torch.cuda.get_device_properties(device).multi_processor_count
