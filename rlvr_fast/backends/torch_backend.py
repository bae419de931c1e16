"""Every operation in plain torch, on any device, over tiles of rows x vocabulary: no [N, V] buffer.

The logits are recomputed tile by tile where a second look is needed. Sums are over the off-target vocabulary; the
sampled token is put back at the end in float64 (see ``TokenPass``). On a GPU, products of float32
operands follow torch's TF32 setting.

Over a shard of the vocabulary the ids are the shard's own and -1 elsewhere; given the pass over the whole vocabulary,
the gradients are this shard's share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch.nn.functional import threshold_  # type: ignore[attr-defined]  # missing in torch's stub

from rlvr_fast.backends.base import Merge, TokenPass
from rlvr_fast.head import Head

TILE_ROWS, TILE_COLUMNS = 256, 2048  # 2 MiB of fp32 logits and their temporaries stay in a CPU's caches
SUM_ROWS = 128  # rows whose full-vocabulary logits are held while their statistics are made
GRAM_TILE_FLOATS = 4 << 20
FLOOR = -3.0e38  # "no logit": finite, so that differences are never NaN
NEGLIGIBLE = 1e-30  # probabilities below it count as 0: subnormal operands slow a CPU's products down ten times


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``: it always can."""
    return None


# -- tiles ------------------------------------------------------------------------------------------------------------


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight.T in float32: bf16 and fp16 operands must not round the logits."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return torch.mm(rows.float(), weight.T.float())


def _logits(rows: torch.Tensor, head: Head, columns: slice) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z and dz/draw of one tile."""
    z = _product(rows, head.weight[columns])
    if head.bias is not None:
        z += head.bias[columns].float()
    if head.softcap is None:
        return z.mul_(1.0 / head.temperature).clamp_(min=FLOOR), 1.0 / head.temperature
    return _soft_capped(z, head.temperature, head.softcap, may_mask=head.bias is not None)


def _soft_capped(raw: torch.Tensor, temperature: float, softcap: float, *, may_mask: bool
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """z and dz/draw; ``may_mask``: raw logits of -inf, which take an entry out of the vocabulary, may occur."""
    tanh = torch.tanh(raw / softcap)
    slope = (1.0 - tanh * tanh) / temperature
    capped = tanh.mul_(softcap / temperature)
    return capped.masked_fill_(raw == -torch.inf, FLOOR) if may_mask else capped, slope


def _in_tile(tokens: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Target column within the tile, [rows, 1], and whether it is there."""
    local = (tokens - columns.start)[:, None]
    return local.clamp(0, columns.stop - columns.start - 1), (local >= 0) & (local < columns.stop - columns.start)


def _set_target(tile: torch.Tensor, tokens: torch.Tensor, columns: slice, value: float | torch.Tensor) -> torch.Tensor:
    """Set the sampled token's entry of each row that has it here to ``value``, a number or [rows], in place."""
    column, inside = _in_tile(tokens, columns)
    value = value[:, None] if isinstance(value, torch.Tensor) else value
    return tile.scatter_(1, column, torch.where(inside, value, tile.gather(1, column)))


def _scores(rows: torch.Tensor, tokens: torch.Tensor, head: Head, columns: slice, lse: torch.Tensor,
            off_mass: torch.Tensor) -> torch.Tensor:
    """∂logp/∂raw of one tile, the target's entry from the off-target mass."""
    z, slope = _logits(rows, head, columns)
    delta = threshold_(torch.exp(z - lse[:, None]), NEGLIGIBLE, 0.0).neg_()
    return _set_target(delta, tokens, columns, off_mass).mul_(slope)


# -- statistics -------------------------------------------------------------------------------------------------------


