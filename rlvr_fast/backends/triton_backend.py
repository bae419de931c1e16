"""The Triton backend: composes the kernels of ``rlvr_fast.kernels`` into the head pass and its gradients.

Every buffer is bounded by ``config.CHUNK_BYTES`` whatever N and V are, every result repeats bit for bit, and nothing
waits for the device. Rows of the inputs may be strided; their elements must be adjacent, else the input is copied.

Derivatives by the raw logits are rounded once to the operands' dtype, as any matrix-unit product must, but with the
sampled token's entry computed from the off-target mass and scaled by a power of two: errors are 2^-9 (bf16) of a
derivative, also where the derivative is 1e-9. Products with these blocks are library products with fp32 accumulators
and results; for fp32 inputs they follow ``torch.backends.cuda.matmul``'s precision.

Products of 2·N·V·D FLOPs, and what the rest takes at D = 3584, V = 152064, bf16 (predictions, not yet measured on a
GPU): ``head_pass`` 1; ``head_pass_with_sums`` 1 and 0.1 of one for 4·N·V bytes; ``head_pass_with_gradient`` 2 and 0.15
for 6·N·V bytes; ``hidden_gradient`` after a pass 2; ``linear_logprob_backward`` 1 and 1 per gradient; the Gram matrices
are counted in ``triton_gram``.
"""

from __future__ import annotations

import torch

from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.head import Head

try:
    import triton

    from rlvr_fast.backends.triton_blocks import (
        LARGEST,
        Operands,
        gradient_blocks,
        long_product,
        numerator_chunks,
        power_of_two,
        product,
        split_terms,
    )
    from rlvr_fast.backends.triton_gram import head_gram, head_pass_with_gram
    from rlvr_fast.kernels.column_sums import column_sums
    from rlvr_fast.kernels.combine_stats import N_RESULTS
    from rlvr_fast.kernels.config import chunk_size, chunks
    from rlvr_fast.kernels.logit_tile import LOG2_E
    from rlvr_fast.kernels.score_block import score_block
except ImportError as error:
    triton = None
    IMPORT_ERROR = str(error)

__all__ = ["head_gram", "head_pass", "head_pass_with_gradient", "head_pass_with_gram", "head_pass_with_sums",
           "hidden_gradient", "linear_logprob_backward", "through_head", "unavailable"]

_SMALLEST = 2.0**-126  # the smallest normal fp32: row factors below it are probabilities that are nothing


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
    operands = Operands.of(hidden, head)
    results = torch.empty(N_RESULTS, len(hidden), dtype=torch.float32, device=hidden.device)
    for start, end in chunks(len(hidden), chunk_size(len(hidden), operands.statistics_bytes, operands.tile.rows)):
        operands.token_pass(slice(start, end), tokens, results[:, start:end])
    return TokenPass(*results[:6])


@torch.no_grad()
def head_pass_with_sums(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        cu_seqlens: torch.Tensor, merge: Merge | None = None) -> tuple[TokenPass, torch.Tensor]:
    """The same, and per response Σ_t c_t ∂ logp_t/∂ raw: [R, V] float32.

    One product, which also leaves the softmax numerators of a chunk of tokens in the operands' dtype, and one sweep
    over them: 4·N·V bytes of traffic for 16-bit operands.
    """
    operands = Operands.of(hidden, head, merge)
    coefficients = coefficients.to(torch.float32)
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    n_tokens, vocabulary = len(hidden), len(operands.weight)
    results = torch.empty(6, n_tokens, dtype=torch.float32, device=hidden.device)
    sums = torch.zeros(len(cu_seqlens) - 1, vocabulary, dtype=torch.float32, device=hidden.device)

    rows = chunk_size(n_tokens, _chunk_row_bytes(operands), operands.tile.rows)
    for chunk, responses in zip(numerator_chunks(operands, tokens, rows, results, merge),
                                _responses_of(cu_seqlens, n_tokens, rows), strict=True):
        c = coefficients[chunk.rows]
        column_sums(chunk.numerators, chunk.slice_maximum, operands.tile.slice_columns, chunk.reference,
                    c * chunk.factor, c * (chunk.off_mass * chunk.target_slope), tokens[chunk.rows], cu_seqlens,
                    responses, chunk.rows.start, sums)
    return TokenPass(*results), sums


