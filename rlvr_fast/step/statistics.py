"""Sums over the responses of each prompt and class, and the estimators of the step-size figures built from them."""

from __future__ import annotations

import math

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.segments import Segments

LOGP_DTYPES = (*check.FLOAT_DTYPES, torch.float64)
LOGP_ROUNDING = 0.01  # a log-prob may exceed 0 by what rounding does to it, no more


def log_ratios(before: torch.Tensor, after: torch.Tensor, reverse: torch.Tensor | None, rollouts: Rollouts,
               backend: str) -> torch.Tensor:
    """[R, 2] float64: per response Σ_t(after − before) and Σ_t(reverse − before), 0 where ``reverse`` is None."""
    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts must be Rollouts, got {check.describe(rollouts)}")
    backend = backends.resolve(backend, rollouts.device)
    before = _log_probs("logp_before", before, rollouts)
    after = _log_probs("logp_after", after, rollouts)
    reverse = None if reverse is None else _log_probs("logp_reverse", reverse, rollouts)
    if backend == "triton":
        return _triton_sums(before, after, reverse, rollouts.cu_seqlens)
    forward = _torch_sums(before, after, rollouts.lengths)
    backward = torch.zeros_like(forward) if reverse is None else _torch_sums(before, reverse, rollouts.lengths)
    return torch.stack([forward, backward], 1)