class _Running:
    """Off-target statistics of some rows: with x = z - max and e = exp(x), the sums of e, e·x, e² and (e·f)²."""

    def __init__(self, n_rows: int, device: torch.device):
        self.top = torch.full((n_rows,), FLOOR, device=device)
        self.target = torch.full((n_rows,), FLOOR, device=device)
        self.target_slope = torch.zeros(n_rows, device=device)
        self.sums = torch.zeros(4, n_rows, device=device)

    def add(self, z: torch.Tensor, slope: torch.Tensor | float, tokens: torch.Tensor, columns: slice) -> None:
        """Take in one tile; leaves ``z`` with the target at FLOOR."""
        column, inside = _in_tile(tokens, columns)
        self.target = torch.where(inside[:, 0], z.gather(1, column)[:, 0], self.target)
        at_target = slope.gather(1, column)[:, 0] if isinstance(slope, torch.Tensor) else slope
        self.target_slope = torch.where(inside[:, 0], at_target, self.target_slope)
        _set_target(z, tokens, columns, FLOOR)
        top = torch.maximum(self.top, z.amax(1))
        x = z - top[:, None]
        e = torch.exp(x)
        shift = (self.top - top).clamp(min=-200.0)
        scale = torch.exp(shift)
        self.sums[1] += self.sums[0] * shift
        self.sums[:2] *= scale
        self.sums[2:] *= scale * scale
        weighted = e * slope
        self.sums += torch.stack([e.sum(1), (e * x.clamp(min=-200.0)).sum(1), (e * e).sum(1),
                                  (weighted * weighted).sum(1)])
        self.top = top

    def finish(self) -> tuple[torch.Tensor, ...]:
        """Put the target back: the fields of TokenPass."""
        target, top = self.target.double(), self.top.double()
        reference = torch.maximum(target, torch.where(self.sums[0] > 0, top, target))
        shift = (top - reference).clamp(min=-700.0)
        scale = torch.exp(shift)
        e, e_x, e_sq, slope_sq = self.sums.double()
        off, off_x = scale * e, scale * (e_x + shift * e)
        target_x = target - reference
        absent = target <= FLOOR  # masked, or in another shard of the vocabulary: no probability here
        target_e = torch.where(absent, 0.0, torch.exp(target_x))
        total = off + target_e
        log_total = torch.where(target_e == 1.0, torch.log1p(off), torch.log(total))
        mean_x = (off_x + torch.where(absent, 0.0, target_x * target_e)) / total
        off_mass = off / total
        return (torch.where(absent, -torch.inf, target_x - log_total), reference + log_total,
                (log_total - mean_x).clamp(min=0.0), (scale * scale * e_sq + target_e**2) / total**2,
                (self.target_slope.double() * off_mass) ** 2 + scale * scale * slope_sq / total**2, off_mass)


def _new_pass(hidden: torch.Tensor) -> TokenPass:
    return TokenPass(*torch.empty(6, hidden.shape[0], device=hidden.device).unbind(0))


def _store(result: TokenPass, rows: slice, values: tuple[torch.Tensor, ...]) -> None:
    for column, value in zip(result, values, strict=True):
        column[rows] = value


def head_pass(hidden: torch.Tensor, tokens: torch.Tensor, head: Head) -> TokenPass:
    """Statistics of every token; one tile of logits lives at a time."""
    result = _new_pass(hidden)
    for rows in _slices(hidden.shape[0], TILE_ROWS):
        running = _Running(rows.stop - rows.start, hidden.device)
        for columns in _slices(head.vocabulary_size, TILE_COLUMNS):
            running.add(*_logits(hidden[rows], head, columns), tokens[rows], columns)
        _store(result, rows, running.finish())
    return result


def logits_pass(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float | None = None,
                block: torch.Tensor | None = None) -> TokenPass:
    """Statistics from logits that the caller holds, one tile taken to float32 at a time.

    ``block`` [N, V], if given, receives ∂logp/∂raw; it may be the logits themselves.
    """

    def tile(rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor | float]:
        raw = logits[rows, columns].float()
        if softcap is None:
            return (raw * (1.0 / temperature)).clamp_(min=FLOOR), 1.0 / temperature
        return _soft_capped(raw, temperature, softcap, may_mask=True)

    result = _new_pass(logits)
    for rows in _slices(logits.shape[0], TILE_ROWS):
        running = _Running(rows.stop - rows.start, logits.device)
        for columns in _slices(logits.shape[1], TILE_COLUMNS):
            running.add(*tile(rows, columns), tokens[rows], columns)
        _store(result, rows, running.finish())
        if block is None:
            continue
        for columns in _slices(logits.shape[1], TILE_COLUMNS):
            z, slope = tile(rows, columns)
            delta = torch.exp(z - result.lse[rows, None]).neg_()
            block[rows, columns] = _set_target(delta, tokens[rows], columns, result.off_mass[rows]).mul_(slope)
    return result


