"""Gap norms, their bias correction and their error bars, from moments alone. Sources: rlvr_fast.reference."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlvr_fast.moments import Moments


class GapEstimate(NamedTuple):
    """Per prompt, each [P]; float64 unless said. Norms, errors and bias are NaN where a class is empty, and where a
    class of one response finds no other prompt to borrow noise from.

    n_correct, n_incorrect: int64 class sizes.
    norm_sq: unbiased ‖g⁺ − g⁻‖² (can be negative). norm_sq_naive: the plug-in value.
    stderr: standard error of ``norm_sq``. bias: naive − unbiased, the noise that was taken off.
    defined: bool, both classes present. pooled: bool, a class of one response borrowed the other prompts' noise.
    """

    n_correct: torch.Tensor
    n_incorrect: torch.Tensor
    norm_sq: torch.Tensor
    norm_sq_naive: torch.Tensor
    stderr: torch.Tensor
    bias: torch.Tensor
    defined: torch.Tensor
    pooled: torch.Tensor


class Estimated:
    """The fields of ``self.estimate``, a GapEstimate, under their own names: what every kind of gap reports."""

    estimate: GapEstimate

    @property
    def n_correct(self) -> torch.Tensor:
        return self.estimate.n_correct

    @property
    def n_incorrect(self) -> torch.Tensor:
        return self.estimate.n_incorrect

    @property
    def norm_sq(self) -> torch.Tensor:
        return self.estimate.norm_sq

    @property
    def norm_sq_naive(self) -> torch.Tensor:
        return self.estimate.norm_sq_naive

    @property
    def stderr(self) -> torch.Tensor:
        return self.estimate.stderr

    @property
    def defined(self) -> torch.Tensor:
        return self.estimate.defined

    @property
    def pooled(self) -> torch.Tensor:
        return self.estimate.pooled

    @property
    def success_rate(self) -> torch.Tensor:
        return self.n_correct.double() / (self.n_correct + self.n_incorrect)


def estimate_gap(moments: Moments) -> GapEstimate:
    """Unbiased squared gap norm of every prompt with its jackknife error.

    Where there is no gap the jackknife is conservative: its variance is 2 to 2.6 times the true one at 4 or more
    responses per class. A class of one response has no noise estimate of its own. It borrows tr Σ of its class pooled
    over the other prompts, and its share of the variance is 4 gap² tr Σ + 2 (tr Σ)² in place of a jackknife: an upper
    bound for normal noise, not for heavier tails.
    """
    n = moments.count
    square, product = moments.square, moments.product
    total_sq, cross = product.diagonal(dim1=1, dim2=2), product[:, 0, 1]

    defined = (n > 0).all(1)
    single = n == 1
    noise = class_noise(square, total_sq, n)

    naive = torch.where(defined, (total_sq / n.square()).sum(1) - 2 * cross / n.prod(1), torch.nan)
    bias = torch.where(defined, (noise / n).sum(1), torch.nan)
    unbiased = naive - bias
    variance = _jackknife(moments, n, square, total_sq, cross, noise)
    bound = 4 * unbiased.clamp(min=0.0)[:, None] * noise + 2 * noise.square()
    variance = torch.where(single, bound, variance).sum(1)
    return GapEstimate(n[:, 1].long(), n[:, 0].long(), unbiased, naive, variance.sqrt(), bias, defined,
                       defined & single.any(1))


def class_noise(square: torch.Tensor, total_sq: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """[P, 2] tr Σ̂ = (Q − ‖S‖²/n)/(n − 1) of each class, 0 (not a rounding below it) where its responses are equal.

    A class of one response has that of its class pooled over the prompts with at least two; NaN if there is none, and
    for an empty class.

    Args:
        square: [P, 2] Q. total_sq: [P, 2] ‖S‖². n: [P, 2].
    """
    rich = n >= 2
    own = torch.where(rich, ((square - total_sq / n) / (n - 1)).clamp(min=0.0), torch.nan)
    spread = torch.where(rich, (square - total_sq / n).clamp(min=0.0), 0.0).sum(0, keepdim=True)
    freedom = torch.where(rich, n - 1, 0.0).sum(0, keepdim=True)
    return torch.where(n == 1, torch.where(freedom > 0, spread / freedom, torch.nan), own)


def _jackknife(moments: Moments, n: torch.Tensor, square: torch.Tensor, total_sq: torch.Tensor, cross: torch.Tensor,
               noise: torch.Tensor) -> torch.Tensor:
    """[P, 2]: the two classes' shares of the variance, (n−1)/n Σ_i (θ₍₋ᵢ₎ − mean)²."""
    responses = moments.responses
    prompt, own = responses.prompt_index, responses.correct.long()
    other = 1 - own
    left = n[prompt, own] - 1
    n_other = n[prompt, other]
    dot_own = moments.dot_class.gather(1, own[:, None])[:, 0]
    dot_other = moments.dot_class.gather(1, other[:, None])[:, 0]
    left_total_sq = total_sq[prompt, own] - 2 * dot_own + moments.sq
    left_cross = cross[prompt] - dot_other
    left_noise = torch.where(left >= 2, (square[prompt, own] - moments.sq - left_total_sq / left) / (left - 1),
                             noise[prompt, own])
    # What the other class contributes by itself is the same in every replicate and drops out.
    replicate = left_total_sq / left.square() - 2 * left_cross / (left * n_other) - left_noise / left
    usable = (left >= 1) & (n_other >= 1)
    replicate = torch.where(usable, replicate, 0.0)
    mean = responses.class_sum(replicate) / n
    deviation = torch.where(usable, replicate - mean[prompt, own], 0.0)
    share = responses.class_sum(deviation.square()) * (n - 1) / n
    return torch.where((n >= 2) & (n.flip(1) >= 1), share, torch.nan)
