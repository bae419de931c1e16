"""What is known of each prompt and of each bin, and the verdict that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast.spectrum.groups import GroupResponses, Groups
from rlvr_fast.spectrum.significance import adjust, p_value, relabel, shared_p_value
from rlvr_fast.spectrum.success_rates import binned, effective_rollouts, wilson

VERDICTS = MASTERED, EDGE, LUCKY, OUT_OF_REACH, UNDETERMINED = (
    "mastered", "edge", "lucky guess", "out of reach", "undetermined")


@dataclass(frozen=True)
class Thresholds:
    """What the verdicts are held against; see ``difficulty_spectrum``."""

    confidence: float
    correction: str
    mastered: float
    visible: float
    negligible: float | None
    chance: float | None

    @property
    def z(self) -> float:
        """Two-sided normal quantile of the confidence."""
        return float(torch.special.ndtri(torch.tensor(0.5 + self.confidence / 2, dtype=torch.float64)))


@dataclass(frozen=True, eq=False)
class PromptEvidence:
    """Per prompt, [P] float64 where not said otherwise.

    bin: int64. n, n_correct: rollouts and successes. success_rate, low, high: with its Wilson interval.
    norm_sq, stderr: unbiased ‖g⁺ − g⁻‖², mean over its groups, and jackknife error; NaN where there is none.
    p_value: of the permutation test for no gap; p_adjusted: corrected over the prompts that have one. verdict: P words.
    """

    bin: Tensor
    n: Tensor
    n_correct: Tensor
    success_rate: Tensor
    low: Tensor
    high: Tensor
    norm_sq: Tensor
    stderr: Tensor
    p_value: Tensor
    p_adjusted: Tensor
    verdict: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class BinEvidence:
    """Per bin, [B] float64. A prompt counts once in each step that it occurs in, as a group of responses.

    n_prompts, n_groups, n, n_correct: counts. success_rate, low, high: pooled over rollouts; Wilson interval with the
        rollouts divided by the design effect of drawing them in prompts.
    norm_sq, stderr: mean unbiased ‖gap‖² of its groups with a gap, and the error of that mean over groups.
    p_value: of the permutation test for no gap in any of its prompts.
    shared_norm_sq, shared_stderr, shared_p_value: unbiased ‖mean gap‖² of its prompts, from products of different
        prompts alone, with its jackknife error over groups and the sign-flip test; NaN without vectors.
    signal, signal_stderr: mean of κ² ‖gap‖² over groups: what one group adds to the squared gradient.
    shared_signal, shared_signal_stderr: unbiased ‖mean of κ gap‖² over groups: what the groups add up to.
    second_moment: mean of κ² ‖ĝap‖² over groups, plug-in: signal and noise together.
    signal_share: Σ (κ n/R)² ‖gap‖² of its groups, over that of all bins: each group's own part of the batch gradient
        (1/R) Σ A_i s_i = Σ_p (n_p/R) κ_p gap_p. Unbiased in numerator and denominator; can be negative.
    batch_share: ⟨the bin's part, the batch gradient⟩ over ‖batch gradient‖², noise taken off; adds up to 1. Negative: a
        step along the batch gradient costs this bin. NaN without vectors.
    noise: tr Σ, variance of a response's gradient within its prompt and class, pooled.
    tokens: of all its rollouts; cost: tokens per rollout. NaN without rollouts.
    p_adjusted: of the shared test where there are vectors, else of the permutation test. verdict: B words.
    """

    n_prompts: Tensor
    n_groups: Tensor
    n: Tensor
    n_correct: Tensor
    success_rate: Tensor
    low: Tensor
    high: Tensor
    norm_sq: Tensor
    stderr: Tensor
    p_value: Tensor
    shared_norm_sq: Tensor
    shared_stderr: Tensor
    shared_p_value: Tensor
    signal: Tensor
    signal_stderr: Tensor
    shared_signal: Tensor
    shared_signal_stderr: Tensor
    second_moment: Tensor
    signal_share: Tensor
    batch_share: Tensor
    noise: Tensor
    tokens: Tensor
    p_adjusted: Tensor
    verdict: tuple[str, ...]

    @property
    def cost(self) -> Tensor:
        return self.tokens / self.n


def weigh(groups: Groups, bin_of: Tensor, n_bins: int, thresholds: Thresholds, n_permutations: int,
          seed: int) -> tuple[PromptEvidence, BinEvidence]:
    """The evidence of all prompts and bins. ``bin_of``: [P] int64."""
    generator = torch.Generator().manual_seed(seed)
    own, within = _permutation_tests(groups, bin_of, n_bins, n_permutations, generator)
    prompts = _prompts(groups, bin_of, own, thresholds)
    return prompts, _bins(groups, bin_of, n_bins, prompts, within, thresholds, n_permutations, generator)


def _permutation_tests(groups: Groups, bin_of: Tensor, n_bins: int, n_permutations: int,
                       generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """p-values [P] and [B]; NaN without a group of both classes whose Gram matrix is known.

    Groups are joined by the sum of their standardised statistics, each relabelled by itself.
    """
    members: list[list[GroupResponses]] = [[] for _ in range(groups.n_prompts)]
    for prompt, one, k, n in zip(groups.prompt.tolist(), groups.responses, groups.n_correct, groups.n, strict=True):
        if one is not None and 0 < k < n:
            members[prompt].append(one)
    own = torch.full((groups.n_prompts,), torch.nan, dtype=torch.float64)
    within = torch.full((n_bins,), torch.nan, dtype=torch.float64)
    observed, null = torch.zeros(n_bins, dtype=torch.float64), torch.zeros(n_bins, n_permutations, dtype=torch.float64)
    for prompt, (its_groups, its_bin) in enumerate(zip(members, bin_of.tolist(), strict=True)):
        if not its_groups:
            continue
        relabelled = [relabel(one.gram, one.correct, n_permutations, generator) for one in its_groups]
        total = sum(one.observed for one in relabelled)
        draws = torch.stack([one.draws(n_permutations, generator) for one in relabelled]).sum(0)
        own[prompt] = relabelled[0].p_value if len(relabelled) == 1 else p_value(total, draws)
        observed[its_bin] += total
        null[its_bin] += draws
        within[its_bin] = 0.0
    for its_bin in within.isfinite().nonzero().squeeze(1).tolist():
        within[its_bin] = p_value(float(observed[its_bin]), null[its_bin])
    return own, within


def _prompts(groups: Groups, bin_of: Tensor, p_values: Tensor, thresholds: Thresholds) -> PromptEvidence:
    n, n_correct = groups.per_prompt(groups.n), groups.per_prompt(groups.n_correct)
    low, high = wilson(n_correct, n, thresholds.z)
    known = groups.norm_sq.isfinite().double()
    count = groups.per_prompt(known)
    norm_sq = groups.per_prompt(groups.norm_sq.nan_to_num(0.0)) / count
    stderr = groups.per_prompt(torch.where(known > 0, groups.stderr, 0.0).square()).sqrt() / count
    adjusted = adjust(p_values, thresholds.correction)
    verdict = verdicts(n_correct, low, high, norm_sq, stderr, adjusted, thresholds)
    return PromptEvidence(bin_of, n, n_correct, n_correct / n, low, high, norm_sq, stderr, p_values, adjusted, verdict)


def _bins(groups: Groups, bin_of: Tensor, n_bins: int, prompts: PromptEvidence, within: Tensor, thresholds: Thresholds,
          n_permutations: int, generator: torch.Generator) -> BinEvidence:
    group_bin = bin_of[groups.prompt]

    total = binned(group_bin, n_bins)
    n, n_correct = total(groups.n), total(groups.n_correct)
    effective = effective_rollouts(prompts.n_correct, prompts.n, bin_of, n_bins)
    low, high = wilson(n_correct / n * effective, effective, thresholds.z)
    mixed = (groups.n_correct > 0) & (groups.n_correct < groups.n)
    known = mixed & groups.norm_sq.isfinite()
    norm_sq, stderr = _mean(groups.norm_sq, groups.stderr, known, group_bin, n_bins)
    # a group of one class adds nothing to the gradient, and that is known
    factor, settled = groups.kappa.square(), known | ~mixed
    signal, signal_stderr = _mean(torch.where(mixed, factor * groups.norm_sq, 0.0),
                                  torch.where(mixed, factor * groups.stderr, 0.0), settled, group_bin, n_bins)
    second_moment, _ = _mean(torch.where(mixed, factor * (groups.norm_sq + groups.bias), 0.0), groups.stderr, settled,
                             group_bin, n_bins)
    energy = total(torch.where(known, groups.weight.square() * groups.norm_sq, 0.0))

    nothing = torch.full((n_bins,), torch.nan, dtype=torch.float64)
    shared = shared_signal = (nothing, nothing)
    shared_p, batch_share = nothing.clone(), nothing
    if groups.products is not None:
        same = groups.prompt[:, None] == groups.prompt
        paired = groups.products.masked_fill(same, 0.0)
        shared = _shared(paired, mixed.double(), mixed, groups, group_bin, n_bins)
        shared_signal = _shared(paired, groups.kappa, torch.ones_like(mixed), groups, group_bin, n_bins)
        for its_bin in range(n_bins):
            inside = ((group_bin == its_bin) & mixed).nonzero().squeeze(1)
            owner = groups.prompt[inside].unique(return_inverse=True)[1]
            shared_p[its_bin] = shared_p_value(paired[inside[:, None], inside], owner, n_permutations, generator)
        weight = torch.where(known, groups.weight, 0.0)
        within_step = groups.products.masked_fill(groups.part[:, None] != groups.part, 0.0)
        part = weight * (within_step @ weight) - weight.square() * torch.where(known, groups.bias, 0.0)
        batch_share = total(part) / part.sum()

    deciding = within if groups.products is None else shared_p
    decided = (norm_sq, stderr) if groups.products is None else shared
    adjusted = adjust(deciding, thresholds.correction)
    verdict = verdicts(n_correct, low, high, *decided, adjusted, thresholds)
    n_prompts = binned(bin_of, n_bins)(torch.ones_like(prompts.n))
    return BinEvidence(n_prompts, total(torch.ones_like(groups.n)), n, n_correct, n_correct / n, low, high, norm_sq,
                       stderr, within, *shared, shared_p, signal, signal_stderr, *shared_signal, second_moment,
                       energy / energy.sum(), batch_share, _noise(groups, group_bin, n_bins), total(groups.tokens),
                       adjusted, verdict)


def _mean(values: Tensor, stderr: Tensor, known: Tensor, group_bin: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Mean of the known values of each bin and its error: between groups, or a single group's own. [B] each."""
    def total(x: Tensor) -> Tensor:
        return binned(group_bin, n_bins)(torch.where(known, x, 0.0))

    count = total(torch.ones_like(values))
    mean = total(values) / count
    between = (total((values - mean[group_bin]).square()) / (count - 1) / count).sqrt()
    return mean, torch.where(count > 1, between, total(stderr) / count)


