"""The Triton backend: composes the kernels of ``rlvr_fast.kernels`` into the head pass and its gradients.

Every buffer is bounded by ``config.CHUNK_BYTES`` whatever N and V are, every result repeats bit for bit, and nothing
waits for the device. Rows of the inputs may be strided; their elements must be adjacent, else the input is copied.

The gradients round the derivatives by the raw logits to the operands' dtype, as any matrix-unit product must, but with
the sampled token's entry computed from the off-target mass and scaled by a power of two: errors are 2^-9 (bf16) of a
derivative, also where the derivative is 1e-9. Products with these blocks are library products with fp32 accumulators
and results; for fp32 inputs they follow ``torch.backends.cuda.matmul``'s precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch

from rlvr_fast.backends.base import TokenPass
from rlvr_fast.head import Head

try:
    import triton

    from rlvr_fast.kernels import config
    from rlvr_fast.kernels.column_sums import column_sums
    from rlvr_fast.kernels.combine_stats import N_RESULTS, combine_stats
    from rlvr_fast.kernels.config import chunk_size, chunks, head_tile
    from rlvr_fast.kernels.head_gradient import head_gradient
    from rlvr_fast.kernels.head_stats import head_stats
    from rlvr_fast.kernels.logit_tile import LOG2_E
except ImportError as error:
    triton = None
    IMPORT_ERROR = str(error)

# Tokens per block of derivatives where a block need not hold them all: more mean fewer passes over the gradients.
_BLOCK_ROWS = 16384
# Derivatives are scaled by powers of two to at most this: fp16 ends below 2^16.
_LARGEST = 2.0**15


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``; None if it can."""
    if triton is None:
        return f"its kernels cannot be imported ({IMPORT_ERROR})"
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return ("Triton kernels need a GPU (or TRITON_INTERPRET=1, set before triton is imported, to interpret them on "
                f"the CPU), the tensors are on {device}")
    return None


# -- statistics -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def head_pass(hidden: torch.Tensor, tokens: torch.Tensor, head: Head) -> TokenPass:
    """Statistics of every token: one N·V·D product, no [N, V] buffer."""
    hidden, weight, bias = _adjacent(hidden, head)
    tile = head_tile(hidden.device, hidden.dtype, head.softcap, (len(hidden), *weight.shape))
    results = torch.empty(N_RESULTS, len(hidden), dtype=torch.float32, device=hidden.device)
    statistics_bytes = 20 * triton.cdiv(len(weight), tile.slice_columns)
    for start, end in chunks(len(hidden), chunk_size(len(hidden), statistics_bytes, tile.rows)):
        _chunk_pass(hidden[start:end], tokens[start:end], weight, bias, head, tile, results[:, start:end], None)
    return TokenPass(*results[:6])


@torch.no_grad()
def head_pass_with_sums(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        cu_seqlens: torch.Tensor) -> tuple[TokenPass, torch.Tensor]:
    """The same, and per response Σ_t c_t ∂ logp_t/∂ raw: [R, V] float32.

    One product, which also leaves the softmax numerators of a chunk of tokens in float32, and one sweep over them.
    """
    hidden, weight, bias = _adjacent(hidden, head)
    tile = head_tile(hidden.device, hidden.dtype, head.softcap, (len(hidden), *weight.shape))
    coefficients = coefficients.to(torch.float32).contiguous()
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    n_tokens, vocabulary = len(hidden), len(weight)
    results = torch.empty(N_RESULTS, n_tokens, dtype=torch.float32, device=hidden.device)
    sums = torch.zeros(len(cu_seqlens) - 1, vocabulary, dtype=torch.float32, device=hidden.device)

    rows = chunk_size(n_tokens, 4 * vocabulary, tile.rows)
    numerators = _aligned_rows(min(rows, n_tokens), vocabulary, torch.float32, hidden.device)
    for (start, end), responses in zip(chunks(n_tokens, rows), _responses_of(cu_seqlens, n_tokens, rows), strict=True):
        chunk_results, chunk = results[:, start:end], numerators[: end - start, :vocabulary]
        partials = _chunk_pass(hidden[start:end], tokens[start:end], weight, bias, head, tile, chunk_results, chunk)
        column_sums(chunk, partials[0], tile.slice_columns, chunk_results[6:], tokens[start:end],
                    coefficients[start:end], cu_seqlens, responses, start, sums)
    return TokenPass(*results[:6]), sums


