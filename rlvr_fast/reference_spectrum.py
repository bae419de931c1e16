"""The difficulty spectrum in float64, one short function per quantity, from vectors, with loops: its specification."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch

Tensor = torch.Tensor


# -- success rates ----------------------------------------------------------------------------------------------------


def wilson_interval(n_correct: float, n: float, z: float) -> tuple[float, float]:
    """The rates J with |p̂ − J| ≤ z √(J (1−J) / n), solved for J [Wilson 1927]."""
    p, share = n_correct / n, z * z / n
    centre = (p + share / 2) / (1 + share)
    half = math.sqrt(p * (1 - p) * share + share * share / 4) / (1 + share)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def design_effect(n_correct: Sequence[float], n: Sequence[float]) -> float:
    """Variance of the pooled rate, prompts as clusters, over that of independent rollouts; at least 1 [Kish 1965]."""
    clusters, total = len(n), sum(n)
    rate = sum(n_correct) / total
    if clusters < 2 or rate in (0, 1):
        return 1.0
    spread = sum((k - rate * m) ** 2 for k, m in zip(n_correct, n, strict=True))
    variance = clusters / (clusters - 1) * spread / total**2
    return max(1.0, variance / (rate * (1 - rate) / total))


# -- is there a gap ---------------------------------------------------------------------------------------------------


def noise(vectors: Tensor) -> float:
    """tr Σ̂ = Σ ‖G_i − Ḡ‖² / (n − 1)."""
    return float((vectors - vectors.mean(0)).square().sum() / (len(vectors) - 1))


def studentised_gap_sq(vectors: Tensor, correct: Tensor) -> float:
    """(‖Ḡ₊ − Ḡ₋‖² − v) / v with v = tr Σ̂₊/n₊ + tr Σ̂₋/n₋; a class of one response takes the noise of the other."""
    classes = [vectors[correct].double(), vectors[~correct].double()]
    known = [noise(own) for own in classes if len(own) > 1]
    if not known:
        return 0.0
    traces = [noise(own) if len(own) > 1 else known[0] for own in classes]
    v = sum(trace / len(own) for trace, own in zip(traces, classes, strict=True))
    return float((classes[0].mean(0) - classes[1].mean(0)).square().sum() - v) / v


def permutation_p_value(vectors: Tensor, correct: Tensor) -> float:
    """Share of all labellings with as many correct responses whose statistic reaches the observed one."""
    observed, reached, count = studentised_gap_sq(vectors, correct), 0, 0
    for chosen in itertools.combinations(range(len(correct)), int(correct.sum())):
        labels = torch.zeros_like(correct)
        labels[list(chosen)] = True
        reached += studentised_gap_sq(vectors, labels) >= observed - 1e-9 * max(1.0, abs(observed))
        count += 1
    return reached / count


def sign_flip_p_value(gaps: Tensor) -> float:
    """Share of all sign patterns ε with Σ_{p≠q} ε_p ε_q ⟨g_p, g_q⟩ at least the observed sum."""
    def statistic(vectors: Tensor) -> float:
        return float(vectors.sum(0).square().sum() - vectors.square().sum())
    patterns = list(itertools.product((1.0, -1.0), repeat=len(gaps)))
    observed = statistic(gaps.double())
    reached = sum(statistic(gaps.double() * torch.tensor(signs, dtype=torch.float64)[:, None]) >= observed - 1e-9
                  for signs in patterns)
    return reached / len(patterns)


def benjamini_hochberg(p_values: Sequence[float], level: float) -> set[int]:
    """Reject the k smallest, for the largest k with p₍k₎ ≤ level k/n [Benjamini & Hochberg 1995]."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    passing = [k for k in range(1, len(order) + 1) if p_values[order[k - 1]] <= level * k / len(order)]
    return set(order[:max(passing, default=0)])


def holm(p_values: Sequence[float], level: float) -> set[int]:
    """Reject from the smallest on while p₍k₎ ≤ level/(n − k + 1) [Holm 1979]."""
    order, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
    for k, i in enumerate(order):
        if p_values[i] > level / (len(order) - k):
            break
        rejected.add(i)
    return rejected


# -- what the bins add ------------------------------------------------------------------------------------------------


def shared_norm_sq(gaps: Tensor, factors: Tensor) -> float:
    """Mean of f_p f_q ⟨g_p, g_q⟩ over the pairs p ≠ q: ‖E f g‖² without bias, as prompts are independent [derived]."""
    pairs = [float(factors[p] * factors[q] * (gaps[p].double() @ gaps[q].double()))
             for p, q in itertools.permutations(range(len(gaps)), 2)]
    return sum(pairs) / len(pairs)


def jackknife(statistic: Callable[[list[int]], float], n: int) -> float:
    """√((n−1)/n Σ_i (θ₍₋ᵢ₎ − mean)²), with ``statistic`` a function of the indices that are left in."""
    left = [statistic([j for j in range(n) if j != i]) for i in range(n)]
    mean = sum(left) / n
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left))


def batch_share(gaps: Tensor, weights: Tensor, bias: Tensor, members: Sequence[int]) -> float:
    """⟨Σ_{p∈bin} w_p g_p, Σ_q w_q g_q⟩ over ‖Σ_q w_q g_q‖², each without the noise w_p² bias_p [derived]."""
    step = (weights[:, None] * gaps.double()).sum(0)

    def along(indices: Iterable[int]) -> float:
        return sum(float(weights[p] * (gaps[p].double() @ step) - weights[p] ** 2 * bias[p]) for p in indices)
    return along(members) / along(range(len(gaps)))


def mixture(signal: Sequence[float], stderr: Sequence[float], cost: Sequence[float], base: Sequence[float],
            floor: float) -> list[float]:
    """(1 − floor) q √(s/c) / Σ q √(s/c) + floor q with s shrunk to s (1 − stderr²/s²), at least 0 [derived]."""
    weights = []
    for s, error, c, q in zip(signal, stderr, cost, base, strict=True):
        shrunk = s - error**2 / s if s > error >= 0 else 0.0
        weights.append(q * math.sqrt(shrunk / c))
    if sum(weights) == 0:
        return list(base)
    return [(1 - floor) * w / sum(weights) + floor * q for w, q in zip(weights, base, strict=True)]