def _shared(paired: Tensor, factor: Tensor, counted: Tensor, groups: Groups, group_bin: Tensor,
            n_bins: int) -> tuple[Tensor, Tensor]:
    """‖mean of factor · gap‖² per bin from pairs of different prompts, and its jackknife error [derived].

    θ = Σ_{p≠q} f_p f_q ⟨gap_p, gap_q⟩ / number of such pairs. Products of different prompts have independent noise:
    nothing needs to be taken off. NaN where there is no pair; the error also where leaving out a group leaves none.
    """
    result = torch.full((2, n_bins), torch.nan, dtype=torch.float64)
    comparable = (groups.part[:, None] == groups.part) | groups.across_steps
    pair = ((groups.prompt[:, None] != groups.prompt) & comparable & counted[:, None] & counted).double()
    weighted = factor[:, None] * paired * factor
    for its_bin in range(n_bins):
        inside = ((group_bin == its_bin) & counted).nonzero().squeeze(1)
        products, pairs = weighted[inside[:, None], inside], pair[inside[:, None], inside]
        n, n_pairs = len(inside), pairs.sum()
        if n_pairs == 0:
            continue
        result[0, its_bin] = products.sum() / n_pairs
        left = (products.sum() - 2 * products.sum(1)) / (n_pairs - 2 * pairs.sum(1))
        result[1, its_bin] = ((left - left.mean()).square().sum() * (n - 1) / n).sqrt()
    result[1][result[1].isinf()] = torch.nan
    return result[0], result[1]


