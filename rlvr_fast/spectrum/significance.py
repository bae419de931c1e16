"""Is there a gap at all? Randomisation tests that need no error bar, and the correction for asking often.

Near no gap the unbiased ‖g⁺ − g⁻‖² is a degenerate U-statistic: its distribution is a skewed mixture of χ², and its
jackknife error is no basis for a test. Relabelling is: if the verdicts say nothing about the gradients, every way to
call k of a prompt's n responses correct is equally likely, so the rank of the observed statistic among the relabelled
ones is a p-value, exact for any n, dimension and distribution. (The permutation test of the linear-kernel MMD.)

The statistic is studentised: T = unbiased gap² / (tr Σ̂₊/n₊ + tr Σ̂₋/n₋). Equal means with unequal spread are no gap, yet
break the symmetry of the labels. With the divisor mostly 0 to 7 % of such prompts are significant at 5 %, with
the plug-in gap² alone it can be 90 %. Weakest where the few scatter more: 9 % at 6 of 64 with twice the spread, 14 %
at 3 of 32; and 14 % at 4 of 8 where one class hardly scatters. (tests/test_spectrum_significance.py)
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

ROUNDING = 1e-9  # relative difference below which a relabelled statistic counts as equal to the observed one


class Relabelled(NamedTuple):
    """A prompt's statistic in units of its own null distribution, mean 0 and variance 1.

    observed: float. null: [m] float64, at every labelling (``exact``) or at as many random ones.
    """

    observed: float
    null: torch.Tensor
    exact: bool

    @property
    def p_value(self) -> float:
        return p_value(self.observed, self.null, self.exact)

    def draws(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """[n] independent draws from the null distribution."""
        if not self.exact:
            return self.null[:n]
        return self.null[torch.randint(len(self.null), (n,), generator=generator)]


def p_value(observed: float, null: torch.Tensor, exact: bool = False) -> float:
    """Share of the null values that reach the observed one, which is one of them [Phipson & Smyth 2010]."""
    reached = int((null >= observed - ROUNDING * max(1.0, abs(observed))).sum())
    return reached / len(null) if exact else (reached + 1) / (len(null) + 1)


def relabel(gram: torch.Tensor, correct: torch.Tensor, n_permutations: int, generator: torch.Generator) -> Relabelled:
    """The studentised gap² of one prompt at its own labels and at permutations of them.

    Args:
        gram: [n, n] float64 on the host. correct: [n] bool, both classes present.
        n_permutations: labellings to draw; all of them are taken where they are no more.
    """
    n, k = len(correct), int(correct.sum())
    exact = math.comb(n, k) <= n_permutations
    if exact:
        chosen = torch.tensor(list(itertools.combinations(range(n), k)))
    else:
        chosen = torch.rand(n_permutations, n, generator=generator, dtype=torch.float64).argsort(1)[:, :k]
    labels = torch.zeros(len(chosen) + 1, n, dtype=torch.float64).scatter_(
        1, torch.cat([correct.nonzero().T, chosen]), 1.0)
    statistic = studentised_gap_sq(gram, labels)
    null = statistic[1:]
    mean, spread = null.mean(), null.std(correction=0)
    if spread <= ROUNDING * null.abs().max():  # all labellings look alike
        return Relabelled(0.0, torch.zeros_like(null), exact)
    return Relabelled(float((statistic[0] - mean) / spread), (null - mean) / spread, exact)


def studentised_gap_sq(gram: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unbiased ‖g⁺ − g⁻‖² over its noise tr Σ̂₊/n₊ + tr Σ̂₋/n₋, for many labellings of the same n responses: [m].

    A class of one response has no noise of its own and takes that of the other class; 0 if both have one.

    Args:
        gram: [n, n] float64. labels: [m, n] float64, 1 for correct, the same number of them in every row.
    """
    n, n_correct = len(gram), labels[0].sum()
    mean = gram.mean(0)
    gram = gram - mean - mean[:, None] + mean.mean()  # about the prompt's mean: the gap is the same, the digits better
    along = labels @ gram
    rows, diagonal, correct_sq = along.sum(1), gram.diagonal(), (along * labels).sum(1)
    square = (correct_sq, gram.sum() - 2 * rows + correct_sq)  # ‖S₊‖², ‖S₋‖²
    cross = rows - correct_sq
    own = labels @ diagonal
    sizes = (n_correct, n - n_correct)
    known = [((q - s / size) / (size - 1)).clamp(min=0.0)
             for q, s, size in zip((own, diagonal.sum() - own), square, sizes, strict=True) if size > 1]
    if not known:
        return torch.zeros_like(rows)
    noise = known[0] / sizes[0] + known[-1] / sizes[1]  # with a single one known, both are it
    plug_in = square[0] / sizes[0] ** 2 + square[1] / sizes[1] ** 2 - 2 * cross / (sizes[0] * sizes[1])
    least = 1e-12 * diagonal.mean()  # classes without any spread: a large number instead of a division by 0
    return (plug_in - noise) / (noise + least) if least > 0 else torch.zeros_like(rows)


def shared_p_value(products: torch.Tensor, owner: torch.Tensor, n_flips: int, generator: torch.Generator) -> float:
    """Do different prompts have a gap in common? Sign-flip test of Σ_{p≠q} ⟨gap_p, gap_q⟩, one-sided.

    If the gaps of the prompts point nowhere in common, each is as likely as its opposite: the rank of the sum among
    those with random signs is the p-value. Exact for gaps that are symmetric about 0, in the limit of many prompts for
    others. NaN with fewer than two prompts.

    Args:
        products: [Q, Q] float64 inner products on the host, 0 where two are not to be paired.
        owner: [Q] int64, the prompt of each row. Rows of one prompt flip together: what they share makes no difference.
    """
    n_prompts = int(owner.max()) + 1 if len(owner) else 0
    if n_prompts < 2:
        return math.nan
    summed = torch.zeros(n_prompts, n_prompts, dtype=torch.float64)
    summed.index_put_((owner[:, None].expand_as(products), owner.expand_as(products)), products, accumulate=True)
    exact = 2 ** (n_prompts - 1) <= n_flips  # all signs at once change nothing: the first is fixed
    if exact:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=n_prompts - 1)), dtype=torch.float64)
        signs = torch.cat([torch.ones(len(signs), 1, dtype=torch.float64), signs], 1)
    else:
        signs = torch.randint(2, (n_flips, n_prompts), generator=generator).double() * 2 - 1
    scale = summed.abs().sum()
    if scale == 0:
        return math.nan
    null = ((signs @ summed) * signs).sum(1) / scale
    return p_value(float(summed.sum() / scale), null, exact)


def adjust(p_values: torch.Tensor, correction: str) -> torch.Tensor:
    """Adjusted p-values over those that are not NaN: reject where they are at most 1 − confidence.

    "holm" bounds the chance of a single false rejection, for any dependence [Holm 1979]; "benjamini-hochberg" the
    expected share of false ones among the rejected, for independent or positively dependent tests [Benjamini &
    Hochberg 1995]; "none" leaves them.
    """
    result = p_values.clone()
    tested = p_values.isfinite().nonzero().squeeze(1)
    p, order = p_values[tested].sort()
    n = len(p)
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    if correction == "holm":
        p = (p * (n + 1 - rank)).cummax(0).values if n else p
    elif correction == "benjamini-hochberg":
        p = (p * n / rank).flip(0).cummin(0).values.flip(0) if n else p
    result[tested[order]] = p.clamp(max=1.0)
    return result