def _log_probs(name: str, logp: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    check.tensor(name, logp, dtypes=LOGP_DTYPES, device=rollouts.device)
    packed = check.tensor(name, rollouts.pack(logp, name), ndim=1).detach()
    if packed.device.type == "cpu":  # looking at a device tensor would synchronise
        bad = ~(packed.isfinite() & (packed <= LOGP_ROUNDING))
        if bad.any():
            raise ValueError(f"{name} must be log-probabilities, finite and never above 0, "
                             f"got {packed[bad][0].item():.4g} ({int(bad.sum())} such)")
    return packed


def _torch_sums(before: torch.Tensor, after: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    # unsafe skips a check of the lengths against N that synchronises; Rollouts guarantees it
    return torch.segment_reduce(after.double() - before.double(), "sum", lengths=lengths, unsafe=True)


def _triton_sums(before: torch.Tensor, after: torch.Tensor, reverse: torch.Tensor | None,
                 cu_seqlens: torch.Tensor) -> torch.Tensor:
    from rlvr_fast.kernels.log_ratio_moments import log_ratio_sums  # triton is not installed everywhere
    reverse = None if reverse is None else reverse.contiguous()
    return log_ratio_sums(before.contiguous(), after.contiguous(), reverse, cu_seqlens.contiguous())


class Groups:
    """The responses of a batch by prompt and class: columns 0 incorrect, 1 correct."""

    def __init__(self, rollouts: Rollouts):
        self.prompt = rollouts.prompt_index
        self.segment = 2 * rollouts.prompt_index + rollouts.correct
        self.reward = rollouts.correct.double()
        self.n_prompts = rollouts.n_prompts
        self._segments = Segments.of(self.segment, 2 * self.n_prompts)
        self.n = self.sum(torch.ones_like(self.reward))
        self.size = self.n.sum(1)
        self.compared = self.size >= 2  # [P] a prompt with one response says nothing about a change

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """[R, ...] -> [P, 2, ...]."""
        return self._segments.sum(x).unflatten(0, (self.n_prompts, 2))

    def spread(self, per_class: torch.Tensor) -> torch.Tensor:
        """[P, 2] -> [R]: each response its class's value."""
        return per_class.reshape(-1)[self.segment]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """[P, 2]; NaN for an empty class."""
        return self.sum(x) / self.n

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """[P, 2] unbiased; NaN below two responses."""
        return _where_enough(self.n, 2, self.sum((x - self.spread(self.mean(x))) ** 2) / (self.n - 1))

    def prompt_mean(self, x: torch.Tensor) -> torch.Tensor:
        """[P]."""
        return self.sum(x).sum(1) / self.size

    # -- estimators ---------------------------------------------------------------------------------------------------

    def log_mean_exp(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, 2] log of the mean of e^x, and its jackknife variance over responses (NaN below two).

        The estimate without the largest term is summed afresh: subtracting a term that carries the whole sum would
        leave rounding noise.
        """
        largest = self._largest(x)
        position = torch.arange(x.numel(), device=x.device)
        candidates = torch.where(x == self.spread(largest), position, x.numel())
        first = torch.full_like(largest.view(-1), x.numel(), dtype=torch.int64)
        first = first.scatter_reduce(0, self.segment, candidates, "amin")
        is_largest = position == first[self.segment]

        total = self._logsumexp(x, largest)
        rest = self._logsumexp(torch.where(is_largest, -math.inf, x))
        others = self.spread(total) + torch.log1p(-(x - self.spread(total)).exp().clamp(max=0.5))
        left_out = torch.where(is_largest, self.spread(rest), others)
        variance = (self.n - 1) / self.n * self.sum((left_out - self.spread(self.mean(left_out))) ** 2)
        return _where_enough(self.n, 1, total - self.n.log()), _where_enough(self.n, 2, variance)

    def effective_sample_size(self, l: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σρ)²/Σρ² with ρ = e^l: [P, 2] by class, 0 for an empty one, and [P] over all responses of the prompt."""
        once, twice = self._logsumexp(l), self._logsumexp(2 * l)
        by_class = torch.where(self.n > 0, (2 * once - twice).exp(), 0.0)
        return by_class, (2 * once.logsumexp(1) - twice.logsumexp(1)).exp()

    def second_derivative_of_log_mean(self, s: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, 2] Var s + mean h per class (NaN below two responses), and its jackknife variance (NaN below three).

        Leaving response i out changes the unbiased variance through (s_i − s̄)² alone, so the jackknife's pseudo-values
        are h_i + n/(n − 2)·(s_i − s̄)² up to a constant.
        """
        n = self.spread(self.n)
        pseudo = h + n / (n - 2) * (s - self.spread(self.mean(s))) ** 2
        return self.variance(s) + self.mean(h), _where_enough(self.n, 3, self.variance(pseudo) / self.n)

    @property
    def success_rate(self) -> torch.Tensor:
        """[P]."""
        return self.n[:, 1] / self.size

    def reward_covariance(self, x: torch.Tensor) -> torch.Tensor:
        """[R, K] -> [P, K]: Σ(r_i − r̄)x_i/(G − 1), unbiased for E[r x] − E[r]E[x]; 0 where all share one class.

        NaN for a prompt with one response.
        """
        centred = self.reward - self.success_rate[self.prompt]
        return self.sum(centred[:, None] * x).sum(1) / (self.size - 1)[:, None]

    def controlled_gain(self, change: torch.Tensor) -> torch.Tensor:
        """[R] ρ − 1 -> [P] B + βZ, the change of each prompt's success rate; NaN for a prompt with one response.

        A = Σ(r_i − r̄)(ρ_i − 1)/(G − 1) and B = mean of r_i(ρ_i − 1) are both unbiased for it where E[ρ] = 1, so that
        Z = A − B is a control variate: noise with mean 0. β = −Cov(B, Z)/Var(Z) takes most of it out of B. It is
        estimated from deviations within prompts (differences between prompts are no noise), pooled over all *other*
        prompts, so that it is independent of the Z it multiplies: no bias [derived]. It is kept in [0, 1], between B
        and A, where its best value was in all regimes of docs/simulate: only a handful of responses put it elsewhere.
        Without other prompts β = 1, which is A.
        """
        centred = self.reward - self.success_rate[self.prompt]
        size = self.size[self.prompt]
        a, b = size / (size - 1) * centred * change, self.reward * change
        terms = torch.stack([b, torch.where(size >= 2, a - b, 0.0)], 1)
        mean = self.sum(terms).sum(1) / self.size[:, None]
        within = terms - mean[self.prompt]
        spread = self.sum(within[:, 1:] * within).sum(1) / (self.size * (self.size - 1))[:, None]  # [P, (Z·B, Z·Z)]
        others = self._compared_sum(spread) - torch.where(self.compared[:, None], spread, 0.0)
        known = others[:, 1] > 1e-12 * self._compared_sum(spread)[1]  # more than the rounding of the subtraction
        beta = torch.where(known, (-others[:, 0] / others[:, 1]).clamp(0, 1), 1.0)
        return torch.where(self.compared, mean[:, 0] + beta * mean[:, 1], math.nan)

    def over_prompts(self, per_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, K] -> [K], [K]: mean over the prompts with two responses or more, and its standard error.

        The error is NaN below two such prompts.
        """
        n = self.compared.sum()
        mean = self._compared_sum(per_prompt) / n
        variance = self._compared_sum((per_prompt - mean) ** 2) / (n - 1)
        return mean, _where_enough(n, 2, (variance / n).sqrt())

    def peak_stderr(self, slope: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Jackknife over prompts of −Σ slope/Σ second, [P] and [P] -> 0-dim; NaN where that peak is undefined."""
        n = self.compared.sum()
        total_slope, total_second = self._compared_sum(slope), self._compared_sum(second)
        left_out = -(total_slope - slope) / (total_second - second)
        spread = self._compared_sum((left_out - self._compared_sum(left_out) / n) ** 2)
        return torch.where((total_second < 0) & (n > 1), ((n - 1) / n * spread).sqrt(), math.nan)

    def _compared_sum(self, per_prompt: torch.Tensor) -> torch.Tensor:
        return torch.where(self.compared.view(-1, *[1] * (per_prompt.ndim - 1)), per_prompt, 0.0).sum(0)

    def _largest(self, x: torch.Tensor) -> torch.Tensor:
        lowest = x.new_full((2 * self.n_prompts,), -math.inf)
        return lowest.scatter_reduce(0, self.segment, x, "amax").view(self.n_prompts, 2)

    def _logsumexp(self, x: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
        """[P, 2]; −inf for an empty class."""
        largest = self._largest(x) if largest is None else largest
        offset = torch.where(largest.isinf(), 0.0, largest)
        return self.sum((x - self.spread(offset)).exp()).log() + offset


def quadratic_peak(slope: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """−slope/second where second < 0, else NaN."""
    return torch.where(second < 0, -slope / second, math.nan)


def _where_enough(n: torch.Tensor, needed: int, value: torch.Tensor) -> torch.Tensor:
    return torch.where(n >= needed, value, math.nan)