def head_pass_with_sums(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        cu_seqlens: torch.Tensor, merge: Merge | None = None) -> tuple[TokenPass, torch.Tensor]:
    """The same, and per response Σ_t c_t ∂logp_t/∂raw: [R, V]. One product: a few rows' logits stay for the sweep.

    ``merge`` is called for every ``SUM_ROWS`` tokens.
    """
    n_responses, vocabulary = cu_seqlens.numel() - 1, slice(0, head.vocabulary_size)
    result = _new_pass(hidden)
    sums = torch.zeros(n_responses, head.vocabulary_size, device=hidden.device)
    token_index = torch.arange(hidden.shape[0], device=hidden.device)
    for rows in _slices(hidden.shape[0], SUM_ROWS):
        z, slope = _logits(hidden[rows], head, vocabulary)
        running = _Running(rows.stop - rows.start, hidden.device)
        running.add(z, slope, tokens[rows], vocabulary)
        _store(result, rows, running.finish())
        if merge is not None:
            _store(result, rows, merge(TokenPass(*(column[rows] for column in result)))[0])
        scores = torch.exp(z - result.lse[rows, None]).neg_()
        _set_target(scores, tokens[rows], vocabulary, result.off_mass[rows]).mul_(slope)
        inside = (token_index[rows] >= cu_seqlens[:-1, None]) & (token_index[rows] < cu_seqlens[1:, None])
        # A product, not a scatter: bitwise repeatable on a GPU, and few responses meet one chunk of rows.
        sums.addmm_(inside * coefficients[rows].float(), scores)
    return result, sums


# -- gradients --------------------------------------------------------------------------------------------------------


def head_pass_with_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, merge: Merge | None = None
                            ) -> tuple[TokenPass, torch.Tensor]:
    """``head_pass``, then ``hidden_gradient``; ``merge`` is called once."""
    token_pass = head_pass(hidden, tokens, head)
    token_pass = token_pass if merge is None else merge(token_pass)[0]
    return token_pass, hidden_gradient(hidden, tokens, head, token_pass)


def hidden_gradient(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass) -> torch.Tensor:
    """∂logp/∂hidden per token: [N, D] float32, in a second product with the recomputed tile."""
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for rows in _slices(hidden.shape[0], TILE_ROWS):
        for columns in _slices(head.vocabulary_size, TILE_COLUMNS):
            scores = _scores(hidden[rows], tokens[rows], head, columns, token_pass.lse[rows], token_pass.off_mass[rows])
            gradient[rows].addmm_(scores, head.weight[columns].float())
    return gradient


def linear_logprob_backward(grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, hidden: torch.Tensor,
                            tokens: torch.Tensor, head: Head, token_pass: TokenPass,
                            needs: tuple[bool, bool, bool]
                            ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of Σ grad_logp·logp + grad_entropy·H for (hidden, weight, bias), in float32.

    With p the softmax and δ the one-hot sampled token: ∂logp/∂z = δ − p, ∂H/∂z = −p (log p + H).
    """
    device = hidden.device
    of_hidden, of_weight, of_bias = (
        torch.zeros(like.shape, dtype=torch.float32, device=device) if needed and like is not None else None
        for like, needed in zip((hidden, head.weight, head.bias), needs, strict=True))
    for rows in _slices(hidden.shape[0], TILE_ROWS):
        for columns in _slices(head.vocabulary_size, TILE_COLUMNS):
            draw = _raw_gradient(grad_logp, grad_entropy, hidden, tokens, head, token_pass, rows, columns)
            if of_hidden is not None:
                of_hidden[rows].addmm_(draw, head.weight[columns].float())
            if of_weight is not None:
                of_weight[columns].addmm_(draw.T, hidden[rows].float())
            if of_bias is not None:
                of_bias[columns] += draw.sum(0)
    return of_hidden, of_weight, of_bias


def _raw_gradient(grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, hidden: torch.Tensor,
                  tokens: torch.Tensor, head: Head, token_pass: TokenPass, rows: slice, columns: slice) -> torch.Tensor:
    z, slope = _logits(hidden[rows], head, columns)
    log_p = z.sub_(token_pass.lse[rows, None])
    p = threshold_(torch.exp(log_p), NEGLIGIBLE, 0.0)
    gradient = torch.zeros_like(p)
    if grad_logp is not None:
        delta = _set_target(-p, tokens[rows], columns, token_pass.off_mass[rows])
        gradient.add_(delta.mul_(grad_logp[rows, None]))
    if grad_entropy is not None:
        spread = p * (log_p.clamp(min=-200.0) + token_pass.entropy[rows, None])
        gradient.sub_(spread.mul_(grad_entropy[rows, None]))
    return gradient.mul_(slope)


# -- Gram matrices of the head's weight gradients ---------------------------------------------------------------------


def head_pass_with_gram(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, coefficients: torch.Tensor,
                        groups: list[list[tuple[int, int]]], merge: Merge | None = None,
                        first_pass: Callable[..., TokenPass] = head_pass) -> tuple[TokenPass, list[torch.Tensor]]:
    """``first_pass``, then ``head_gram``; ``merge`` is called once."""
    token_pass = first_pass(hidden, tokens, head)
    token_pass = token_pass if merge is None else merge(token_pass)[0]
    return token_pass, head_gram(hidden, tokens, head, token_pass, coefficients, groups)


def through_head(sums: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sums @ weight, [R, V] float32 by [V, D], in float32; a half-precision weight is widened a few rows at a time."""
    if weight.dtype == torch.float32:
        return sums @ weight
    result = sums.new_zeros(sums.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], 8192):
        result.addmm_(sums[:, start:start + 8192], weight[start:start + 8192].float())
    return result