def _noise(groups: Groups, group_bin: Tensor, n_bins: int) -> Tensor:
    """tr Σ within prompt and class, pooled over the groups whose Gram matrix is known."""
    spread, freedom = torch.zeros(n_bins, dtype=torch.float64), torch.zeros(n_bins, dtype=torch.float64)
    for its_bin, responses in zip(group_bin.tolist(), groups.responses, strict=True):
        if responses is None:
            continue
        for chosen in (responses.correct, ~responses.correct):
            size = int(chosen.sum())
            if size > 1:
                own = responses.gram[chosen][:, chosen]
                spread[its_bin] += (own.diagonal().sum() - own.sum() / size).clamp(min=0.0)
                freedom[its_bin] += size - 1
    return spread / torch.where(freedom > 0, freedom, torch.nan)


def verdicts(n_correct: Tensor, low: Tensor, high: Tensor, norm_sq: Tensor, stderr: Tensor, p_adjusted: Tensor,
             thresholds: Thresholds) -> tuple[str, ...]:
    """One word for each prompt or bin, from the first of these that holds:

    * mastered: the success interval lies above ``mastered``.
    * edge: the gap is significant, p_adjusted <= 1 − confidence.
    * out of reach: no success, and the success interval lies below ``visible``.
    * lucky guess: successes, but no significant gap, and the upper end of the gap's norm² is below ``negligible`` (by
      default half the median of those at the edge); with ``chance``, the interval also reaches down to it.
    * undetermined: everything else. No evidence is not evidence of nothing.
    """
    edge = p_adjusted <= 1 - thresholds.confidence  # NaN is not
    negligible = thresholds.negligible
    if negligible is None:
        negligible = float(norm_sq[edge].nanmedian()) / 2 if edge.any() else float("nan")
    small = norm_sq + thresholds.z * stderr < negligible
    if thresholds.chance is not None:
        small &= low <= thresholds.chance
    lucky = (n_correct > 0) & small & ~p_adjusted.isnan()
    rules = ((MASTERED, low >= thresholds.mastered), (EDGE, edge),
             (OUT_OF_REACH, (n_correct == 0) & (high < thresholds.visible)), (LUCKY, lucky))
    return tuple(next((word for word, holds in rules if holds[i]), UNDETERMINED) for i in range(len(low)))
