"""Gram matrices of the responses' lm_head gradients G_i = Σ_t c_t (∂ logp_t/∂ raw) h_tᵀ, which are never formed.

⟨G_i, G_j⟩ = Σ_{t∈i, s∈j} c_t c_s ⟨∂ logp_t/∂ raw, ∂ logp_s/∂ raw⟩ ⟨h_t, h_s⟩. Divided by its off-target mass o (and
without 1/temperature), a token's derivative is u = f_y e_y - q with q_v = f_v p_v / o for v ≠ y and q_y = 0, so that
    ⟨u_t, u_s⟩ = ⟨q_t, q_s⟩ + (f_t f_s if y_t = y_s, else -f_t q_s[y_t] - f_s q_t[y_s]).
⟨q_t, q_s⟩ comes out of the numerators of the head pass, a vocabulary slice at a time, with row references that grow by
integers: what was summed before is rescaled by powers of two. The other terms need a few entries of q, hidden @ W[y].

Count, in head products 2·N·V·D, for prompts of M tokens: the pass 1; pairs M/(2D) if only t ≤ s were computed, 0.62·M/D
in row blocks of 1024 at M = 4096; target terms and ⟨h_t, h_s⟩ 2·M/V; traffic of 6·N·V bytes for the numerators (0.15 at
D = 3584) and, per vocabulary slice, about 10 passes over the M²/2 sums (0.08). At M = 4096, D = 3584: 2.0 with 0.5 GB
beside the inputs, a prediction, not yet measured on a GPU. ``head_gram``, given a pass, computes the logits again:
2·N·V bytes less, and the pass itself comes on top.

Prompts of more than 2D tokens take another way, to bound the memory (0.7 GB at M = 7168), though by the count pairs
would stay ahead until 3D: gradients are formed, a slice of the vocabulary at a time. That is 3 products, and each slice
is written and read once, 8·n·V·D bytes per prompt of n responses, about as long as a product takes for responses of 500
tokens. Squaring them on chip would save that traffic: three 128 x 128 fp32 accumulators would give the squares and the
products of the two class sums, but not each response's product with its class sum, which the jackknife needs; that
takes a stash of bf16 response tiles in shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.backends.triton_blocks import (
    LARGEST,
    Operands,
    aligned_rows,
    gradient_blocks,
    long_product,
    merged_pass,
    power_of_two,
    product,
)
from rlvr_fast.head import Head
from rlvr_fast.kernels import config
from rlvr_fast.kernels.combine_stats import N_RESULTS, combine_stats
from rlvr_fast.kernels.config import chunks
from rlvr_fast.kernels.head_gradient import head_gradient
from rlvr_fast.kernels.head_stats import n_slices
from rlvr_fast.kernels.logit_tile import LOG2_E
from rlvr_fast.kernels.score_block import score_block

# Prompts are taken together up to this many tokens: fewer would make the pass read the weight too often.
BLOCK_TOKENS = 4096
Groups = list[list[tuple[int, int]]]  # per prompt its responses' (start, stop) token spans
PAIR_ROWS = 1024  # rows of a block of token pairs; only blocks on or above the diagonal are computed


@dataclass(frozen=True)
class _Block:
    """Some tokens of one or several prompts, with their coefficients.

    Attributes:
        hidden: [M, D]. tokens, coefficients: [M].
        bounds: per prompt the borders of its responses, counted within the block.
    """

    hidden: Tensor
    tokens: Tensor
    coefficients: Tensor
    bounds: list[list[int]]

    @classmethod
    def of(cls, hidden: Tensor, tokens: Tensor, coefficients: Tensor, groups: Groups) -> tuple[_Block, Tensor]:
        """The block and the places of its tokens in the batch."""
        spans = [span for group in groups for span in group]
        index = torch.cat([torch.arange(start, stop, device=hidden.device) for start, stop in spans])
        ends = list(accumulate((stop - start for start, stop in spans), initial=0))
        bounds: list[list[int]] = []
        for group in groups:
            first = sum(map(len, bounds)) - len(bounds)
            bounds.append(ends[first:first + len(group) + 1])
        return cls(hidden[index], tokens[index], coefficients[index].to(torch.float32), bounds), index


@torch.no_grad()
def head_pass_with_gram(hidden: Tensor, tokens: Tensor, head: Head, coefficients: Tensor, groups: Groups,
                        merge: Merge | None = None) -> tuple[TokenPass, list[Tensor]]:
    """Statistics of every token, of which each is in a span, and per prompt ⟨G_i, G_j⟩: [n, n] float64, this shard's
    share of it where merged."""
    results = torch.empty(6, len(hidden), dtype=torch.float32, device=hidden.device)
    grams = []
    for prompts, by_pairs in _blocks_of_prompts(groups, head.hidden_size):
        block, index = _Block.of(hidden, tokens, coefficients, prompts)
        if by_pairs:
            results[:, index], pairs = _pairs_of_pass(block, head, merge)
            grams += pairs.grams(block, head)
        else:
            results[:, index] = _pass_of(block, head, merge)
            grams += _grams_of_slices(block, head, TokenPass(*results[:, index]))
    return TokenPass(*results), grams


@torch.no_grad()
def head_gram(hidden: Tensor, tokens: Tensor, head: Head, token_pass: TokenPass, coefficients: Tensor, groups: Groups
              ) -> list[Tensor]:
    """The Gram matrices alone, of a pass that was made before; the logits are recomputed."""
    grams = []
    for prompts, by_pairs in _blocks_of_prompts(groups, head.hidden_size):
        block, index = _Block.of(hidden, tokens, coefficients, prompts)
        chosen = TokenPass(*(column[index] for column in token_pass))
        grams += (_pairs_of_gradients(block, head, chosen).grams(block, head) if by_pairs
                  else _grams_of_slices(block, head, chosen))
    return grams


def _blocks_of_prompts(groups: Groups, hidden_size: int) -> Iterator[tuple[Groups, bool]]:
    """(prompts in their order, whether pairs of tokens are the cheaper way)."""
    block, total = Groups(), 0
    for spans in groups:
        size = sum(stop - start for start, stop in spans)
        by_pairs = size <= 2 * hidden_size
        if block and (total + size > BLOCK_TOKENS or not by_pairs):
            yield block, True
            block, total = [], 0
        if by_pairs:
            block.append(spans)
            total += size
        else:
            yield [spans], False
    if block:
        yield block, True


# -- pairs of tokens --------------------------------------------------------------------------------------------------


class _Pairs:
    """Running sums of ⟨E_t, E_s⟩ for the pairs t ≤ s of each prompt's tokens, in blocks of rows from the diagonal on.

    ``grams`` needs what makes E the q of the module's docstring: q = ±E · ``unit``; and per token ``lse`` and
    ``off_mass`` of the whole vocabulary and ``target_slope``, f_y (0 where y is in another shard).
    """

    def __init__(self, block: _Block):
        device = block.hidden.device
        # (prompt, first row, one past the last row, one past the prompt's last token)
        self.places = [(prompt, top, min(top + PAIR_ROWS, bounds[-1]), bounds[-1])
                       for prompt, bounds in enumerate(block.bounds)
                       for top in range(bounds[0], bounds[-1], PAIR_ROWS)]
        self.sums = [torch.zeros(bottom - top, stop - top, dtype=torch.float32, device=device)
                     for _, top, bottom, stop in self.places]

    @property
    def n_bytes(self) -> int:
        """Of the sums."""
        return sum(4 * sums.numel() for sums in self.sums)

    def rescale(self, scale: Tensor) -> None:
        """Every token's E so far times ``scale`` [M]."""
        for (_, top, bottom, stop), sums in zip(self.places, self.sums, strict=True):
            sums.mul_(scale[top:bottom, None]).mul_(scale[None, top:stop])

    def add(self, slab: Tensor) -> None:
        """E [M, w] of some vocabulary entries."""
        for (_, top, bottom, stop), sums in zip(self.places, self.sums, strict=True):
            sums.add_(long_product(slab[top:bottom], slab[top:stop].T))

    def finish(self, unit: Tensor, token_pass: TokenPass, target_slope: Tensor) -> _Pairs:
        self.unit, self.off_mass, self.target_slope = unit, token_pass.off_mass, target_slope
        self.others_lse = token_pass.lse + torch.where(self.off_mass > 0, self.off_mass, 1.0).log()
        return self

    def grams(self, block: _Block, head: Head) -> list[Tensor]:
        """One [n, n] float64 per prompt."""
        operands = Operands.of(block.hidden, head)
        weights = block.coefficients.double() * self.off_mass.double() / head.temperature
        grams = [torch.zeros(len(bounds) - 1, len(bounds) - 1, dtype=torch.float64, device=weights.device)
                 for bounds in block.bounds]
        for (prompt, top, bottom, stop), sums in zip(self.places, self.sums, strict=True):
            rows, columns = slice(top, bottom), slice(top, stop)
            pairs = sums.mul_(self.unit[rows, None]).mul_(self.unit[None, columns])
            pairs += self._target_terms(operands, block.tokens, rows, columns)
            pairs *= product(block.hidden[rows], block.hidden[columns].T)
            member = _membership(block.bounds[prompt], weights)
            of_rows, of_columns = member[:, rows] @ pairs.double(), member[:, columns].T
            grams[prompt] += of_rows @ of_columns
            beyond = bottom - top  # columns past the square on the diagonal stand for their mirror images too
            grams[prompt] += (of_rows[:, beyond:] @ of_columns[beyond:]).T
        return grams

    def _target_terms(self, operands: Operands, tokens: Tensor, rows: slice, columns: slice) -> Tensor:
        """⟨u_t, u_s⟩ - ⟨q_t, q_s⟩."""
        here, there = tokens[rows, None], tokens[None, columns]
        same = here == there  # two tokens of other shards have slope 0
        own, other = self.target_slope[rows, None], self.target_slope[None, columns]
        of_rows = torch.where(same | (there < 0), 0.0, self._entries(operands, tokens, rows, columns))
        of_columns = torch.where(same | (here < 0), 0.0, self._entries(operands, tokens, columns, rows).T)
        return torch.where(same, own * other, 0.0) - other * of_rows - own * of_columns

    def _entries(self, operands: Operands, tokens: Tensor, rows: slice, columns: slice) -> Tensor:
        """q_t[y_s]: [rows, columns]; arbitrary where y_s = y_t or y_s is in another shard."""
        ids = tokens[columns].clamp_min(0)
        hidden = operands.hidden[rows]
        entries = torch.empty(len(hidden), len(ids), dtype=operands.dtype, device=tokens.device)
        minus_one = torch.full_like(self.unit[rows], -1.0)
        head_gradient(hidden, torch.full_like(tokens[rows], -1), operands.weight[ids],
                      None if operands.bias is None else operands.bias[ids], operands.temperature, operands.softcap,
                      operands.tile, self.others_lse[rows] * LOG2_E, minus_one, None, minus_one, 0, entries)
        return entries


