"""The figures of a batch: the weighted mean of its prompts' gap vectors, and the metrics of their gaps.

The mean's norm comes from the vectors' inner products. These add over coordinates, so vectors whose coordinates are
sharded over ranks give the same figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlvr_fast.moments import GRAM_COLUMNS, Moments

if TYPE_CHECKING:
    from rlvr_fast.gap import Gap


def vector_products(vectors: torch.Tensor) -> torch.Tensor:
    """⟨v_p, v_q⟩ of the rows [P, K], in float64: [P, P]. A row of NaN, a prompt without a gap, counts as 0."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[1], GRAM_COLUMNS):
        part = vectors[:, start:start + GRAM_COLUMNS].double()
        part = torch.where(part.isnan(), 0.0, part)
        products += part @ part.T
    return products


def batch_norm_sq(products: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """θ = ‖Σ w ĝ‖² − Σ w² bias with w summing to 1, and its delete-one-prompt jackknife error [derived].

    Args:
        products: [P, P] float64 ⟨ĝ_p, ĝ_q⟩. bias: [P] float64, what noise adds to each ‖ĝ_p‖². weights: [P] float64.
    """
    total, used = weights.sum(), (weights != 0).sum()
    weighted = weights[:, None] * products * weights
    rows, noise = weighted.sum(1), weights.square() * bias
    theta = (rows.sum() - noise.sum()) / total.square()
    # Without prompt p: no row and no column p. Taken out of the other rows, not out of the total, whose digits a
    # prompt that dominates it would take along.
    itself = torch.eye(len(weights), dtype=torch.bool, device=weights.device)
    left = (rows[:, None] - weighted - noise[:, None]).masked_fill(itself, 0.0).sum(0) / (total - weights).square()
    centred = torch.where(weights != 0, left, 0.0)
    centred = torch.where(weights != 0, left - centred.sum() / used, 0.0)
    variance = centred.square().sum() * (used - 1) / used
    return theta, torch.where(used >= 2, variance.sqrt(), torch.nan)


def batch_summary(gap: Gap) -> dict[str, float]:
    """What ``Gap.summary`` returns."""
    defined, n = gap.defined, len(gap.prompt_ids)
    usable = defined & gap.norm_sq.isfinite()
    count = int(usable.sum())
    rate = gap.success_rate

    def mean(values: torch.Tensor) -> float:
        return float(values[usable].mean()) if count else float("nan")

    def share(mask: torch.Tensor) -> float:
        return float(mask.double().mean()) if n else float("nan")

    norm_sq = mean(gap.norm_sq)
    stderr = float(gap.stderr[usable].square().sum().sqrt() / count) if count else float("nan")
    result = {
        "rlvr/gap/norm": max(norm_sq, 0.0) ** 0.5 if count else float("nan"),
        "rlvr/gap/norm_sq": norm_sq,
        "rlvr/gap/norm_sq_stderr": stderr,
        "rlvr/gap/norm_sq_naive": mean(gap.norm_sq_naive),
        "rlvr/gap/energy_pos": _energy(gap.moments, 1),
        "rlvr/gap/energy_neg": _energy(gap.moments, 0),
        "rlvr/signal_to_noise": norm_sq / mean(gap.estimate.bias) if count and mean(gap.estimate.bias) > 0
        else float("nan"),
        "rlvr/group/frac_mixed": share(defined),
        "rlvr/group/frac_solved": share(rate == 1),
        "rlvr/group/frac_failed": share(rate == 0),
        "rlvr/group/frac_pooled": share(gap.pooled),
        "rlvr/group/p_mean": float(rate.mean()) if n else float("nan"),
    }
    if gap.vector is not None:
        batch, batch_stderr = (float(value) for value in gap.batch_norm_sq())
        result["rlvr/gap/batch_norm_sq"], result["rlvr/gap/batch_norm_sq_stderr"] = batch, batch_stderr
    return result


def _energy(moments: Moments, which: int) -> float:
    """Mean ‖G_i‖² over the responses of one class."""
    n, square = moments.count[:, which].sum(), moments.square[:, which].sum()
    return float(square / n) if n > 0 else float("nan")
