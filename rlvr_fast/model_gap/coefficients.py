"""The coefficient of every response in the training loss, read off the gradient of the logits.

Where a loss is a function of the sampled tokens' log-probs alone, the gradient of token t's logits is
g_t = c_t (e_y − p_t) / T. Two entries and their logits give c_t without a pass over the vocabulary [derived]: for any
v ≠ y, −T g_v e^{(z_y − z_v)/T} = c_t p_y and T g_y = c_t (1 − p_y). Entropy or full-vocabulary KL terms, another
temperature or a soft cap break the ratios g_v / g_u = e^{(z_v − z_u)/T}; a term that pulls all logits breaks
Σ_v g_v = 0. With c_t the same for all tokens of response i, what the backward brings to any layer is c_i times that of
log π(o_i).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.rollouts import Rollouts

N_COLUMNS = 8  # vocabulary entries compared per token, besides its own
# How far c_t may stray within a response and g from its form: rounding of logits of magnitude 30 and of g itself.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class NotConstant(Exception):
    """The training backward is not a multiple of ∇log π, response by response."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What the lm_head saw in one backward; the last three [M] on the device, one set per reading of its rows.

    spans: rows of each response. readings: (targets, coefficient, residual) tuples. tolerance: see TOLERANCE.
    """

    micro_batch: MicroBatch
    spans: Spans
    readings: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    tolerance: float


def observe(micro_batch: MicroBatch, leading: torch.Size, spans: Spans, hidden: torch.Tensor, gradient: torch.Tensor,
            weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> HeadRows:
    """Coefficients of all rows of the lm_head: hidden [M, D], gradient of the logits [M, V]. No synchronisation."""
    columns = _columns(micro_batch.rollouts)
    readings = []
    for targets in _targets(micro_batch, leading, len(hidden)):
        readings.append((targets, *token_coefficients(hidden, gradient, weight, bias, targets, columns, temperature)))
    return HeadRows(micro_batch, spans, readings, TOLERANCE[gradient.dtype])


def token_coefficients(hidden: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                       targets: torch.Tensor, columns: torch.Tensor, temperature: float
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    """c_t and how far g_t is from c_t (e_y − p_t) / T, relative: [M] each, 0 where g_t = 0."""
    dtype = torch.promote_types(torch.float32, gradient.dtype)
    y = targets.clamp(min=0)
    rows, shared = (weight[ids].to(hidden.dtype).to(dtype) for ids in (y, columns))  # as autocast hands them over
    z_y, z = (hidden.to(dtype) * rows).sum(1), hidden.to(dtype) @ shared.T
    if bias is not None:
        z_y, z = z_y + bias[y].to(dtype), z + bias[columns].to(dtype)
    z_y, z = (x.to(gradient.dtype).to(dtype) / temperature for x in (z_y, z))  # rounded as the model rounded them
    g_y = gradient.gather(1, y[:, None]).squeeze(1).to(dtype)
    own = columns == y[:, None]
    g = torch.where(own, 0.0, gradient[:, columns].to(dtype))
    anchor = g.abs().argmax(1, keepdim=True)
    g_a, z_a = g.gather(1, anchor), z.gather(1, anchor)
    on_target = -g_a.sign() * (g_a.abs().log() + z_y[:, None] - z_a).exp()
    c = temperature * (g_y + torch.where(g_a == 0, 0.0, on_target).squeeze(1))

    predicted = g_a * (z - z_a).exp()
    size = g.abs() + predicted.abs()
    seen = ~own & (size > torch.finfo(gradient.dtype).tiny * 1e4)
    shape_error = torch.where(seen, (g - predicted).abs() / size, 0.0).amax(1)
    pull = temperature * gradient.sum(1, dtype=dtype).abs() / c.abs()
    return c, torch.where(c == 0, g_y.abs(), torch.maximum(shape_error, pull))


def response_coefficients(rollouts: Rollouts, observed: list[HeadRows]) -> torch.Tensor:
    """c_i of the responses that ``observed`` holds, NaN elsewhere: [R] float64 on the host. Synchronises.

    Raises:
        NotConstant: saying which response and why.
    """
    result = torch.full((rollouts.n_responses,), torch.nan, dtype=torch.float64)
    for rows in observed:
        failures = []
        for reading in rows.readings:
            try:
                result[list(rows.micro_batch.responses)] = _constants(rollouts, rows, *(x.cpu() for x in reading))
                break
            except NotConstant as failure:
                failures.append(failure)
        else:
            raise failures[0] if failures else NotConstant("the lm_head's rows could not be matched to tokens "
                                                           "(inputs_embeds, or an unknown layout)")
    return result


def _constants(rollouts: Rollouts, rows: HeadRows, targets: torch.Tensor, coefficients: torch.Tensor,
               residuals: torch.Tensor) -> torch.Tensor:
    constants = torch.ones(len(rows.spans), dtype=torch.float64)
    tokens = rollouts.tokens.cpu()
    for place, (response, (start, stop)) in enumerate(zip(rows.micro_batch.responses, rows.spans, strict=True)):
        own = tokens[rollouts.bounds[response]:rollouts.bounds[response + 1]]
        c = coefficients[start:stop].double()
        active = (c != 0) | (residuals[start:stop] != 0)
        if not active.any():
            constants[place] = 1.0 if len(own) == 0 else 0.0
            continue
        found = targets[start:stop][active]
        if not torch.equal(found, own):
            raise NotConstant(f"response {response}: {len(found)} positions carry a gradient, and they are not its "
                              f"{len(own)} tokens (clipped tokens, a loss on prompt tokens?)")
        c, worst = c[active], float(residuals[start:stop][active].max())
        constants[place] = c.mean()
        spread = float((c / c.mean() - 1).abs().max())
        if not worst <= rows.tolerance:
            raise NotConstant(f"response {response}: the gradient of the logits is not a multiple of e_y − p, off by "
                              f"{worst:.2g} (an entropy or KL term, another temperature, a soft cap?)")
        if not spread <= rows.tolerance:
            raise NotConstant(f"response {response}: its tokens have different coefficients, by {spread:.2g} "
                              "(importance ratios, per-token advantages or KL?)")
    return constants


def _columns(rollouts: Rollouts) -> torch.Tensor:
    """A few vocabulary entries that the policy gives weight to: sampled tokens, evenly picked."""
    fixed = torch.arange(2, device=rollouts.device)  # at least one entry differs from any target
    if rollouts.n_tokens == 0:
        return fixed
    picks = torch.arange(N_COLUMNS, device=rollouts.device) * (rollouts.n_tokens - 1) // (N_COLUMNS - 1)
    return torch.cat([rollouts.tokens[picks], fixed])


def _targets(micro_batch: MicroBatch, leading: torch.Size, n_rows: int) -> list[torch.Tensor]:
    """The token that each row of the lm_head predicts, for every way in which its rows can be read."""
    after, rollouts = micro_batch.next_tokens, micro_batch.rollouts
    if after is not None and n_rows == len(after):
        return [after]
    if n_rows == micro_batch.n_tokens:
        return [torch.cat([rollouts.tokens[rollouts.bounds[i]:rollouts.bounds[i + 1]]
                           for i in micro_batch.responses])]
    if after is None or micro_batch.packed or len(leading) != 2 or not 0 < leading[1] < micro_batch.bounds[1]:
        return []
    table = after.view(leading[0], -1)  # the last K positions, or all but the last
    readings = [table[:, -leading[1]:].reshape(-1)]
    if leading[1] == table.shape[1] - 1:
        readings.append(table[:, :-1].reshape(-1))
    return readings