def head_gram(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, token_pass: TokenPass, coefficients: torch.Tensor,
              groups: list[list[tuple[int, int]]]) -> list[torch.Tensor]:
    """⟨G_i, G_j⟩ of the responses of each prompt, G_i = Σ_t c_t (∂logp_t/∂raw) h_tᵀ: one [n, n] float64 per prompt.

    ``groups`` holds per prompt its responses' (start, stop) token spans. With M tokens in a group, pairs of tokens
    cost M²(V + D) multiply-adds and forming the gradients tile by tile M·V·D: the cheaper one is taken. Either needs
    the logits once more (N·V·D), and neither stores anything of size V·D.
    """
    grams = []
    for spans in groups:
        index = torch.cat([torch.arange(a, b, device=hidden.device) for a, b in spans])
        bounds = torch.tensor([0] + [b - a for a, b in spans]).cumsum(0).tolist()
        part = (hidden[index], tokens[index], head, token_pass.lse[index], token_pass.off_mass[index],
                coefficients[index].float(), bounds)
        grams.append(_gram_of_pairs(*part) if len(index) <= head.hidden_size else _gram_of_tiles(*part))
    return grams


def _gram_of_pairs(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, lse: torch.Tensor, off_mass: torch.Tensor,
                   coefficients: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Σ_{t∈i, s∈j} c_t c_s ⟨∂logp_t, ∂logp_s⟩ ⟨h_t, h_s⟩."""
    n_tokens, n_responses = len(tokens), len(bounds) - 1
    pairs = torch.zeros(n_tokens, n_tokens, dtype=torch.float64, device=hidden.device)
    # Relative to its off-target mass every row is of order 1; what is 1e-15 of that changes no digit, and would make
    # the products of two such entries subnormal.
    scale = torch.where(off_mass > NEGLIGIBLE, 1.0 / off_mass, 0.0)[:, None]
    for columns in _slices(head.vocabulary_size, TILE_COLUMNS):
        unit = _scores(hidden, tokens, head, columns, lse, off_mass).mul_(scale)
        unit.masked_fill_(unit.abs() < 1e-15, 0.0)
        pairs += unit @ unit.T
    weighted = hidden.double() * (coefficients * off_mass).double()[:, None]
    pairs *= weighted @ weighted.T
    member = torch.zeros(n_responses, n_tokens, dtype=torch.float64, device=hidden.device)
    for i in range(n_responses):
        member[i, bounds[i]:bounds[i + 1]] = 1.0
    return member @ pairs @ member.T


def _gram_of_tiles(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, lse: torch.Tensor, off_mass: torch.Tensor,
                   coefficients: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Σ over vocabulary tiles of ⟨G_i tile, G_j tile⟩ with the tiles formed for all responses of the prompt."""
    n_responses = len(bounds) - 1
    gram = torch.zeros(n_responses, n_responses, dtype=torch.float64, device=hidden.device)
    width = max(1, min(head.vocabulary_size, GRAM_TILE_FLOATS // max(n_responses * head.hidden_size, len(tokens))))
    rows = hidden.float()
    for columns in _slices(head.vocabulary_size, width):
        scores = _scores(hidden, tokens, head, columns, lse, off_mass) * coefficients[:, None]
        tiles = torch.stack([(scores[a:b].T @ rows[a:b]).flatten()
                             for a, b in pairwise(bounds)])
        gram += tiles @ tiles.T
    return gram