@torch.no_grad()
def through_head(sums: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sums @ weight, [R, V] float32 by [V, D], to fp32 accuracy on the matrix unit.

    Half-precision weights are multiplied by the sums split into three terms of their dtype, all in one product that
    reads the weight once: 1.1 GB or 0.25 ms at D = 3584, V = 152064 on an H200 (prediction: 0.4 ms). Widening the
    weight instead moves 10·V·D bytes, 1.3 ms.
    """
    if weight.dtype == torch.float32:
        return sums @ weight
    terms, scale = split_terms(sums, weight.dtype)
    parts = long_product(terms.flatten(0, 1), weight).unflatten(0, (3, -1))
    return (parts[2] + parts[1] + parts[0]) * scale[:, None]


# -- gradients --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def head_pass_with_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, merge: Merge | None = None
                            ) -> tuple[TokenPass, torch.Tensor]:
    """Statistics, and ∂ logp/∂ hidden: [N, D] float32, in two N·V·D products.

    The first leaves a chunk's numerators, a sweep turns them into derivatives up to a factor per row, the second
    multiplies these by the weight.
    """
    operands = Operands.of(hidden, head, merge)
    results = torch.empty(6, len(hidden), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    # Beside the numerators, room for the second product in eight parts.
    rows = chunk_size(len(hidden), _chunk_row_bytes(operands) + 32 * hidden.shape[1], operands.tile.rows)
    for chunk in numerator_chunks(operands, tokens, rows, results, merge):
        at_target = chunk.off_mass * chunk.target_slope
        factor = chunk.factor.clamp_min(_SMALLEST)
        # Other shards' tokens count in off_mass: then the target's entry may need a higher reference than this shard's.
        headroom = torch.log2(at_target / (factor * LARGEST)).ceil().clamp_min(0.0)
        factor = factor * torch.exp2(headroom)
        score_block(chunk.numerators, chunk.slice_maximum, operands.tile.slice_columns, chunk.reference + headroom,
                    tokens[chunk.rows], at_target / factor)
        torch.mul(long_product(chunk.numerators, operands.weight), factor[:, None], out=gradient[chunk.rows])
    return TokenPass(*results), gradient


@torch.no_grad()
def hidden_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass) -> torch.Tensor:
    """∂ logp/∂ hidden = f_y · off_mass · W_y - Σ_{v≠y} f_v p_v W_v: [N, D] float32, in two N·V·D products.

    The blocks hold it divided by the off-target mass: at most 1 at the sampled token, the conditional probabilities
    given any other one elsewhere.
    """
    off_mass = token_pass.off_mass
    others_lse = token_pass.lse + torch.where(off_mass > 0, off_mass, 1.0).log()
    one = torch.full_like(off_mass, LARGEST)
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for rows, columns, block in gradient_blocks(hidden, tokens, head, others_lse, one, None, one):
        gradient[rows] += product(block, head.weight[columns])
    return gradient.mul_((off_mass / (LARGEST * head.temperature))[:, None])


@torch.no_grad()
def linear_logprob_backward(grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, hidden: torch.Tensor,
                            tokens: torch.Tensor, head: Head, token_pass: TokenPass, needs: tuple[bool, bool, bool]
                            ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of Σ_t (grad_logp_t logp_t + grad_entropy_t H_t) by hidden, weight and bias; None where not needed.

    One product recomputes the logits, and one each gives the hidden and the weight gradient, in float32.
    """
    zero = torch.zeros_like(token_pass.logp)
    g = zero if grad_logp is None else grad_logp.to(torch.float32)
    k = zero if grad_entropy is None else grad_entropy.to(torch.float32)
    p = token_pass.logp.exp()
    # A target outside the vocabulary has p = 0 and log p = -inf.
    target = g * token_pass.off_mass - k * torch.where(p > 0, p * (token_pass.logp + token_pass.entropy), 0.0)
    # No derivative exceeds |g| + |k| (H + 1/e), before 1/temperature.
    scale = power_of_two((g.abs() + k.abs() * (token_pass.entropy + 1)) / head.temperature)
    rate = scale / head.temperature
    entropy_slope = None if grad_entropy is None else k * rate / LOG2_E
    blocks = gradient_blocks(hidden, tokens, head, token_pass.lse, (g + k * token_pass.entropy) * rate, entropy_slope,
                             target * rate)
    of_hidden, of_weight, of_bias = gradients = tuple(
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needed and x is not None else None
        for x, needed in zip((hidden, head.weight, head.bias), needs, strict=True))
    for rows, columns, block in blocks if any(needs) else ():
        if of_hidden is not None:
            of_hidden[rows] += product(block, head.weight[columns])
        if of_weight is not None:
            of_weight[columns] += product(block.T, hidden[rows])
        if of_bias is not None:
            of_bias[columns] += block.sum(0, dtype=torch.float32)
    for gradient in gradients:
        if gradient is not None:
            gradient.div_(scale)
    return of_hidden, of_weight, of_bias


# -- pieces -----------------------------------------------------------------------------------------------------------


def _chunk_row_bytes(operands: Operands) -> int:
    """Numerators and partial statistics of one token."""
    return operands.vocabulary_size * operands.dtype.itemsize + operands.statistics_bytes


def _responses_of(cu_seqlens: torch.Tensor, n_tokens: int, rows: int) -> torch.Tensor:
    """[chunks, 2] on the device: the first response with a token in each chunk, and one past the last."""
    starts = torch.arange(0, n_tokens, rows, device=cu_seqlens.device)
    first = torch.searchsorted(cu_seqlens[1:].contiguous(), starts, right=True)
    last = torch.searchsorted(cu_seqlens[:-1].contiguous(), (starts + rows).clamp_max(n_tokens))
    return torch.stack([first, last], dim=1)