# -- gradients --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass) -> torch.Tensor:
    """∂ logp/∂ hidden = f_y · off_mass · W_y - Σ_{v≠y} f_v p_v W_v: [N, D] float32, in two N·V·D products.

    The blocks hold it divided by the off-target mass: at most 1 at the sampled token, the conditional probabilities
    given any other one elsewhere.
    """
    off_mass = token_pass.off_mass
    others_lse = token_pass.lse + torch.where(off_mass > 0, off_mass, 1.0).log()
    one = torch.full_like(off_mass, _LARGEST)
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for rows, columns, block in _gradient_blocks(hidden, tokens, head, others_lse, one, None, one):
        gradient[rows] += _product(block, head.weight[columns])
    return gradient.mul_((off_mass / (_LARGEST * head.temperature))[:, None])


@torch.no_grad()
def linear_logprob_backward(grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, hidden: torch.Tensor,
                            tokens: torch.Tensor, head: Head, token_pass: TokenPass, needs: tuple[bool, bool, bool]
                            ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of Σ_t (grad_logp_t logp_t + grad_entropy_t H_t) by hidden, weight and bias; None where not needed.

    One product recomputes the logits, and one each gives the hidden and the weight gradient. These are accumulated as
    [N, D] and [V, D] float32 and come back in the inputs' dtypes.
    """
    zero = torch.zeros_like(token_pass.logp)
    g = zero if grad_logp is None else grad_logp.to(torch.float32)
    k = zero if grad_entropy is None else grad_entropy.to(torch.float32)
    p = token_pass.logp.exp()
    # A target outside the vocabulary has p = 0 and log p = -inf.
    target = g * token_pass.off_mass - k * torch.where(p > 0, p * (token_pass.logp + token_pass.entropy), 0.0)
    # No derivative exceeds |g| + |k| (H + 1/e), before 1/temperature.
    scale = _power_of_two((g.abs() + k.abs() * (token_pass.entropy + 1)) / head.temperature)
    rate = scale / head.temperature
    entropy_slope = None if grad_entropy is None else k * rate / LOG2_E
    blocks = _gradient_blocks(hidden, tokens, head, token_pass.lse, (g + k * token_pass.entropy) * rate, entropy_slope,
                              target * rate)
    inputs = (hidden, head.weight, head.bias)
    gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needed else None
                 for x, needed in zip(inputs, needs, strict=True)]
    for rows, columns, block in blocks if any(needs) else ():
        if needs[0]:
            gradients[0][rows] += _product(block, head.weight[columns])
        if needs[1]:
            gradients[1][columns] += _product(block.T, hidden[rows])
        if needs[2]:
            gradients[2][columns] += block.sum(0, dtype=torch.float32)
    return tuple(None if gradient is None else gradient.div_(scale).to(x.dtype)
                 for gradient, x in zip(gradients, inputs, strict=True))


@torch.no_grad()
def head_gram(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass, coefficients: torch.Tensor,
              groups: list[list[tuple[int, int]]]) -> list[torch.Tensor]:
    """⟨G_i, G_j⟩ of the responses of each prompt, G_i = Σ_t c_t (∂ logp_t/∂ raw) h_tᵀ: one [n, n] float64 per prompt.

    ``groups`` holds each prompt's (start, stop) token spans. The logits are recomputed (N·V·D); then, with M tokens in
    the prompt, pairs of tokens cost M²·V and forming the gradients a vocabulary slice at a time M·V·D: the cheaper one
    is taken. The second writes and reads each slice once, 8·n·V·D bytes per prompt: about as long as its product takes
    for responses of 500 tokens on an H200. A kernel that squares it on chip would need all n accumulators there.
    """
    grams = []
    for spans in groups:
        index = torch.cat([torch.arange(start, stop, device=hidden.device) for start, stop in spans])
        bounds = list(accumulate((stop - start for start, stop in spans), initial=0))
        c = coefficients[index].to(torch.float32)
        scale = _power_of_two(c.abs() / head.temperature)
        rate = c * scale / head.temperature
        rows = hidden[index]
        sources = (rows, tokens[index], head, token_pass.lse[index], rate, None, rate * token_pass.off_mass[index])
        gram_of = _gram_of_pairs if len(index) <= head.hidden_size else _gram_of_slices
        grams.append(gram_of(rows, sources, bounds) / scale.double().square())
    return grams


def _gram_of_pairs(hidden: torch.Tensor, sources: tuple, bounds: list[int]) -> torch.Tensor:
    """Σ_{t∈i, s∈j} ⟨δ_t, δ_s⟩ ⟨h_t, h_s⟩, δ the blocks' rows."""
    pairs = torch.zeros(len(hidden), len(hidden), dtype=torch.float32, device=hidden.device)
    for _, _, block in _gradient_blocks(*sources):
        pairs += _product(block, block.T)
    pairs = pairs.double() * _product(hidden, hidden.T).double()
    rows = torch.stack([pairs[start:stop].sum(0) for start, stop in pairwise(bounds)])
    return torch.stack([rows[:, start:stop].sum(1) for start, stop in pairwise(bounds)], dim=1)


def _gram_of_slices(hidden: torch.Tensor, sources: tuple, bounds: list[int]) -> torch.Tensor:
    """Σ over vocabulary slices of ⟨G_i, G_j⟩ within the slice."""
    n_responses = len(bounds) - 1
    gram = torch.zeros(n_responses, n_responses, dtype=torch.float64, device=hidden.device)
    width = max(config.CHUNK_BYTES // (4 * n_responses * hidden.shape[1]), 1)
    for _, _, block in _gradient_blocks(*sources, all_rows=True, max_width=width):
        slices = [_product(block[start:stop].T, hidden[start:stop]).flatten() for start, stop in pairwise(bounds)]
        gram += (gradients := torch.stack(slices)) @ gradients.T
    return gram


# -- pieces -----------------------------------------------------------------------------------------------------------


def _chunk_pass(hidden, tokens, weight, bias, head, tile, results, numerators) -> torch.Tensor:
    """Fill the chunk's ``results`` (and ``numerators``) and return its partial statistics."""
    target_raw = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    partials = head_stats(hidden, tokens, weight, bias, head.temperature, head.softcap, tile, target_raw, numerators)
    combine_stats(partials, target_raw, head.temperature, head.softcap, results)
    return partials


def _gradient_blocks(hidden, tokens, head, lse, slope, entropy_slope, target, *, all_rows=False, max_width=None
                     ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(tokens, vocabulary entries, ``head_gradient`` of them), in one reused buffer of at most CHUNK_BYTES."""
    dtype, n_tokens = hidden.dtype, len(hidden)
    if n_tokens == 0:
        return
    hidden, weight, bias = _adjacent(hidden, head)
    tile = head_tile(hidden.device, hidden.dtype, head.softcap, (len(hidden), *weight.shape))
    height = n_tokens if all_rows else min(n_tokens, _BLOCK_ROWS)
    width = chunk_size(len(weight), height * dtype.itemsize, tile.columns)
    width = min(width, len(weight), max_width or width)
    buffer = _aligned_rows(height, width, dtype, hidden.device)
    lse = lse * LOG2_E
    for top, bottom in chunks(n_tokens, height):
        rows = slice(top, bottom)
        for start, end in chunks(len(weight), width):
            columns = slice(start, end)
            block = buffer[: bottom - top, : end - start]
            head_gradient(hidden[rows], tokens[rows], weight[columns], None if bias is None else bias[columns],
                          head.temperature, head.softcap, tile, lse[rows], slope[rows],
                          None if entropy_slope is None else entropy_slope[rows], target[rows], start, block)
            yield rows, columns, block


def _power_of_two(bounds: torch.Tensor) -> torch.Tensor:
    """A power of two that brings the largest of ``bounds`` to at most _LARGEST; stays on the device."""
    if len(bounds) == 0:
        return bounds.new_ones(())
    return torch.exp2(torch.floor(torch.log2(_LARGEST / bounds.amax().clamp_min(2.0**-100))))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with fp32 accumulation and an fp32 result."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _adjacent(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hidden, weight and bias with adjacent elements in each row."""
    hidden, weight = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (hidden, head.weight))
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        # Triton's interpreter multiplies the bit patterns of bf16 operands; fp32 holds them and their products exactly.
        hidden, weight = hidden.float(), weight.float()
    return hidden, weight, None if head.bias is None else head.bias.contiguous()


def _aligned_rows(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n_rows, >= n_columns]: every row begins at a multiple of 16 elements, so that it moves in 16-byte pieces."""
    return torch.empty(n_rows, -(-n_columns // 16) * 16, dtype=dtype, device=device)


def _responses_of(cu_seqlens: torch.Tensor, n_tokens: int, rows: int) -> torch.Tensor:
    """[chunks, 2] on the device: the first response with a token in each chunk, and one past the last."""
    starts = torch.arange(0, n_tokens, rows, device=cu_seqlens.device)
    first = torch.searchsorted(cu_seqlens[1:].contiguous(), starts, right=True)
    last = torch.searchsorted(cu_seqlens[:-1].contiguous(), (starts + rows).clamp_max(n_tokens))
    return torch.stack([first, last], dim=1)
