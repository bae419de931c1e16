"""The coefficients of the responses where no rank has all of the logits' gradient: a vocabulary-parallel lm_head.

What ``coefficients`` looks at, a few logits of every token, their gradients and the sum of these, is a sum over the
shards of the vocabulary (or of the hidden width). Every rank keeps its terms, which add up with everything else of the
step; the coefficients are then those of a head that has no entries but these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlvr_fast.model_gap.coefficients import (
    TOLERANCE,
    HeadRows,
    _columns,
    _targets,
    observe,
    token_coefficients,
)
from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.model_gap.tensor_parallel.layers import Part, TensorParallel, waited
from rlvr_fast.rollouts import Rollouts

if TYPE_CHECKING:
    from rlvr_fast.model_gap.tap import Site

READINGS = 2  # ways in which the rows of one call can be read, at most
ELSEWHERE = -1e4  # a logit without weight in any softmax


@dataclass(frozen=True, eq=False)
class HeadSamples:
    """This rank's terms for the rows of one call of the lm_head, M rows.

    Attributes:
        readings: the target of each row, for every way in which the rows can be read: [M] each.
        terms: [M, sample_width]: the logits of the columns, their gradients, the gradients' sum over the
            vocabulary, and per reading the target's logit and gradient.
    """

    micro_batch: MicroBatch
    spans: Spans
    columns: torch.Tensor
    readings: list[torch.Tensor]
    terms: torch.Tensor
    dtype: torch.dtype
    temperature: float

    def complete(self, terms: torch.Tensor) -> HeadRows:
        """What the head saw, from the sum of all ranks' terms."""
        n = len(self.columns)
        terms = terms.to(torch.promote_types(torch.float32, self.dtype))
        z, g, total, own = terms[:, :n], terms[:, n:2 * n], terms[:, 2 * n], terms[:, 2 * n + 1:]
        readings = []
        for which, targets in enumerate(self.readings):
            z_y, g_y = own[:, 2 * which], own[:, 2 * which + 1]
            same = self.columns == targets.clamp(min=0)[:, None]  # a column that is the target counts as target only
            g_other = torch.where(same, 0.0, g)
            logits = torch.cat([z_y[:, None], torch.where(same, ELSEWHERE, z), torch.zeros_like(z_y)[:, None]], 1)
            gradient = torch.cat([g_y[:, None], g_other, (total - g_y - g_other.sum(1))[:, None]], 1).to(self.dtype)
            entries = torch.arange(1, n + 1, device=terms.device)
            identity = torch.eye(n + 2, dtype=terms.dtype, device=terms.device)
            readings.append((targets, *token_coefficients(logits, gradient, identity, None, torch.zeros_like(targets),
                                                          entries, self.temperature)))
        return HeadRows(self.micro_batch, self.spans, readings, TOLERANCE[self.dtype])


def observe_spread_head(site: Site, spread: TensorParallel, micro_batch: MicroBatch, leading: torch.Size, spans: Spans,
                        hidden: torch.Tensor, gradient: torch.Tensor) -> None:
    """As ``Recording.observe_head``, for a model whose layers are spread over ranks; local tensors."""
    recording = site.recording
    if site.module is not recording.lm_head or micro_batch.probed:
        return
    weight, bias = waited(site.weight.detach()), None if site.bias is None else waited(site.bias.detach())
    hidden, gradient = hidden.reshape(-1, hidden.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    part = spread.head_part(site.weight)
    if part.kind == "shard":
        spread.heads.append(sample(micro_batch, leading, spans, hidden, gradient, weight, bias, part, spread.rank == 0,
                                   recording.temperature))
    else:
        recording.observed.append(observe(micro_batch, leading, spans, hidden, gradient, weight, bias,
                                          recording.temperature))


def sample_width(rollouts: Rollouts) -> int:
    """Floats per row of ``HeadSamples.terms``."""
    return 2 * len(_columns(rollouts)) + 1 + 2 * READINGS


def sample(micro_batch: MicroBatch, leading: torch.Size, spans: Spans, hidden: torch.Tensor, gradient: torch.Tensor,
           weight: torch.Tensor, bias: torch.Tensor | None, part: Part, first_rank: bool,
           temperature: float) -> HeadSamples:
    """This rank's terms: hidden [M, D] and gradient [M, V] as far as they are here, and the part of the weight.

    A head spread over the hidden width has the same gradient (and bias) on all ranks: ``first_rank`` counts it.
    """
    dtype = torch.promote_types(torch.float32, gradient.dtype)
    columns, wide = _columns(micro_batch.rollouts), hidden.to(dtype)
    counted = float(first_rank or part.sizes[0] != part.shape[0])

    def terms(ids: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor],
              entries: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        local, here = part.local_rows(ids)
        z = logits(weight[local].to(hidden.dtype).to(dtype))  # as autocast hands them over
        if bias is not None:
            z = z + counted * bias[local].to(dtype)
        return torch.where(here, z, 0.0), torch.where(here, counted * entries(local).to(dtype), 0.0)

    z, g = terms(columns, lambda rows: wide @ rows.T, lambda local: gradient[:, local])
    found = [z, g, counted * gradient.sum(1, dtype=dtype)[:, None]]
    readings = _targets(micro_batch, leading, len(hidden))
    for targets in readings:
        found += [x[:, None] for x in terms(targets.clamp(min=0), lambda rows: (wide * rows).sum(1),
                                            lambda local: gradient.gather(1, local[:, None]).squeeze(1))]
    flat = torch.cat(found, 1)
    padded = torch.nn.functional.pad(flat, (0, sample_width(micro_batch.rollouts) - flat.shape[1]))
    return HeadSamples(micro_batch, spans, columns, readings, padded, gradient.dtype, temperature)