def _pairs_of_pass(block: _Block, head: Head, merge: Merge | None) -> tuple[Tensor, _Pairs]:
    """([6, M] TokenPass, pairs) in one product, whose numerators are used as they come."""
    operands, pairs = Operands.of(block.hidden, head, merge), _Pairs(block)
    n_tokens, vocabulary, tile = len(block.tokens), len(operands.weight), operands.tile
    device = block.tokens.device
    partials = operands.new_partials(n_tokens)
    target_raw, reference = torch.empty(n_tokens, device=device), torch.full((n_tokens,), -torch.inf, device=device)
    # Beside the statistics, the sums and one slice's part of them.
    taken = operands.statistics_bytes * n_tokens + 2 * pairs.n_bytes
    room = max(config.CHUNK_BYTES - taken, config.CHUNK_BYTES // 4)
    width = max(room // max(n_tokens * operands.dtype.itemsize, 1) // tile.columns, 1) * tile.columns
    buffer = aligned_rows(n_tokens, min(width, vocabulary), operands.dtype, device)
    for start, end in chunks(vocabulary, width) if n_tokens else ():
        slab, first = buffer[:, : end - start], start // tile.slice_columns
        statistics = partials[:, first:first + n_slices(end - start, tile)]
        operands.statistics(slice(0, n_tokens), slice(start, end), block.tokens - start, statistics, target_raw, slab)
        grown = torch.maximum(reference, statistics[0].amax(0).ceil())
        anchor = torch.where(grown == -torch.inf, 0.0, grown)
        if start:
            pairs.rescale(torch.exp2(reference - anchor))
        score_block(slab, statistics[0], tile.slice_columns, anchor, block.tokens, None)
        pairs.add(slab)
        reference = grown
    own = torch.empty(N_RESULTS, n_tokens, dtype=torch.float32, device=device)
    if n_tokens:
        combine_stats(partials, block.tokens, target_raw, head.temperature, head.softcap, own)
    merged, factor = merged_pass(own, merge)
    # own[6] is at least the reference of a row that has any mass.
    unit = factor * head.temperature / torch.where(merged[5] > 0, merged[5], 1.0) * torch.exp2(reference - own[6])
    return merged, pairs.finish(unit, TokenPass(*merged), own[8] * head.temperature)


def _pairs_of_gradients(block: _Block, head: Head, token_pass: TokenPass) -> _Pairs:
    """Pairs from the recomputed q, target held out."""
    pairs, one = _Pairs(block), torch.ones_like(token_pass.lse)
    target_slope = torch.where(block.tokens >= 0, _target_slope(block, head), 0.0)
    pairs.finish(one / LARGEST, token_pass, target_slope)
    for _, _, slab in gradient_blocks(block.hidden, block.tokens, head, pairs.others_lse, one * LARGEST, None,
                                      torch.zeros_like(one), all_rows=True):
        pairs.add(slab)
    return pairs


def _target_slope(block: _Block, head: Head) -> Tensor:
    """f_y = 1 - tanh²(raw_y / softcap): [M] float32."""
    if head.softcap is None:
        return torch.ones(len(block.tokens), device=block.tokens.device)
    ids = block.tokens.clamp_min(0)
    raw = torch.cat([(block.hidden[start:end].float() * head.weight[ids[start:end]].float()).sum(1)
                     for start, end in chunks(len(ids), PAIR_ROWS)] or [block.hidden.new_empty(0, dtype=torch.float32)])
    if head.bias is not None:
        raw += head.bias[ids]
    return torch.cosh(raw / head.softcap).square().reciprocal()


def _membership(bounds: list[int], weights: Tensor) -> Tensor:
    """[n, M] float64: a token's weight in the row of its response, over the tokens of the whole block."""
    member = weights.new_zeros(len(bounds) - 1, len(weights))
    for row, (start, stop) in zip(member, pairwise(bounds), strict=True):
        row[start:stop] = weights[start:stop]
    return member


# -- slices of the vocabulary -----------------------------------------------------------------------------------------


def _pass_of(block: _Block, head: Head, merge: Merge | None) -> Tensor:
    """[6, M], the fields of TokenPass."""
    operands = Operands.of(block.hidden, head, merge)
    own = torch.empty(N_RESULTS, len(block.tokens), dtype=torch.float32, device=block.tokens.device)
    rows = config.chunk_size(len(block.tokens), operands.statistics_bytes, operands.tile.rows)
    for start, end in chunks(len(block.tokens), rows):
        operands.token_pass(slice(start, end), block.tokens, own[:, start:end])
    return merged_pass(own, merge)[0]


def _grams_of_slices(block: _Block, head: Head, token_pass: TokenPass) -> list[Tensor]:
    """Σ over vocabulary slices of ⟨G_i, G_j⟩ within the slice, for a block of one prompt."""
    (bounds,) = block.bounds
    scale = power_of_two(block.coefficients.abs() / head.temperature)
    rate = block.coefficients * scale / head.temperature
    gram = torch.zeros(len(bounds) - 1, len(bounds) - 1, dtype=torch.float64, device=rate.device)
    width = max(config.CHUNK_BYTES // (4 * len(gram) * head.hidden_size), 1)
    for _, _, slab in gradient_blocks(block.hidden, block.tokens, head, token_pass.lse, rate, None,
                                      rate * token_pass.off_mass, all_rows=True, max_width=width):
        slices = [product(slab[start:stop].T, block.hidden[start:stop]).flatten() for start, stop in pairwise(bounds)]
        gram += (gradients := torch.stack(slices)) @ gradients.T
    return [gram / scale.double().square()]
