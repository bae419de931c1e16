"""log π(o_i) of each response in a forward, from the log-probs of its tokens."""

from __future__ import annotations

import torch

from rlvr_fast import _validate as check
from rlvr_fast.model_gap.micro_batch import MicroBatch
from rlvr_fast.rollouts import Rollouts


def response_totals(rollouts: Rollouts, batch: MicroBatch, logp: torch.Tensor,
                    mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Σ_t log p_t per response of the forward, R_m scalars with a graph. Layouts as in ``ModelGap.backward``.

    Raises:
        ValueError, TypeError: if ``logp`` has no graph or does not hold the responses' tokens.
    """
    check.tensor("logp", logp, dtypes=(*check.FLOAT_DTYPES, torch.float64))
    if not logp.requires_grad:
        raise ValueError(f"logp must have a graph (requires_grad), got {check.describe(logp)} without one")
    lengths = batch.lengths
    if mask is not None:
        check.tensor("mask", mask, shape=tuple(logp.shape), device=logp.device)
        if logp.ndim != 2 or len(logp) != len(lengths):
            raise ValueError(f"logp must have shape [{len(lengths)}, T'] with a mask, got {check.describe(logp)}")
        mask = mask.bool()
        if mask.device.type == "cpu" and mask.sum(1).tolist() != lengths:
            raise ValueError(f"mask must be true on the {check.describe(lengths)} tokens of the forward's responses, "
                             f"got {check.describe(mask.sum(1).tolist())}")
        return list(torch.where(mask, logp, 0.0).sum(1))
    if batch.responses == tuple(range(rollouts.n_responses)):
        logp = rollouts.pack(logp, "logp")
    if tuple(logp.shape) != (sum(lengths),):
        raise ValueError(f"logp must have shape [{sum(lengths)}] (the forward's response tokens in rollout order), or "
                         f"come with a mask; got {check.describe(logp)}")
    return [part.sum() for part in logp.split(lengths)]
