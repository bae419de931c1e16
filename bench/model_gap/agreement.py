"""How well one column of numbers stands for another: rank correlation with a bootstrap, ratios, alignment of Grams."""

from __future__ import annotations

import numpy as np
import torch

RESAMPLES = 4000


def ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks along the last axis; only their order matters. [..., P] -> [..., P]."""
    below = (values[..., :, None] > values[..., None, :]).sum(-1)
    equal = (values[..., :, None] == values[..., None, :]).sum(-1)
    return below + 0.5 * equal


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis; NaN where one side is constant."""
    x, y = (ranks(side) - ranks(side).mean(-1, keepdims=True) for side in (x, y))
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def rank_correlation(x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Spearman's over P prompts and the 95 % interval of a bootstrap that resamples prompts (percentiles)."""
    picks = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.nanpercentile(spearman(x[picks], y[picks]), (2.5, 97.5))
    return {"spearman": float(spearman(x, y)), "low": float(low), "high": float(high)}


def ratio(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spread of x / y over the prompts where both are positive; ``spread`` is the p80 over the p20."""
    both = (x > 0) & (y > 0)
    p20, median, p80 = np.percentile(x[both] / y[both], (20, 50, 80))
    return {"p20": float(p20), "median": float(median), "p80": float(p80), "spread": float(p80 / p20),
            "prompts": int(both.sum())}


def alignment(left: torch.Tensor, right: torch.Tensor) -> float:
    """Centred kernel alignment of two Gram matrices [n, n]: 1 if the responses have the same geometry in both."""
    centred = [gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean() for gram in (left.double(), right.double())]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))
